"""Expert capacity: how many of this rank's picks an expert takes in one step, and what becomes of those beyond.

    room of expert e = ceil(factor * picks wanted / E)          (GShard 2006.16668, Switch 2101.03961)

- Who keeps the room: the highest scores, or the first tokens (of the flattened batch).
- Drop: the pick is lost. Reroute: it goes to the token's next best expert with room, as long as there is one. Queue: it
  waits for a later pass of the same step; passes bound how many rows an expert holds at once (memory), and with enough
  of them nothing is lost.
- Weights: a pick weighs what it would if all were kept, so that what is dropped is missing from the sum (Switch: the
  residual carries the token); with `keep_sum` the kept ones are scaled up to the sum that there was.
- Adaptive: the same total room, split by the moving average of what all ranks' tokens want; no expert gets less than a
  quarter of the even share.
- Classes: each class of tokens (modality) has a part of every expert's room to itself.

Capacity is a matter of batches: where tokens do not compete (decoding) a token alone is never beyond it.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from moe_runtime.kernels.gate import TINY
from moe_runtime.router.face import NO_EXPERT, Moment, Tokens
from moe_runtime.router.picks import Picks, classes_of, count_picks, gather

LEAST_SHARE = 0.25
"""Of the even share: an expert that nobody wants keeps the room to be discovered."""


@dataclass(frozen=True, slots=True)
class Placed:
    """expert_TK after capacity (NO_EXPERT where dropped), and the fields of a Routing that follow from it."""

    expert_TK: torch.Tensor
    weight_TK: torch.Tensor
    counts: dict[str, int] = field(default_factory=dict)
    pass_TK: torch.Tensor | None = None
    passes: int = 1


class Capacity(torch.nn.Module):
    def __init__(
        self,
        *,
        num_experts: int,
        factor: float,
        first: Literal["Probs", "Position"] = "Probs",
        overflow: Literal["Drop", "Reroute", "Queue"] = "Drop",
        passes: int = 1,
        keep_sum: bool = False,
        decay: float | None = None,
        class_shares: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__()
        self.num_experts, self.factor, self.first, self.overflow = num_experts, factor, first, overflow
        self.passes, self.keep_sum, self.decay = passes if overflow == "Queue" else 1, keep_sum, decay
        self.register_buffer("class_share_C", torch.tensor(class_shares), persistent=False)
        self.class_share_C: torch.Tensor
        # what all ranks' tokens wanted of late, as shares; only an adaptive capacity keeps it
        even_E = torch.full((num_experts,), 1.0 / num_experts)
        self.register_buffer("wanted_share_E", even_E if decay is not None else None)
        self.wanted_share_E: torch.Tensor | None
        self._wanted_E: torch.Tensor | None = None

    @property
    def num_classes(self) -> int:
        return self.class_share_C.numel()

    def room(self, num_picks: int) -> torch.Tensor:
        """[E, C] int64: the picks that each expert takes of each class in one pass, of `num_picks` wanted."""
        share_E = self.class_share_C.new_full((self.num_experts,), 1.0 / self.num_experts)
        if self.wanted_share_E is not None:
            share_E = self.wanted_share_E.clamp_min(LEAST_SHARE / self.num_experts)
            share_E = share_E / share_E.sum()
        exact_EC = self.factor * num_picks * share_E[:, None].double() * self.class_share_C.double()
        return (exact_EC - 1e-6).ceil().long()  # 4.0000001 by rounding is 4

    def forward(self, picks: Picks, tokens: Tokens, moment: Moment) -> Placed:
        wanted_TK = picks.expert_TK
        if self.decay is not None:
            wanted_E = count_picks(wanted_TK, self.num_experts).float()
            self._wanted_E = wanted_E if moment.sum_over_ranks is None else moment.sum_over_ranks(wanted_E)
        num_wanted = int((wanted_TK != NO_EXPERT).sum())  # device sync: sizes the room
        room_EC = self.room(num_wanted)
        class_T = self._classes(tokens)
        score_TK = gather(picks.score_TE, wanted_TK, missing=float("-inf"))
        place_TK = self._place(wanted_TK, score_TK, class_T)
        room_TK = room_EC[wanted_TK.clamp_min(0), class_T[:, None]]
        kept_TK = (place_TK < room_TK * self.passes) & (wanted_TK != NO_EXPERT)
        expert_TK = wanted_TK.masked_fill(~kept_TK, NO_EXPERT)
        counts: dict[str, int] = {}
        pass_TK = None
        if self.overflow == "Queue":
            pass_TK = (place_TK // room_TK.clamp_min(1)).masked_fill(~kept_TK, 0)
            counts["queued"] = int((pass_TK > 0).sum())  # device sync
        elif self.overflow == "Reroute":
            expert_TK = _reroute(expert_TK, wanted_TK, picks.score_TE, room_EC, class_T, first=self.first)
            counts["rerouted"] = int(((expert_TK != wanted_TK) & (expert_TK != NO_EXPERT)).sum())  # device sync
        counts["dropped"] = num_wanted - int((expert_TK != NO_EXPERT).sum())  # device sync
        return Placed(expert_TK, self._weights(picks, expert_TK), counts, pass_TK, self.passes)

    def after_step(self, load_E: torch.Tensor) -> None:  # noqa: ARG002  what was wanted counts
        """`load_E` cannot show what was wanted beyond the room: the shares follow what the last forward saw wanted."""
        wanted_E, self._wanted_E = self._wanted_E, None
        if self.wanted_share_E is None or self.decay is None or wanted_E is None or not bool(wanted_E.any()):
            return
        self.wanted_share_E.mul_(self.decay).add_((1.0 - self.decay) * wanted_E / wanted_E.sum())

    def _classes(self, tokens: Tokens) -> torch.Tensor:
        if self.num_classes == 1:
            return torch.zeros(tokens.x_TD.shape[0], dtype=torch.int64, device=tokens.x_TD.device)
        return classes_of(tokens, self.num_classes)

    def _place(self, expert_TK: torch.Tensor, score_TK: torch.Tensor, class_T: torch.Tensor) -> torch.Tensor:
        """Each pick's place in its expert's (and class's) line, from 0."""
        key_TK = (expert_TK * self.num_classes + class_T[:, None]).masked_fill(expert_TK == NO_EXPERT, -1)
        return places(key_TK.reshape(-1), score_TK.reshape(-1) if self.first == "Probs" else None).view_as(expert_TK)

    def _weights(self, picks: Picks, expert_TK: torch.Tensor) -> torch.Tensor:
        full_TK = torch.where(expert_TK == NO_EXPERT, picks.expert_TK, expert_TK)
        full_weight_TK = picks.weigh(full_TK)
        weight_TK = full_weight_TK.masked_fill(expert_TK == NO_EXPERT, 0.0)
        if self.keep_sum:
            kept_T1 = weight_TK.sum(dim=-1, keepdim=True)
            weight_TK = weight_TK * full_weight_TK.sum(dim=-1, keepdim=True) / (kept_T1 + TINY)
        return weight_TK


def places(key_N: torch.Tensor, score_N: torch.Tensor | None) -> torch.Tensor:
    """Place of each element among those of its key, from 0: by score from the highest, of equals by index."""
    order_N = (
        torch.arange(key_N.numel(), device=key_N.device)
        if score_N is None
        else score_N.argsort(stable=True, descending=True)
    )
    order_N = order_N[key_N[order_N].argsort(stable=True)]
    sorted_N = key_N[order_N]
    start_N = torch.searchsorted(sorted_N, sorted_N)
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(key_N.numel(), device=key_N.device) - start_N)


def _reroute(
    expert_TK: torch.Tensor,
    wanted_TK: torch.Tensor,
    score_TE: torch.Tensor,
    room_EC: torch.Tensor,
    class_T: torch.Tensor,
    *,
    first: Literal["Probs", "Position"],
) -> torch.Tensor:
    """Rounds: each token with a homeless pick asks its best expert that has room and that it does not take already; an
    expert that is asked by more than it has room for takes the first of them. Every round fills a place, so they end.
    """
    num_experts, num_classes = room_EC.shape
    expert_TK = expert_TK.clone()
    taken_TE = torch.zeros_like(score_TE, dtype=torch.bool)
    taken_TE.scatter_(1, wanted_TK.clamp_min(0), wanted_TK != NO_EXPERT)
    key_TK = (expert_TK * num_classes + class_T[:, None]).masked_fill(expert_TK == NO_EXPERT, NO_EXPERT)
    left_EC = room_EC - count_picks(key_TK, num_experts * num_classes).view_as(room_EC)
    while True:
        homeless_TK = (expert_TK == NO_EXPERT) & (wanted_TK != NO_EXPERT)
        asking_T = homeless_TK.any(dim=-1).nonzero().flatten()
        open_Te = (left_EC.T > 0)[class_T[asking_T]] & ~taken_TE[asking_T]
        score_T, asked_T = score_TE[asking_T].masked_fill(~open_Te, float("-inf")).max(dim=-1)
        can_T = score_T > float("-inf")
        if not bool(can_T.any()):  # device sync: rounds depend on the data
            return expert_TK
        asking_T, asked_T, score_T = asking_T[can_T], asked_T[can_T], score_T[can_T]
        key_T = asked_T * num_classes + class_T[asking_T]
        gets_T = places(key_T, score_T if first == "Probs" else None) < left_EC.view(-1)[key_T]
        asking_T, asked_T, key_T = asking_T[gets_T], asked_T[gets_T], key_T[gets_T]
        pick_T = homeless_TK[asking_T].int().argmax(dim=-1)
        expert_TK[asking_T, pick_T] = asked_T
        taken_TE[asking_T, asked_T] = True
        left_EC.view(-1).sub_(torch.bincount(key_T, minlength=left_EC.numel()))
