"""What ranks and gateways tell the coordinator, and what they get back. Inside the runtime only; JSON, bearer token.

POST /v1/register   RankReport -> Directive; held back for up to `wait_s` while the directive the caller has seen is
                    still the newest, so that a change reaches every rank at once
POST /v1/gateways   GatewayReport -> MembersView

The coordinator keeps nothing else: a new one knows everything again after one round of reports.
"""

from pydantic import Field

from moe_core.contract.base import WireModel
from moe_core.contract.exchange import Coverage, Load, RankPhase, Recovery, Seconds, Share, TrainingProgress
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.links import Link
from moe_core.contract.membership import Member, Membership
from moe_core.contract.step_time import StepTime


class RankReport(WireModel):
    member: Member
    phase: RankPhase
    membership: Membership | None = None
    """Committed membership as this rank knows it; None before its first epoch."""
    staged_digest: str = ""
    """Digest of the map whose slots this rank has in memory and could use at the next boundary."""
    applied_digest: str = ""
    memory_bytes: int = 0
    tokens: int = 0
    message: str = ""
    degraded_tokens: dict[str, int] = Field(default_factory=dict)
    coverage: Coverage | None = None
    recoveries: tuple[Recovery, ...] = ()
    load: Load = ()
    """[L][E]; empty when there is none newer than what this rank said last."""
    training: TrainingProgress | None = None
    failure: str = ""
    digest_mismatches: int = 0
    """Copies of experts that were not what they should be."""
    dispatch_bytes: dict[str, int] = Field(default_factory=dict)
    """Sent by dispatch and combine, by scope: self, host, network."""
    wire_error: dict[str, Share] = Field(default_factory=dict)
    """Relative error of what dispatch, combine and gradients sent in fewer bits; nothing for what went as it is."""
    pick_bytes: int = Field(default=0, ge=0)
    """What one token sends to one expert and gets back from it."""
    links: tuple[Link, ...] = ()
    """From this rank to those that it measured last, itself included."""
    step_time: StepTime = StepTime()
    """Of all steps of this rank."""
    recent_step_time: StepTime = StepTime()
    moved_bytes: int = 0
    """Of experts that new maps have brought to this rank."""
    expert_seconds: Seconds = 0.0
    expert_rows: int = Field(default=0, ge=0)
    """Rows that went through this rank's experts, and the time that took."""
    expert_bytes: int = Field(default=0, ge=0)
    """One physical expert of one layer."""
    expert_packing: str = ""
    """How this rank keeps its experts; empty in full."""
    directive_seen: str = ""
    wait_s: float = 0.0


class GatewayReport(WireModel):
    pod_uid: str
    requests_ok: int = 0
    requests_failed: int = 0
    requests_replayed: int = 0
    tokens_out: int = 0


class Directive(WireModel):
    """What every rank shall make true. The same for all; `seal` names its content."""

    expert_map: ExpertMap | None = None
    """The map to have staged."""
    plan: Membership | None = None
    """The next membership, to be committed at the first boundary where every current member is ready for it."""
    vouched_dead: tuple[str, ...] = ()
    """Pods that are proven gone."""
    ranks: tuple[int, ...] = ()
    """Rank ids that are wished; a rank not named here leaves."""
    is_first: bool = False
    """The plan is a first epoch, to be formed; else it is a change of the committed one."""
    newest_epoch: int = 0
    """The newest epoch seen anywhere: an older rank may not go on by vouching."""
    probe: int = 0
    """Ranks that have measured their links for a lower number do so again."""
    load_every_s: float = 10.0
    """How often a rank tells its load: 61 layers x 256 experts are 80 kB of text, the rest of a report 8 (72 ranks)."""

    @property
    def seal(self) -> str:
        rest = f"{self.vouched_dead}{self.ranks}{self.is_first}{self.newest_epoch}.{self.load_every_s}.{self.probe}"
        map_seal = "" if self.expert_map is None else f"{self.expert_map.generation}.{self.expert_map.digest}"
        plan_seal = "" if self.plan is None else self.plan.canonical()
        return f"{map_seal}|{plan_seal}|{rest}"


class RankView(WireModel):
    rank: int
    pod_uid: str
    phase: RankPhase


class MembersView(WireModel):
    epoch: int
    ranks: tuple[RankView, ...]
    covered: int = 0
    total: int = 0
