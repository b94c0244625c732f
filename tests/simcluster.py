"""A tiny pure cluster for tests of the brain: applies actions, moves pods and runtime along. No clock, no I/O."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moe_core.contract.base import digest_of
from moe_core.contract.exchange import Coverage, RankState, RuntimeState, RuntimeWish, ServingProgress, TrainingProgress
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.links import Links
from moe_core.contract.names import ROLE_COORDINATOR, ROLE_RANK
from moe_core.decide import decide
from moe_core.experts.measure import coverage
from moe_core.facts import (
    Action,
    ApplyObject,
    BindPod,
    CreatePod,
    Decision,
    DeleteObject,
    DeleteOwner,
    DeletePod,
    EnsureToken,
    Facts,
    InjectFault,
    ModelFact,
    NodeFact,
    ObjectFact,
    PodFact,
    PutWish,
    RefusedAction,
    ReportMap,
    Wish,
)

SHAPE = {
    "family": "qwen3_moe",
    "hiddenSize": 64,
    "numHiddenLayers": 4,
    "numAttentionHeads": 4,
    "numKeyValueHeads": 2,
    "headDim": 16,
    "numExperts": 16,
    "numExpertsPerTok": 2,
    "moeIntermediateSize": 64,
}


def job_spec(ranks: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "model": {"shape": SHAPE},
        "training": {"data": {"source": "PythonStdlib"}, "maxSteps": 100},
        "output": {"path": "/out"},
        "parallelism": {"expert": ranks},
        **more,
    }


def service_spec(ranks: int = 4, redundant: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": "/model", "numExperts": 16, "numMoeLayers": 4},
        "parallelism": {"expert": ranks},
        "experts": {"redundantPerRank": redundant},
        **more,
    }


def gpu_template(gpus: int = 1) -> dict[str, Any]:
    return {"spec": {"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}}


def gpu_nodes(count: int, gpus: int = 1) -> tuple[NodeFact, ...]:
    return tuple(
        NodeFact(
            name=f"n{i}",
            labels={"kubernetes.io/hostname": f"n{i}"},
            allocatable={"nvidia.com/gpu": gpus, "pods": 110, "cpu": 8000, "memory": 2**35},
        )
        for i in range(count)
    )


@dataclass
class Sim:
    """`step()` is one reconcile of the operator, `tick()` one moment of the cluster and the runtime."""

    wish: Wish
    nodes: tuple[NodeFact, ...]
    now: float = 1000.0
    pods: list[PodFact] = field(default_factory=list)
    objects: dict[tuple[str, str], str] = field(default_factory=dict)
    map_status: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    map_spec: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    told: RuntimeWish | None = None
    registered: set[str] = field(default_factory=set)
    """uids of the ranks that the coordinator has heard of: none when it has just started."""
    mute: set[str] = field(default_factory=set)
    """uids of ranks that are stopped together with their guard: they run, and no coordinator hears of them."""
    asked: str = ""
    """uid of the coordinator that the ranks last reported to."""
    members: dict[int, str] = field(default_factory=dict)
    epoch: int = 0
    step_count: int = 0
    load: tuple[tuple[int, ...], ...] = ()
    load_window_s: float = 0.0
    seconds_per_pick: float = 1e-5
    expert_packing: str = ""
    seconds_of_rank: dict[int, float] = field(default_factory=dict)
    """Ranks that take another time for a pick than the rest."""
    pick_bytes: int = 0
    links: Links | None = None
    owner_deleted: bool = False
    stuck_terminating: bool = False
    uids: int = 0
    ever_bound: list[str] = field(default_factory=list)
    topologies: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    model: ModelFact | None = None
    training_done: bool = False
    injected: list[str] = field(default_factory=list)
    draining: set[str] = field(default_factory=set)
    """uids of members that the told wish does not name; one that is named again is active again."""
    staging_ticks: int = 0
    """How long ranks take to bring a new map's slots into memory."""
    staged: dict[str, int] = field(default_factory=dict)
    map_in_force: ExpertMap | None = None
    refuses: Callable[[Action], bool] = lambda action: False
    """What the API server does not accept, with 403."""

    @property
    def coordinator_up(self) -> bool:
        return any(p.role == ROLE_COORDINATOR and p.phase == "Running" and not p.deleting for p in self.pods)

    def ranks(self) -> list[PodFact]:
        return [p for p in self.pods if p.role == ROLE_RANK]

    def live(self, rank: int) -> list[PodFact]:
        return [p for p in self.ranks() if p.index == rank and not p.deleting and p.phase in ("Pending", "Running")]

    def runtime(self) -> RuntimeState | None:
        if not self.coordinator_up:
            return None
        states = []
        for pod in self.ranks():
            if pod.phase != "Running" or pod.deleting or pod.uid not in self.registered:
                continue
            phase = "Ready" if self.told is None or pod.index in self.told.ranks else "Left"
            if self.members.get(pod.index) == pod.uid:
                phase = "Draining" if pod.uid in self.draining else "Active"
            seconds = self.seconds_of_rank.get(pod.index, self.seconds_per_pick)
            states.append(RankState(rank=pod.index, pod_uid=pod.uid, phase=phase, seconds_per_pick=seconds))
        in_force = (
            self.told is not None
            and self.map_in_force is not None
            and self.map_in_force.digest == self.told.expert_map.digest
            and sorted(self.members) == sorted(self.told.ranks)
        )
        seen = None
        known = self.map_in_force is not None and any(state.phase in ("Active", "Draining") for state in states)
        if known and self.map_in_force is not None:
            live = [r for r in self.members if r < self.map_in_force.num_ranks]
            seen = coverage(self.map_in_force, live) if live else Coverage(covered=0, total=1)
        serving = self.wish.kind == "MoEService"
        return RuntimeState(
            version=self.step_count,
            wish_put=self.told.generation if self.told else None,
            wish_generation=self.told.generation if in_force and self.told else None,
            epoch=self.epoch if known else 0,
            map_digest=self.map_in_force.digest if known and self.map_in_force else "",
            ranks=tuple(states),
            coverage=seen,
            serving=ServingProgress() if serving else None,
            load=self.load,
            load_window_s=self.load_window_s,
            seconds_per_pick=self.seconds_per_pick,
            expert_bytes=1000,
            expert_packing=self.expert_packing,
            pick_bytes=self.pick_bytes,
            links=self.links,
            training=None if serving else TrainingProgress(step=self.epoch, done=self.training_done),
        )

    def facts(self) -> Facts:
        return Facts(
            nodes=self.nodes,
            pods=tuple(self.pods),
            objects=tuple(
                ObjectFact(kind, name, digest)
                if kind != "ExpertMap"
                else ObjectFact(
                    kind,
                    name,
                    digest,
                    status=self.map_status.get(name, {}),
                    spec=self.map_spec.get(name, {}),
                    version=digest_of(str(self.map_spec.get(name))),
                )
                for (kind, name), digest in self.objects.items()
            ),
            topologies=self.topologies,
            foreign=self.foreign,
            model=self.model,
            runtime=self.runtime(),
            put_generation=self.told.generation if self.told and self.coordinator_up else None,
        )

    def decision(self) -> Decision:
        return decide(self.wish, self.facts(), self.now)

    def step(self, *, crash_after: int | None = None) -> Decision:
        """One reconcile. With `crash_after` the operator dies after so many actions, before it writes status."""
        self.step_count += 1
        decision = self.decision()
        refused = []
        for action in decision.actions if crash_after is None else decision.actions[:crash_after]:
            if self.refuses(action):
                refused.append(RefusedAction(action, 403, "exceeded quota: few"))
            elif not refused:
                self.apply(action)
        if refused:
            decision = decide(self.wish, replace(self.facts(), refused=tuple(refused)), self.now)
        if crash_after is None or crash_after > len(decision.actions):
            self._write_status(decision)
        return decision

    def _write_status(self, decision: Decision) -> None:
        conditions = {c["type"]: c for c in self.wish.status.get("conditions", ())}
        for c in decision.conditions:
            conditions[c.type] = {"type": c.type, "status": c.status, "reason": str(c.reason), "message": c.message}
        status = {**decision.status, "conditions": list(conditions.values())}
        self.wish = replace(self.wish, status=status)

    def apply(self, action: Action) -> None:  # noqa: PLR0912 - one arm per action
        match action:
            case CreatePod():
                if any(p.name == action.name for p in self.pods):
                    return
                self.uids += 1
                self.pods.append(
                    PodFact(
                        name=action.name,
                        uid=f"uid-{self.uids}",
                        role=action.role,
                        index=action.index,
                        incarnation=action.incarnation,
                        phase="Pending",
                        gated=action.gated,
                        created_at=self.now,
                    )
                )
            case BindPod():
                self.change(action.uid, gated=False, node=action.node)
                self.ever_bound.append(action.uid)
            case DeletePod():
                pod = next((p for p in self.pods if p.uid == action.uid), None)
                if pod is not None and (pod.gated or pod.phase in ("Failed", "Succeeded")):
                    self.pods.remove(pod)
                elif pod is not None:
                    self.change(action.uid, deleting=True)
            case ApplyObject():
                self.objects[action.kind, action.name] = action.digest
                if action.kind == "ExpertMap":
                    self.map_spec[action.name] = action.manifest["spec"]
            case EnsureToken():
                self.objects["Secret", action.name] = ""
            case DeleteObject():
                self.objects.pop((action.kind, action.name), None)
            case ReportMap():
                self.map_status[action.name] = action.status
            case DeleteOwner():
                self.owner_deleted = True
            case PutWish():
                if self.coordinator_up and (self.told is None or action.wish.generation > self.told.generation):
                    self.told = action.wish
            case InjectFault():
                self.injected.append(action.request.pod_uid)

    def change(self, uid: str, **changes: Any) -> None:
        self.pods = [replace(p, **changes) if p.uid == uid else p for p in self.pods]

    def fail(self, uid: str, message: str) -> None:
        self.change(uid, phase="Failed", ready=False, message=message)

    def kill(self, rank: int) -> None:
        for pod in self.live(rank):
            self.change(pod.uid, phase="Failed", message="killed", ready=False)

    def tick(self, seconds: float = 1.0) -> None:
        """The kubelets start what is bound, end what is deleted; the runtime forms, joins, drops and takes the wish."""
        self.now += seconds
        names = [n.name for n in self.nodes]
        for pod in list(self.pods):
            if pod.deleting and not self.stuck_terminating:
                self.pods.remove(pod)
            elif pod.phase == "Pending" and not pod.gated and not pod.deleting:
                node = pod.node or (names[0] if names else None)
                if node in names:
                    self.change(pod.uid, phase="Running", ready=True, node=node)
        self._runtime_moves()

    def _runtime_moves(self) -> None:
        """As the real one: soft state dies with the coordinator, leavers drain, a new map waits for all it names."""
        running = {p.index: p.uid for p in self.ranks() if p.phase == "Running" and not p.deleting}
        up = next((p.uid for p in self.pods if p.role == ROLE_COORDINATOR and p.phase == "Running"), "")
        self.registered = set(running.values()) - self.mute if up and up == self.asked else set()
        self.asked = up
        before = dict(self.members), self.map_in_force
        self.members = {r: uid for r, uid in self.members.items() if running.get(r) == uid and uid not in self.mute}
        if not self.coordinator_up:
            self.told = None
        if self.told is not None:
            wished, wished_map = self.told.ranks, self.told.expert_map
            leavers = {uid for rank, uid in self.members.items() if rank not in wished}
            has_begun, self.draining = leavers <= self.draining, leavers
            known_map = self.map_in_force is not None and self.map_in_force.digest == wished_map.digest
            self.staged[wished_map.digest] = self.staged.get(wished_map.digest, -1) + 1
            is_staged = known_map or not self.members or self.staged[wished_map.digest] >= self.staging_ticks
            if has_begun and is_staged and all(running.get(rank) in self.registered for rank in wished):
                self.members, self.map_in_force, self.draining = {r: running[r] for r in wished}, wished_map, set()
            elif has_begun and known_map:
                self.members |= {r: running[r] for r in wished if running.get(r) in self.registered}
        self.epoch += (self.members, self.map_in_force) != before

    def settle(self, rounds: int = 60) -> int:
        """Reconcile and tick until nothing is done any more; the number of rounds it took."""
        quiet = 0
        for round_idx in range(rounds):
            done = self.step().actions
            self.tick()
            quiet = 0 if done else quiet + 1
            if quiet == 3:
                return round_idx
        raise AssertionError(f"not settled after {rounds} rounds: {self.decision().actions}")

    def condition(self, type_: str) -> tuple[str, str]:
        for condition in self.wish.status.get("conditions", ()):
            if condition["type"] == type_:
                return condition["status"], condition["reason"]
        raise AssertionError(f"no condition {type_} in {self.wish.status.get('conditions')}")

    def message(self, type_: str) -> str:
        return next(str(c["message"]) for c in self.wish.status["conditions"] if c["type"] == type_)


def make(kind: str, spec: Mapping[str, Any], nodes: Sequence[NodeFact] = (), **more: Any) -> Sim:
    wish = Wish(kind=kind, namespace="default", name="tiny", uid="owner", generation=1, spec=spec)  # type: ignore[arg-type]
    return Sim(wish=wish, nodes=tuple(nodes), **more)


def edit(sim: Sim, **changes: Any) -> None:
    sim.wish = replace(sim.wish, spec={**sim.wish.spec, **changes}, generation=sim.wish.generation + 1)


def service(ranks: int = 4, nodes: int = 6, **more: Any) -> Sim:
    return make("MoEService", service_spec(ranks, template=gpu_template(), **more), gpu_nodes(nodes))


def running(ranks: int = 4, nodes: int = 6, *, staging_ticks: int = 0, **more: Any) -> Sim:
    sim = service(ranks, nodes, **more)
    sim.staging_ticks = staging_ticks
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    return sim
