"""Refusals come before any pod exists, with a typed reason and a sentence that helps."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest

from moe_core.decide import decide
from moe_core.facts import Facts, ModelFact, PodFact, Wish
from simcluster import Sim, edit, gpu_nodes, gpu_template, job_spec, make, service_spec

LEVELS = (("block", "net/block"), ("rack", "net/rack"))


def refused(kind: str, spec: dict[str, object], facts: Facts | None = None) -> tuple[str, str]:
    wish = Wish(kind=kind, namespace="d", name="tiny", uid="u", generation=1, spec=spec)  # type: ignore[arg-type]
    decision = decide(wish, facts or Facts(nodes=gpu_nodes(4)), 0.0)
    assert decision.actions == ()
    [accepted] = [c for c in decision.conditions if c.type == "Accepted"]
    assert accepted.status == "False"
    return accepted.reason.value, accepted.message


def test_a_bad_spec_names_every_problem() -> None:
    reason, message = refused("MoEJob", {**job_spec(0), "output": {}})
    assert reason == "InvalidSpec"
    assert "spec.parallelism.expert: must be greater than or equal to 1 (got 0)" in message
    assert "spec.output.path: is required" in message


def test_many_problems_are_counted_not_all_told() -> None:
    _, message = refused("MoEService", {f"wrong{i}": 1 for i in range(9)})
    assert "more" in message


def test_a_checkpoint_nobody_can_read_is_asked_for() -> None:
    spec = service_spec()
    spec["model"] = {"path": "/model"}
    reason, message = refused("MoEService", spec)
    assert reason == "ModelNotFound"
    assert "give model.numExperts and model.numMoeLayers" in message


def test_on_one_machine_a_checkpoint_that_is_not_there_is_waited_for() -> None:
    spec = service_spec()
    spec["model"] = {"path": ".moerator/tiny"}
    reason, message = refused("MoEService", spec, Facts(nodes=gpu_nodes(4), local=True))
    assert reason == "ModelNotFound"
    assert message == "there is no checkpoint at .moerator/tiny yet; it is served once there is one"


def test_an_unsupported_model_says_what_the_shell_found() -> None:
    facts = Facts(model=ModelFact(0, 0, "llama", problem="llama is a dense family: it has no experts"))
    assert refused("MoEService", service_spec(), facts) == (
        "ModelNotSupported",
        "llama is a dense family: it has no experts",
    )


@pytest.mark.parametrize(
    ("family", "why"),
    [
        (
            "llama",
            "model family llama is not supported: transformers 5.23 has no text model with an expert-parallel plan",
        ),
        ("qwen3moe", "with an expert-parallel plan for it; did you mean qwen3_moe?"),
        ("deepseek_v3", "model family deepseek_v3 is not supported: it needs more numbers than a shape has"),
    ],
)
def test_a_job_of_a_family_that_cannot_run_is_refused_before_any_pod(family: str, why: str) -> None:
    spec = copy.deepcopy(job_spec())
    spec["model"]["shape"]["family"] = family
    reason, message = refused("MoEJob", spec)
    assert reason == "ModelNotSupported"
    assert why in message


def test_a_claim_against_the_checkpoint_is_refused() -> None:
    facts = Facts(model=ModelFact(8, 4, "mixtral"))
    reason, message = refused("MoEService", service_spec(), facts)
    assert (reason, message) == ("InvalidSpec", "spec.model.numExperts: the checkpoint at /model has 8 (got 16)")


def test_fewer_slots_than_promised_copies_is_refused_with_the_lever() -> None:
    reason, message = refused("MoEService", service_spec(4, experts={"minCopies": 2, "redundantPerRank": 1}))
    assert reason == "CoverageImpossible"
    assert message == (
        "4 ranks have 20 slots per layer, 2 copies of 16 experts need 32; "
        "raise experts.redundantPerRank by 3 or parallelism.expert"
    )


def test_an_unknown_topology_and_an_unknown_level_name_what_exists() -> None:
    spec = service_spec(topologyConstraint={"topologyName": "dc", "pack": {"required": "row"}})
    assert refused("MoEService", spec) == (
        "TopologyNotFound",
        "ClusterTopology dc does not exist; there is none",
    )
    reason, message = refused("MoEService", spec, Facts(topologies={"dc": LEVELS}))
    assert reason == "TopologyNotFound"
    assert message == "ClusterTopology dc: level 'row' is not in the topology; its levels are block, rack"


def test_a_preferred_level_that_is_not_narrower_is_refused_rather_than_ignored() -> None:
    pack = {"required": "rack", "preferred": "block"}
    spec = service_spec(topologyConstraint={"topologyName": "dc", "pack": pack})
    reason, message = refused("MoEService", spec, Facts(topologies={"dc": LEVELS}))
    assert reason == "InvalidSpec"
    assert "must be narrower than required rack (got block)" in message


def test_a_foreign_object_is_refused_by_name() -> None:
    facts = Facts(nodes=gpu_nodes(4), foreign=("Service/tiny-svc-gateway", "Pod/tiny-svc-rank-0-1"))
    reason, message = refused("MoEService", service_spec(), facts)
    assert reason == "ForeignObject"
    assert message.startswith("Pod/tiny-svc-rank-0-1, Service/tiny-svc-gateway exists and belongs to somebody else")


def test_a_name_too_long_for_its_pods_is_refused() -> None:
    wish = Wish(kind="MoEJob", namespace="d", name="x" * 50, uid="u", generation=1, spec=job_spec())
    assert decide(wish, Facts(), 0.0).conditions[0].reason == "InvalidSpec"


def test_a_refusal_is_told_once_and_counted_for_its_generation() -> None:
    sim = make("MoEJob", job_spec(0))
    assert [e.type for e in sim.step().events] == ["Warning"]
    assert sim.step().events == ()
    assert sim.wish.status["observedGeneration"] == 1
    assert sim.condition("Ready") == ("False", "InvalidSpec")


def test_another_controllers_object_is_left_alone() -> None:
    sim = make("MoEJob", job_spec(managedBy="kueue.x-k8s.io/multikueue"), gpu_nodes(4))
    decision = sim.step()
    assert decision.actions == ()
    assert sim.condition("Accepted") == ("False", "ManagedElsewhere")
    theirs = {"conditions": [{"type": "Accepted", "status": "True", "reason": "Theirs", "message": ""}]}
    sim.wish = replace(sim.wish, status=theirs)
    assert sim.step().conditions == ()


def test_more_slots_than_an_expert_map_holds_are_refused_before_they_are_planned() -> None:
    reason, message = refused("MoEService", service_spec(1024, redundant=4096))
    assert reason == "InvalidSpec"
    assert "spec.experts.redundantPerRank" in message and "4194320 slots per layer, at most 16384" in message


def test_our_own_manager_name_is_ours() -> None:
    sim = make("MoEJob", job_spec(managedBy="moerator.dev/operator"), gpu_nodes(4))
    assert sim.step().actions


def running_service(spec: dict[str, object]) -> Sim:
    sim = make("MoEService", spec, gpu_nodes(6))
    sim.settle()
    return sim


def test_an_edit_to_a_size_that_cannot_cover_is_refused_and_the_old_size_is_kept_alive() -> None:
    sim = running_service(service_spec(4, experts={"minCopies": 2, "redundantPerRank": 4}))
    edit(sim, parallelism={"expert": 2})
    sim.settle()
    assert sim.condition("Accepted") == ("False", "CoverageImpossible")
    assert sorted(sim.members) == [0, 1, 2, 3]
    sim.kill(3)
    sim.settle()
    assert sorted(sim.members) == [0, 1, 2, 3], "a refused edit must not stop the healing"
    edit(sim, parallelism={"expert": 3})
    sim.settle()
    assert sim.condition("Accepted")[0] == "False"
    edit(sim, parallelism={"expert": 4})
    sim.settle()
    assert sim.condition("Accepted") == ("True", "Accepted")


def without_topologies(sim: Sim) -> None:
    sim.topologies = {}


def with_a_stray_pod(sim: Sim) -> None:
    sim.foreign = ("Pod/tiny-svc-rank-9-9",)


def without_its_model(sim: Sim) -> None:
    sim.model = ModelFact(0, 0, "", problem="config.json is not JSON")


def with_another_checkpoint_in_its_folder(sim: Sim) -> None:
    sim.model = ModelFact(8, 4, "mixtral")


def with_levels_the_other_way_round(sim: Sim) -> None:
    edit(sim, topologyConstraint={"topologyName": "net", "pack": {"required": "net", "preferred": "rack"}})
    sim.topologies = {"net": (("rack", "rack"), ("net", "net"))}


def with_more_copies_than_slots(sim: Sim) -> None:
    edit(sim, experts={"minCopies": 2, "redundantPerRank": 1})


def with_more_slots_than_a_map_holds(sim: Sim) -> None:
    edit(sim, parallelism={"expert": 1000}, experts={"redundantPerRank": 1000})


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (without_topologies, "TopologyNotFound"),
        (with_a_stray_pod, "ForeignObject"),
        (without_its_model, "ModelNotSupported"),
        (with_another_checkpoint_in_its_folder, "InvalidSpec"),
        (with_levels_the_other_way_round, "InvalidSpec"),
        (with_more_copies_than_slots, "CoverageImpossible"),
        (with_more_slots_than_a_map_holds, "InvalidSpec"),
    ],
)
def test_a_service_that_would_not_be_accepted_any_more_is_kept_healthy(
    happens: Callable[[Sim], None], reason: str
) -> None:
    constraint = {"topologyName": "net", "pack": {"preferred": "rack"}}
    nodes = [replace(node, labels={**node.labels, "net": "a", "rack": "r1"}) for node in gpu_nodes(6)]
    sim = make(
        "MoEService",
        service_spec(template=gpu_template(), topologyConstraint=constraint),
        nodes,
        topologies={"net": (("net", "net"), ("rack", "rack"))},
    )
    sim.settle()
    digest = sim.told.expert_map.digest if sim.told else ""
    happens(sim)
    sim.kill(2)
    sim.tick()
    sim.step()
    assert sim.condition("Accepted") == ("False", reason)
    assert sim.condition("Ready")[0] == "False", "a rank is lost and Ready knows"
    sim.settle()
    assert sorted(sim.members) == [0, 1, 2, 3]
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.condition("Accepted") == ("False", reason)
    assert sim.told is not None
    assert sim.told.expert_map.digest == digest, "the map that runs is kept"


def test_a_checkpoint_that_is_away_for_a_moment_is_not_asked_for_again() -> None:
    spec = service_spec(template=gpu_template(), model={"path": "/model"})
    sim = make("MoEService", spec, gpu_nodes(6), model=ModelFact(16, 4, "qwen3_moe"))
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    sim.model = None
    sim.kill(1)
    sim.settle()
    assert sim.condition("Accepted") == ("False", "ModelNotFound")
    assert sim.condition("Ready") == ("True", "AllActive")
    assert [pod.incarnation for pod in sim.live(1)] == [2]


def test_a_refused_edit_that_cannot_even_be_read_makes_nobody_call_it_ready() -> None:
    sim = running_service(service_spec())
    edit(sim, template={"spec": {"resources": {"requests": {"cpu": "lots"}}}})
    sim.step()
    assert sim.condition("Ready") == ("Unknown", "InvalidSpec")


def test_a_refused_edit_leaves_the_pods_alone() -> None:
    sim = running_service(service_spec())
    pods = list(sim.pods)
    edit(sim, template={"spec": {"resources": {"requests": {"cpu": "lots"}}}})
    sim.step()
    assert sim.pods == pods
    assert sim.condition("Accepted") == ("False", "InvalidSpec")


def test_what_is_refused_can_still_be_suspended() -> None:
    sim = running_service(service_spec())
    edit(sim, suspend=True, topologyConstraint={"topologyName": "gone", "pack": {"required": "rack"}})
    sim.settle()
    assert sim.pods == []
    assert sim.condition("Accepted") == ("False", "TopologyNotFound")


def test_deleting_leaves_the_pods_to_the_garbage_collector_but_not_on_one_machine() -> None:
    wish = Wish(
        kind="MoEJob",
        namespace="d",
        name="t",
        uid="u",
        generation=1,
        spec=job_spec(),
        status={"epoch": 3},
        deleting=True,
    )
    pods = (PodFact("t-job-rank-0-1", "p", "rank", 0, 1, "Running"),)
    assert decide(wish, Facts(pods=pods), 0.0).actions == ()
    assert len(decide(wish, Facts(pods=pods, local=True), 0.0).actions) == 1
    assert decide(wish, Facts(pods=pods), 0.0).status == {"epoch": 3}


@pytest.mark.parametrize("kind", ["MoEJob", "MoEService", "MoEDrill"])
@pytest.mark.parametrize("spec", [{}, {"parallelism": "many"}, {"parallelism": {"expert": None}}, {"suspend": "yes"}])
def test_no_spec_makes_decide_fail(kind: str, spec: dict[str, object]) -> None:
    assert refused(kind, spec)[0] == "InvalidSpec"
