"""What the shells observe and what they are told to do: the vocabulary of `decide`.

Facts are plain frozen values without a clock; times are seconds since the Unix epoch, given by the shell.
Actions are idempotent: a shell killed between any two of them recovers by observing again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_core.contract.exchange import FaultRequest, RuntimeState, RuntimeWish
from moe_core.contract.packing import Packing
from moe_core.outcome import Reason

FOREIGN = 409
Kind = Literal["MoEJob", "MoEService", "MoEDrill"]


@dataclass(frozen=True, slots=True)
class Taint:
    key: str
    value: str = ""
    effect: str = "NoSchedule"


@dataclass(frozen=True, slots=True)
class NodeFact:
    """allocatable and used are in base units: cpu in millicores, memory in bytes, devices and pods in counts.

    `used` counts everything bound to the node except this owner's own pods.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    allocatable: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[str, int] = field(default_factory=dict)
    ready: bool = True
    not_ready_since: float | None = None
    """When the node stopped being ready; None while it is, or when that is unknown (then it counts as long ago)."""
    unschedulable: bool = False
    taints: tuple[Taint, ...] = ()


@dataclass(frozen=True, slots=True)
class PodFact:
    name: str
    uid: str
    role: str
    index: int
    """Rank id for ranks, ordinal for gateways, 0 for the coordinator."""
    incarnation: int
    phase: Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"]
    ready: bool = False
    gated: bool = False
    node: str | None = None
    """Bound node, or the node our nodeSelector names while the pod waits to be scheduled."""
    scheduled: bool = True
    """False while only our nodeSelector names the node: the scheduler may still find it closed."""
    deleting: bool = False
    created_at: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class ObjectFact:
    """An owned object that is not a pod, with the digest of what was last applied.

    Of an ExpertMap only: its spec and status, and `version`, which names the spec among all that it has had.
    """

    kind: str
    name: str
    digest: str
    status: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True, slots=True)
class Wish:
    """One custom resource. `spec` is the raw mapping; decide parses it, so that a bad spec becomes a condition."""

    kind: Kind
    namespace: str
    name: str
    uid: str
    generation: int
    spec: Mapping[str, Any]
    status: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    deleting: bool = False


@dataclass(frozen=True, slots=True)
class ModelFact:
    """What the shell can read of a checkpoint (its config.json), if it can reach it at all."""

    num_experts: int
    num_moe_layers: int
    family: str
    problem: str = ""
    packing: Packing | None = None
    """How its experts are packed; None: not at all."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything observed about one wish. `topologies`: name of a ClusterTopology -> its (name, nodeLabel) levels."""

    nodes: tuple[NodeFact, ...] = ()
    pods: tuple[PodFact, ...] = ()
    objects: tuple[ObjectFact, ...] = ()
    foreign: tuple[str, ...] = ()
    """`Kind/name` of objects that bear a child's name and belong to somebody else."""
    topologies: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    model: ModelFact | None = None
    runtime: RuntimeState | None = None
    """None while no coordinator answers."""
    put_generation: int | None = None
    """Generation of the wish that the coordinator last took, None when unknown."""
    refused: tuple["RefusedAction", ...] = ()
    """Actions decided on these very facts that were not accepted; empty before any of them was tried."""
    target: "TargetFact | None" = None
    """For a MoEDrill: what it aims at."""
    local: bool = False
    """The local shell: one machine, addresses are loopback, ports must be given by the shell."""
    network: "NetworkFact | None" = None
    """None where no NetworkPolicy is to be made: a machine alone, or an operator that was told not to."""
    default_image: str = ""
    """Image of the runtime for templates that name none."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """Local shell only: free ports by use (coordinator, ray, gateway)."""


@dataclass(frozen=True, slots=True)
class NetworkFact:
    """Who outside a group must reach its pods."""

    operator_namespace: str
    metrics_namespaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TargetFact:
    wish: Wish
    pods: tuple[PodFact, ...]
    runtime: RuntimeState | None


@dataclass(frozen=True, slots=True)
class ApplyObject:
    """Server-side apply of an owned ConfigMap, Service or ExpertMap; the shell adds owner and namespace."""

    kind: str
    name: str
    digest: str
    manifest: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EnsureToken:
    """Create the Secret with a fresh random token if there is none; the shell draws it, the brain has no randomness."""

    name: str


@dataclass(frozen=True, slots=True)
class CreatePod:
    """Created behind our scheduling gate when `gated`; manifest is a whole v1 Pod without owner, namespace and uid."""

    name: str
    role: str
    index: int
    incarnation: int
    gated: bool
    manifest: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BindPod:
    """Add nodeSelector kubernetes.io/hostname=node and remove our own gate in one patch, only on this very uid."""

    name: str
    uid: str
    node: str


@dataclass(frozen=True, slots=True)
class DeletePod:
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class DeleteObject:
    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class ReportMap:
    """Write the status of an owned ExpertMap, as a whole."""

    name: str
    status: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DeleteOwner:
    """The custom resource itself (ttlSecondsAfterFinished)."""

    uid: str


@dataclass(frozen=True, slots=True)
class PutWish:
    wish: RuntimeWish


@dataclass(frozen=True, slots=True)
class InjectFault:
    request: FaultRequest


Action = (
    ApplyObject
    | EnsureToken
    | CreatePod
    | BindPod
    | DeletePod
    | DeleteObject
    | ReportMap
    | DeleteOwner
    | PutWish
    | InjectFault
)


@dataclass(frozen=True, slots=True)
class RefusedAction:
    """An action that the API server or the coordinator does not accept; a retry alone will not help.

    `code` is the HTTP status: 403 forbidden or over quota, 422 invalid, FOREIGN where the object is somebody else's.
    `message` is the server's own.
    """

    action: Action
    code: int
    message: str

    @property
    def is_foreign(self) -> bool:
        return self.code == FOREIGN


@dataclass(frozen=True, slots=True)
class Condition:
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Event:
    """Emitted only on a transition; the shell posts it as it is."""

    type: Literal["Normal", "Warning"]
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Decision:
    """`status` is the whole new status but for conditions: those are merged by type, times move on a flip only."""

    actions: tuple[Action, ...] = ()
    conditions: tuple[Condition, ...] = ()
    status: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    wake_in: float | None = None
