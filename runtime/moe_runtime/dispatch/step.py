"""What all MoE layers of a rank share during one step, and what the step leaves behind when it commits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from moe_core.contract.dispatch import Hierarchy, Overlap
from moe_core.experts.choice import WAYS
from moe_runtime.dispatch.by_node import Relay
from moe_runtime.dispatch.group_face import Group
from moe_runtime.dispatch.plan import DispatchPlan
from moe_runtime.dispatch.stopwatch import Stopwatch
from moe_runtime.dispatch.wire import Legs
from moe_runtime.kernels.map_count import map_and_count


@dataclass(slots=True)
class StepContext:
    """Set by the model before each forward, read by its MoE layers.

    plan, group          of the bound epoch; group None: this rank is alone
    valid_V              flat indices of the tokens that are no padding, None when all are
    tokens_of_position   valid tokens per position of this step, None when the ranks have not told each other
    pending_LE           picks counted since the last commit or rollback, [L, E] int64
    routed               (layer, expert_TK) since the last commit or rollback, where somebody records it, else None
    degraded_T           which of the step's flat tokens met a lost expert (None: none did)
    first_way            of the next forward's first token: steps of few tokens go on where the last one ended
    experts_off          the routed experts give zeros and exchange nothing
    stopwatch            time that this rank's experts take, over all steps
    legs                 what rows are while they travel
    overlap              whether one half of the tokens travels while the other half's experts compute
    hierarchy, relay     what was asked for, and who passes tokens on in this epoch; None: nobody does
    """

    plan: DispatchPlan
    group: Group | None
    num_experts: int
    valid_V: torch.Tensor | None = None
    tokens_of_position: tuple[int, ...] | None = None
    num_tokens: int = 0
    pending_LE: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    routed: list[tuple[int, torch.Tensor]] | None = None
    degraded_T: torch.Tensor | None = None
    first_way: int = 0
    experts_off: bool = False
    stopwatch: Stopwatch = field(default_factory=lambda: Stopwatch("cpu"))
    legs: Legs = field(default_factory=Legs)
    hierarchy: Hierarchy = "Auto"
    overlap: Overlap = "OneBatch"
    relay: Relay | None = None

    def address(self, layer_idx: int, expert_TK: torch.Tensor, *, may_be_nobody: bool = False) -> torch.Tensor:
        """[T, K] where each pick goes; the picks are counted and recorded.

        may_be_nobody: negative ids stand among the picks; they count for none and stay at home as the lost do.
        """
        if self.routed is not None:
            self.routed.append((layer_idx, expert_TK))
        return map_and_count(
            expert_TK,
            self.plan.layers[layer_idx].address_WE,
            first_way=self.first_way,
            load_E=self.pending_LE[layer_idx],
            may_be_nowhere=may_be_nobody,
        )

    def mark_degraded(self, layer_idx: int, expert_TK: torch.Tensor, *, of_tokens: bool = True) -> None:
        """`of_tokens`: a row of picks is a token's; else every token has a share in every row."""
        lost_E = torch.zeros(self.num_experts, dtype=torch.bool, device=expert_TK.device)
        lost_E[list(self.plan.layers[layer_idx].lost)] = True
        hit_V = (lost_E[expert_TK] & (expert_TK >= 0)).any(dim=-1)
        if not of_tokens:
            hit_V = hit_V.any().expand(self.num_tokens if self.valid_V is None else len(self.valid_V))
        if self.valid_V is None:
            hit_T = hit_V
        else:
            hit_T = torch.zeros(self.num_tokens, dtype=torch.bool, device=hit_V.device)
            hit_T[self.valid_V] = hit_V
        self.degraded_T = hit_T if self.degraded_T is None else self.degraded_T | hit_T

    @contextmanager
    def running(
        self, valid_V: torch.Tensor | None, num_tokens: int, tokens_of_position: tuple[int, ...] | None
    ) -> Iterator[None]:
        """One forward. Later ones (training, evaluation) have no padding and tell each other nothing."""
        self.valid_V, self.num_tokens, self.tokens_of_position = valid_V, num_tokens, tokens_of_position
        self.degraded_T = None
        try:
            yield
        finally:
            self.first_way = (self.first_way + (num_tokens if valid_V is None else len(valid_V))) % WAYS
            self.valid_V, self.tokens_of_position = None, None

    @contextmanager
    def without_experts(self) -> Iterator[None]:
        """Forwards of the dense layers alone, on this rank alone."""
        group, self.group, self.experts_off = self.group, None, True
        try:
            yield
        finally:
            self.group, self.experts_off = group, False
