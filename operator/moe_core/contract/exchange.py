"""The wish the operator puts and the state the coordinator answers with (HTTP, JSON, bearer token).

PUT  /v1/wish                       RuntimeWish            -> 204; an older generation -> 409
GET  /v1/state?after=V&wait_s=S     long poll              -> RuntimeState with version > V, or the same after S seconds
POST /v1/faults                     FaultRequest           -> 202; 403 when faults are not enabled
GET  /healthz, /metrics             no token
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from moe_core.contract.base import WireModel
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.links import Links
from moe_core.contract.step_time import StepTime


def _rectangular(rows: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    if len(lengths := sorted(set(map(len, rows)))) > 1:
        raise ValueError(f"rows must be of one length, there are {lengths[0]} to {lengths[-1]} experts in a layer")
    return rows


Load = Annotated[tuple[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], ...], AfterValidator(_rectangular)]
"""[L][E] tokens per logical expert; () for none."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RuntimeWish(WireModel):
    """What the operator wants of the running group. Idempotent; the highest generation wins."""

    generation: int = Field(ge=0)
    ranks: tuple[int, ...]
    """Rank ids that shall take part; a member not named here drains and leaves."""
    expert_map: ExpertMap
    dead_pod_uids: tuple[str, ...] = ()
    """Pods proven gone (process reaped, or removed by the API server): the coordinator may vouch for it."""
    newest_epoch: int = Field(default=0, ge=0)
    """The newest epoch the operator remembers: a coordinator that starts beside no living rank counts on from it."""
    load_window_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """How far back `RuntimeState.load` shall reach."""
    probe: int = Field(default=0, ge=0)
    """A number above the last one has the links between ranks measured again."""


RankPhase = Literal["Starting", "Loading", "Ready", "Active", "Draining", "Left", "Failed"]


class RankState(WireModel):
    rank: int
    pod_uid: str
    phase: RankPhase
    """Active: a committed member. Left: drained and out of the epoch, its pod may go."""
    memory_bytes: int = 0
    tokens: int = 0
    message: str = ""
    seconds_per_pick: Seconds = 0.0
    """Time that one token takes at one expert of this rank; 0 while it computed nothing."""


class Coverage(WireModel):
    """How many (layer, logical expert) pairs have a live copy under the committed membership."""

    covered: int
    total: int

    @property
    def is_full(self) -> bool:
        return self.covered == self.total


class TrainingProgress(WireModel):
    step: int
    max_steps: int | None = None
    loss: float | None = None
    heldout_bits_per_byte: float | None = None
    order2_bits_per_byte: float | None = None
    tokens_per_s: float = 0.0
    seconds: float = 0.0
    restored_from_step: int | None = None
    router_losses: dict[str, float] = Field(default_factory=dict)
    """Of the newest step, what the routers added to the text's loss, by name."""
    router_counts: dict[str, int] = Field(default_factory=dict)
    """Picks that a router of ours dropped, rerouted or queued, since the rank that tells started."""
    balancedness: float | None = None
    """Of the newest step."""
    done: bool = False
    checkpoint_path: str | None = None


class ServingProgress(WireModel):
    requests_ok: int = 0
    requests_failed: int = 0
    requests_replayed: int = 0
    tokens_out: int = 0
    degraded_tokens: dict[str, int] = Field(default_factory=dict)
    """Routed (token, expert) picks answered otherwise than by a live copy, by reason: generalist, drop."""


class Recovery(WireModel):
    """One fault as the ranks saw it; times are wall clock seconds since the Unix epoch."""

    epoch: int
    lost_ranks: tuple[int, ...]
    detected_at: float
    agreed_at: float
    rebuilt_at: float
    resumed_at: float


class RuntimeState(WireModel):
    version: int
    wish_put: int | None = None
    """Generation of the newest wish that this coordinator has taken; None after it restarted and was not told yet."""
    wish_generation: int | None = None
    """Generation of the wish that is fully in force (map applied, members as wished)."""
    epoch: int = 0
    map_digest: str = ""
    ranks: tuple[RankState, ...] = ()
    member_uids: tuple[str, ...] = ()
    """Pods of the committed members, those that do not report among them."""
    coverage: Coverage | None = None
    training: TrainingProgress | None = None
    serving: ServingProgress | None = None
    recoveries: tuple[Recovery, ...] = ()
    """The newest sixteen."""
    load: Load = ()
    """[L][E] tokens per logical expert over the last `load_window_s`; empty when none was recorded."""
    load_window_s: Seconds = 0.0
    """Seconds that `load` covers: less than was wished while the coordinator has not listened for so long."""
    seconds_per_pick: Seconds = 0.0
    """Time that one token takes at one expert, over all ranks since they started; 0 while nothing was computed."""
    pick_bytes: int = Field(default=0, ge=0)
    """What one token sends to one expert and gets back from it; 0 while no rank has loaded."""
    links: Links | None = None
    """As the ranks measured them last; None before they did."""
    expert_bytes: int = Field(default=0, ge=0)
    """One physical expert of one layer; 0 while no rank has loaded."""
    expert_packing: str = ""
    """How ranks keep their experts; empty while no rank has loaded, and in full."""
    wire_error: dict[str, Share] = Field(default_factory=dict)
    """Relative error of rows that travel in fewer bits, by leg (dispatch, combine, gradient), over all ranks."""
    step_time: StepTime | None = None
    """Of the newest steps, over all ranks together; None before the first."""
    failure: str = ""
    """A failure that no restart can mend, such as a model that cannot be loaded."""


class FaultRequest(WireModel):
    """A fault for a drill: kill (SIGKILL), hang (SIGSTOP)."""

    pod_uid: str
    fault: Literal["kill", "hang"]
