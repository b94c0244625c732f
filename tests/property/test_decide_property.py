"""What holds of decide whatever happens: crashes between actions, lost pods and nodes, edits, in any order."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_core.decide import decide
from moe_core.facts import ApplyObject, BindPod, CreatePod, Decision, DeletePod, Facts, PodFact, PutWish
from simcluster import Sim, edit, gpu_nodes, gpu_template, job_spec, make, service_spec

KINDS = st.sampled_from(["MoEJob", "MoEService"])
EVENTS = (
    "kill",
    "delete",
    "vanish",
    "node-gone",
    "node-back",
    "relabel",
    "spares",
    "coordinator",
    "resize",
    "tick",
    "gateway",
    "refuse",
    "forget",
    "topology",
    "stray",
    "impossible",
)
TOPOLOGY = {"net": (("host", "kubernetes.io/hostname"),)}
CONSTRAINT = {"topologyName": "net", "pack": {"preferred": "host", "ranksPerNode": 1}}


def start(kind: str, ranks: int, nodes: int) -> Sim:
    spec = job_spec if kind == "MoEJob" else service_spec
    wanted = spec(ranks, template=gpu_template(), topologyConstraint=CONSTRAINT)
    return make(kind, wanted, gpu_nodes(nodes), topologies=TOPOLOGY)


def check(sim: Sim) -> None:
    """Invariants after every single reconcile."""
    for rank in range(12):
        live = sim.live(rank)
        assert len(live) <= 1, f"two live pods of rank {rank}: {[p.name for p in live]}"
    names = [p.name for p in sim.pods]
    assert len(names) == len(set(names))
    by_node: dict[str, int] = {}
    for pod in sim.ranks():
        if pod.node and not pod.gated and not pod.deleting and pod.phase in ("Pending", "Running"):
            by_node[pod.node] = by_node.get(pod.node, 0) + 1
    assert all(count <= 1 for count in by_node.values()), f"one GPU a node, two ranks: {by_node}"


def step(sim: Sim, crash_after: int | None) -> None:
    """One reconcile that may die; no member of the group in good health loses its pod by it."""
    nodes = [n.name for n in sim.nodes]
    healthy = [p.uid for p in sim.ranks() if p.uid in sim.members.values() and p.phase == "Running" and p.node in nodes]
    decision = sim.step(crash_after=crash_after)
    assert not [a for a in decision.actions if isinstance(a, DeletePod) and a.uid in healthy]
    check(sim)


def happen(sim: Sim, event: str, chance: random.Random) -> None:  # noqa: PLR0912 - one arm per event
    ranks = [p for p in sim.ranks() if not p.gated and not p.deleting]
    match event:
        case "kill" if ranks:
            sim.kill(chance.choice(ranks).index)
        case "delete" if ranks:
            pod = chance.choice(ranks)
            sim.pods = [replace(p, deleting=True) if p.uid == pod.uid else p for p in sim.pods]
        case "vanish" if ranks:
            sim.pods.remove(chance.choice(ranks))
        case "node-gone" if len(sim.nodes) > 4:
            gone = chance.choice(sim.nodes)
            sim.nodes = tuple(n for n in sim.nodes if n.name != gone.name)
        case "node-back":
            sim.nodes = gpu_nodes(9)
        case "relabel":  # its ranks stay, and nobody knows any more where that is
            lost = chance.choice(sim.nodes)
            sim.nodes = tuple(replace(n, labels={}) if n.name == lost.name else n for n in sim.nodes)
        case "spares" if sim.wish.kind == "MoEService":  # a host has one place: nobody can join then
            edit(sim, spares={"perDomain": chance.randint(0, 1)})
        case "coordinator" | "gateway":
            ended = [replace(p, phase="Failed") for p in sim.pods if p.role == event]
            sim.pods = [p for p in sim.pods if p.role != event] + (ended if chance.random() < 0.5 else [])
        case "forget":  # a status that was never written
            sim.wish = replace(sim.wish, status={})
        case "refuse":
            kind = chance.choice([ApplyObject, BindPod, CreatePod, DeletePod, PutWish])
            sim.refuses = lambda action: isinstance(action, kind)
        case "topology":  # what would not be accepted any more is kept healthy all the same
            sim.topologies = {} if sim.topologies else TOPOLOGY
        case "stray":
            sim.foreign = () if sim.foreign else ("Pod/tiny-svc-rank-9-9",)
        case "impossible" if sim.wish.kind == "MoEService":
            edit(sim, experts={"redundantPerRank": 0, "minCopies": 2})
        case "resize" if sim.wish.kind == "MoEService":
            edit(sim, parallelism={"expert": chance.randint(1, 6)})
        case _:
            sim.tick(7)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(KINDS, st.lists(st.sampled_from(EVENTS), max_size=12), st.integers(0, 2**16))
def test_whatever_happens_and_wherever_the_operator_dies_the_group_comes_back_whole(
    kind: str, events: list[str], seed: int
) -> None:
    chance = random.Random(seed)
    sim = start(kind, 4, 9)
    sim.staging_ticks = chance.randint(0, 4)
    for event in events:
        for _ in range(chance.randint(0, 3)):
            step(sim, chance.choice([None, 0, 1, 2, 5, 9]))
            sim.tick()
        happen(sim, event, chance)
    sim.nodes = gpu_nodes(9)
    sim.refuses = lambda action: False
    edit(sim, **({} if kind == "MoEJob" else {"spares": {"perDomain": 0}}))
    if not sim.wish.status.get("epoch"):  # nothing has run that could be kept
        sim.topologies, sim.foreign = TOPOLOGY, ()
        edit(sim, **({} if kind == "MoEJob" else {"experts": {"redundantPerRank": 2}}))
    for _ in range(25):  # back-off may take its time
        step(sim, chance.choice([None, None, 1, 3]))
        sim.tick(30)
    sim.settle()
    check(sim)
    assert sim.condition("Ready") == ("True", "AllActive")
    is_accepted = sim.condition("Accepted")[0] == "True"
    size = sim.wish.spec["parallelism"]["expert"] if is_accepted else sim.wish.status["memory"]["wishRanks"]
    assert sorted(sim.members) == list(range(size))
    assert sorted(p.index for p in sim.ranks()) == list(range(size))


@settings(max_examples=40, deadline=None)
@given(KINDS, st.integers(0, 40), st.integers(0, 2**16))
def test_an_operator_that_dies_while_it_starts_a_gang_leaves_all_of_it_gated_or_the_rest_still_fitting(
    kind: str, crash_after: int, seed: int
) -> None:
    chance = random.Random(seed)
    sim = start(kind, 4, 5)
    sim.step(crash_after=min(crash_after, 9))
    bound = [a for a in sim.decision().actions if isinstance(a, BindPod)]
    assert len(bound) in (0, 4), "a part of a gang was chosen to be bound"
    sim.step(crash_after=chance.randint(0, 8))
    check(sim)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.wish.status["restarts"] == 0


@settings(max_examples=60, deadline=None)
@given(KINDS, st.integers(0, 5), st.integers(0, 2**16), st.booleans())
def test_the_order_of_facts_changes_nothing(kind: str, rounds: int, seed: int, kill: bool) -> None:
    chance = random.Random(seed)
    sim = start(kind, 4, 6)
    for _ in range(rounds):
        sim.step()
        sim.tick()
    if kill and rounds:
        sim.kill(2)
    facts = sim.facts()
    expected = decide(sim.wish, facts, sim.now)
    assert same(decide(sim.wish, shuffled(facts, chance), sim.now), expected)


def shuffled(facts: Facts, chance: random.Random) -> Facts:
    def mixed(items: tuple) -> tuple:  # type: ignore[type-arg]
        copy = list(items)
        chance.shuffle(copy)
        return tuple(copy)

    runtime = facts.runtime
    if runtime is not None:
        runtime = runtime.model_copy(update={"ranks": mixed(runtime.ranks)})
    return replace(
        facts, nodes=mixed(facts.nodes), pods=mixed(facts.pods), objects=mixed(facts.objects), runtime=runtime
    )


def same(one: Decision, other: Decision) -> bool:
    return repr(one) == repr(other)


@pytest.mark.parametrize("kind", ["MoEJob", "MoEService"])
def test_unchanged_facts_give_no_actions_and_no_events(kind: str) -> None:
    sim = start(kind, 4, 6)
    sim.settle()
    sim.step()
    decision = sim.step()
    assert decision.actions == ()
    assert decision.events == ()
    before = dict(sim.wish.status)
    sim.step()
    assert sim.wish.status == before


@pytest.mark.parametrize("kind", ["MoEJob", "MoEService"])
def test_a_lost_status_costs_no_pod(kind: str) -> None:
    sim = start(kind, 4, 6)
    sim.settle()
    uids = {p.uid for p in sim.pods}
    sim.wish = replace(sim.wish, status={})
    sim.settle()
    assert {p.uid for p in sim.pods} == uids
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_gated_pod_needs_no_node() -> None:
    pod = PodFact("tiny-svc-rank-0-1", "u", "rank", 0, 1, "Pending", gated=True)
    sim = start("MoEService", 1, 1)
    sim.pods = [pod]
    assert [type(a) for a in sim.step().actions if isinstance(a, BindPod)] == [BindPod]
