"""What is rendered: whole manifests against golden files, and the promises they make."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moe_core.contract import runtime_config
from moe_core.contract.names import OWN_ENV, OWN_MOUNTS, OWN_VOLUMES
from moe_core.contract.runtime_config import DispatchConfig, RuntimeConfig, TrainingConfig
from moe_core.decide import decide
from moe_core.decide.accept import Accepted, accept
from moe_core.facts import Action, ApplyObject, BindPod, CreatePod, Facts, NetworkFact, NodeFact, Wish
from moe_core.manifests.map_slices import MAX_SLICE_BYTES
from moe_core.manifests.objects import wanted_objects
from moe_core.spec.job import Training
from simcluster import gpu_nodes, job_spec, make, service_spec

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATE = {
    "metadata": {"labels": {"team": "research", "moerator.dev/role": "mine"}, "annotations": {"note": "x"}},
    "spec": {
        "image": "registry.example/moe:1",
        "imagePullPolicy": "IfNotPresent",
        "imagePullSecrets": ["pull"],
        "resources": {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"nvidia.com/gpu": 1}},
        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "volumeMounts": [{"name": "models", "mountPath": "/model", "readOnly": True}],
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
    },
}


def everything(kind: str, spec: dict[str, Any]) -> list[Action]:
    """All actions until the group runs."""
    room = {"nvidia.com/gpu": 8, "cpu": 64000, "memory": 2**40}
    nodes = [NodeFact(name=f"n{i}", labels={"pool": "gpu"}, allocatable=room) for i in range(4)]
    sim = make(kind, spec, nodes)
    actions: list[Action] = []
    for _ in range(3):
        actions += sim.step().actions
        sim.tick()
    return actions


def golden(name: str, value: object) -> None:
    """Compare with tests/golden/<name>.json; UPDATE_GOLDEN=1 writes it anew, for a person to read in the diff."""
    path = GOLDEN / f"{name}.json"
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs; UPDATE_GOLDEN=1 writes it anew"


def manifests(actions: list[Action]) -> dict[str, Any]:
    found = {f"{a.kind}/{a.name}": a.manifest for a in actions if isinstance(a, ApplyObject) and a.kind != "ExpertMap"}
    pods = {f"Pod/{a.name}": a.manifest for a in actions if isinstance(a, CreatePod) and a.index == 0}
    return {**found, **pods}


def test_a_service_renders_as_the_golden_file_says() -> None:
    golden("manifests-service", manifests(everything("MoEService", service_spec(template=TEMPLATE, drills="Allowed"))))


def test_a_job_renders_as_the_golden_file_says() -> None:
    golden("manifests-job", manifests(everything("MoEJob", job_spec(template=TEMPLATE))))


def pods() -> dict[str, dict[str, Any]]:
    actions = everything("MoEService", service_spec(template=TEMPLATE))
    return {a.role: dict(a.manifest) for a in actions if isinstance(a, CreatePod) and a.index == 0}


@pytest.mark.parametrize("role", ["coordinator", "rank", "gateway"])
def test_every_pod_satisfies_the_restricted_pod_security_standard(role: str) -> None:
    spec = pods()[role]["spec"]
    [container] = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False


@pytest.mark.parametrize("role", ["coordinator", "rank", "gateway"])
def test_every_pod_is_told_who_it_is_by_the_downward_api(role: str) -> None:
    [container] = pods()[role]["spec"]["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["MOERATOR_ROLE"]["value"] == role
    assert env["MOERATOR_POD_UID"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert len(env) == len(container["env"]), "a name given twice is refused by server-side apply"
    assert all(name.startswith("MOERATOR_") == (name in contract_names()) for name in env if name != "NCCL_DEBUG")


def contract_names() -> list[str]:
    return [value for name, value in vars(runtime_config).items() if name.startswith("ENV_")]


def test_only_ranks_are_gated_counted_and_never_restarted_in_place() -> None:
    found = pods()
    assert found["rank"]["spec"]["schedulingGates"] == [{"name": "moerator.dev/gang"}]
    assert "schedulingGates" not in found["gateway"]["spec"]
    assert found["rank"]["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert "nvidia.com/gpu" not in str(found["gateway"]["spec"]["containers"][0]["resources"])
    policies = {role: found[role]["spec"]["restartPolicy"] for role in sorted(found)}
    assert policies == {"coordinator": "Always", "gateway": "Always", "rank": "Never"}


def test_a_users_label_cannot_take_the_place_of_ours() -> None:
    rank = pods()["rank"]
    assert rank["metadata"]["labels"]["moerator.dev/role"] == "rank"
    assert rank["metadata"]["labels"]["team"] == "research"


@pytest.mark.parametrize("role", ["coordinator", "rank", "gateway"])
def test_what_a_template_may_not_name_is_all_that_pods_have_of_ours(role: str) -> None:
    spec = pods()[role]["spec"]
    [container] = spec["containers"]
    theirs = {"models", "/model", "NCCL_DEBUG", "HOME", "OMP_NUM_THREADS"}
    assert {v["name"] for v in spec["volumes"] if not v["name"].startswith(OWN_VOLUMES)} <= theirs
    assert {e["name"] for e in container["env"] if not e["name"].startswith(OWN_ENV)} <= theirs
    assert {m["mountPath"] for m in container["volumeMounts"]} - theirs == set(OWN_MOUNTS)


@pytest.mark.parametrize("role", ["coordinator", "rank", "gateway"])
def test_every_pod_has_the_volumes_of_the_template(role: str) -> None:
    """Models may lie there, and so may the dependencies of a slim image."""
    assert "models" in str(pods()[role]["spec"]["volumes"])
    assert "/model" in str(pods()[role]["spec"]["containers"][0]["volumeMounts"])


def test_a_gpu_request_computes_on_the_gpu_and_none_on_the_cpu() -> None:
    def config(spec: dict[str, Any]) -> RuntimeConfig:
        wish = Wish("MoEService", "d", "tiny", "u", 1, spec)
        accepted = accept(wish, Facts())
        assert isinstance(accepted, Accepted)
        return accepted.plan.config

    assert config(service_spec(template=TEMPLATE)).device == "cuda"
    assert config(service_spec()).device == "cpu"
    assert config(service_spec(drills="Allowed")).faults_enabled
    assert not config(service_spec()).faults_enabled


def test_a_rank_computes_on_the_processors_it_asks_for() -> None:
    threads = {role: env_of(role).get("OMP_NUM_THREADS") for role in ("rank", "gateway", "coordinator")}
    assert threads == {"rank": "4", "gateway": None, "coordinator": None}


def env_of(role: str) -> dict[str, str | None]:
    return {entry["name"]: entry.get("value") for entry in pods()[role]["spec"]["containers"][0]["env"]}


def test_the_local_shell_gets_loopback_and_its_own_ports() -> None:
    wish = Wish("MoEService", "d", "tiny", "u", 1, service_spec())
    accepted = accept(wish, Facts(local=True, ports={"coordinator": 1111, "ray": 2222, "gateway": 3333}))
    assert isinstance(accepted, Accepted)
    config = accepted.plan.config
    assert (config.coordinator_host, config.coordinator_port, config.ray_port) == ("127.0.0.1", 1111, 2222)
    assert config.serving is not None
    assert config.serving.gateway_port == 3333


def test_no_training_field_is_accepted_and_then_ignored() -> None:
    given = {
        "data": {"path": "/text"},
        "sequenceLength": 64,
        "sequencesPerRank": 3,
        "maxSteps": 7,
        "maxSeconds": 11,
        "optimizer": "Muon",
        "learningRate": "1e-4",
        "warmupSteps": 5,
        "weightDecay": "0.2",
        "auxLossCoefficient": "0.03",
        "maxExpertGradientNorm": "0.7",
        "seed": 9,
        "matmulPrecision": "Medium",
        "snapshotEverySteps": 13,
    }
    assert len(given) == len(Training.model_fields)
    wish = Wish("MoEJob", "d", "tiny", "u", 1, {**job_spec(), "training": given})
    accepted = accept(wish, Facts())
    assert isinstance(accepted, Accepted)
    training = accepted.plan.config.training
    assert training == TrainingConfig(
        data="/text",
        sequence_length=64,
        sequences_per_rank=3,
        max_steps=7,
        max_seconds=11,
        optimizer="Muon",
        learning_rate=1e-4,
        warmup_steps=5,
        weight_decay=0.2,
        aux_loss_coefficient=0.03,
        max_expert_gradient_norm=0.7,
        seed=9,
        matmul_precision="Medium",
        snapshot_every_steps=13,
        output_path="/out",
    )


def policies(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    network = NetworkFact("moerator-system", ("monitoring",))
    accepted = accept(Wish(kind, "d", "tiny", "u", 1, spec), Facts(network=network))  # type: ignore[arg-type]
    assert isinstance(accepted, Accepted)
    wanted = wanted_objects(accepted.plan, accepted.plan.expert_map(4))
    return {obj.name: obj.manifest for obj in wanted if obj.kind == "NetworkPolicy"}


def test_network_policies_are_as_the_golden_file_says() -> None:
    golden("network-policies", {**policies("MoEService", service_spec()), **policies("MoEJob", job_spec())})


def test_only_the_gateways_take_connections_from_anywhere_and_nobody_but_the_group_reaches_a_rank() -> None:
    for name, policy in policies("MoEService", service_spec()).items():
        pods, [rule] = policy["spec"]["podSelector"]["matchLabels"], policy["spec"]["ingress"]
        assert pods["moerator.dev/owner-name"] == "tiny"
        assert ("from" in rule) == (pods.get("moerator.dev/role") != "gateway"), name
        assert ("ports" in rule) == ("moerator.dev/role" in pods), name
        assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_policies_go_when_they_are_not_wanted_any_more() -> None:
    sim = make("MoEService", service_spec(), gpu_nodes(4))
    sim.objects["NetworkPolicy", "tiny-svc-network"] = "old"
    sim.step()
    assert not [name for kind, name in sim.objects if kind == "NetworkPolicy"]


def test_a_big_map_is_sliced_by_layer_and_no_slice_is_too_big_for_etcd() -> None:
    spec = service_spec(256, 31)
    spec["model"] = {"path": "/m", "numExperts": 256, "numMoeLayers": 61}
    accepted = accept(Wish("MoEService", "d", "big", "u", 1, spec), Facts())
    assert isinstance(accepted, Accepted)
    slices = [o for o in wanted_objects(accepted.plan, accepted.plan.expert_map(256)) if o.kind == "ExpertMap"]
    assert len(slices) > 1
    assert len({o.name for o in slices}) == len(slices)
    assert all(len(json.dumps(o.manifest)) < MAX_SLICE_BYTES * 1.25 for o in slices)
    first = [o.manifest["spec"].get("firstLayer", 0) for o in slices]
    counts = [len(o.manifest["spec"]["layers"]) for o in slices]
    assert first == [sum(counts[:i]) for i in range(len(slices))]
    assert sum(counts) == 61


def test_slices_that_a_smaller_map_no_longer_needs_are_deleted() -> None:
    sim = make("MoEService", service_spec(), gpu_nodes(4))
    sim.objects["ExpertMap", "tiny-svc-map-30"] = "old"
    sim.step()
    assert ("ExpertMap", "tiny-svc-map-30") not in sim.objects


def test_what_is_applied_is_not_applied_again() -> None:
    sim = make("MoEService", service_spec(), gpu_nodes(4))
    sim.step()
    assert not [a for a in decide(sim.wish, sim.facts(), sim.now).actions if isinstance(a, ApplyObject)]


def test_ranks_are_bound_to_nodes_that_the_template_selects() -> None:
    bound = [a.node for a in everything("MoEService", service_spec(template=TEMPLATE)) if isinstance(a, BindPod)]
    assert bound == ["n0", "n1", "n2", "n3"]


@pytest.mark.parametrize(("kind", "spec"), [("MoEJob", job_spec), ("MoEService", service_spec)])
def test_how_tokens_travel_reaches_the_pods(kind: str, spec: Any) -> None:
    given = {"wire": "Float8", "hierarchy": "ByNode", "overlap": "TwoBatch"}
    accepted = accept(Wish(kind, "d", "tiny", "u", 1, spec(dispatch=given)), Facts())  # type: ignore[arg-type]
    assert isinstance(accepted, Accepted)
    told = DispatchConfig(wire="Float8", combine_wire="Float8", hierarchy="ByNode", overlap="TwoBatch")
    assert accepted.plan.config.dispatch == told
