"""What a router's first stage gives to those after it: who was chosen, and how any other choice would weigh.

Do not confuse with `face.Routing`, which is what leaves the router once capacity and losses have had their say.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import NO_EXPERT, Layout, Moment, SoftRows, Tokens


@dataclass(frozen=True, slots=True)
class Picks:
    """expert_TK        the choice; NO_EXPERT where a token takes fewer
    score_TE         float32 without gradient: what tokens compete by; -inf where an expert is out of a token's reach
    weigh            weight_TK of any choice [T, K], 0 at NO_EXPERT, with a gradient
    probability_TE   for the balance losses; None: none applies
    logits_TE        for the z-loss; None: none applies
    """

    expert_TK: torch.Tensor
    score_TE: torch.Tensor
    weigh: Callable[[torch.Tensor], torch.Tensor]
    probability_TE: torch.Tensor | None = None
    logits_TE: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    soft: SoftRows | None = None


class Kind(torch.nn.Module):
    """A kind of router: tokens to picks."""

    looks_ahead = False

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        raise NotImplementedError

    def use_layout(self, layout: Layout) -> None:
        """Most kinds do not care where experts lie."""

    def after_step(self, load_E: torch.Tensor) -> None:
        """Most kinds learn by gradients alone."""


def logits_of(tokens: Tokens, num_experts: int) -> torch.Tensor:
    """[T, E] float32 or wider. Raises InvalidInput when the layer has no gate or another number of experts."""
    logits_TE = tokens.logits_TE
    if logits_TE is None:
        raise InvalidInput("this router chooses by the gate's logits, and this layer has no gate")
    if logits_TE.ndim != 2 or logits_TE.shape != (tokens.x_TD.shape[0], num_experts):
        raise InvalidInput(
            f"logits must be [{tokens.x_TD.shape[0]} tokens, {num_experts} experts] (got {list(logits_TE.shape)})"
        )
    return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))


def ids_of(tokens: Tokens, vocab_size: int) -> torch.Tensor:
    """[T] token ids. Raises InvalidInput when nobody said them, or one is none of the vocabulary's."""
    if tokens.ids_T is None:
        raise InvalidInput("a route by token id needs ids_T (got None)")
    return _below(tokens.ids_T, vocab_size, "token ids")


def classes_of(tokens: Tokens, num_classes: int) -> torch.Tensor:
    """[T] int64. Raises InvalidInput when nobody said them, or one is none of the classes."""
    if tokens.class_T is None:
        raise InvalidInput(f"a router of {num_classes} classes of tokens needs class_T (got None)")
    return _below(tokens.class_T, num_classes, "classes").long()


def _below(number_T: torch.Tensor, count: int, what: str) -> torch.Tensor:
    if number_T.numel():
        low, high = int(number_T.min()), int(number_T.max())  # device sync
        if low < 0 or high >= count:
            raise InvalidInput(f"{what} run from 0 to {count - 1} (got {low} to {high})")
    return number_T


def gather(values_TE: torch.Tensor, expert_TK: torch.Tensor, *, missing: float) -> torch.Tensor:
    """values_TE at each pick, `missing` at NO_EXPERT."""
    picked_TK = values_TE.gather(1, expert_TK.clamp_min(0))
    return picked_TK.masked_fill(expert_TK == NO_EXPERT, missing)


def count_picks(expert_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E] int64 picks of each expert."""
    flat_N = expert_TK.reshape(-1)
    return torch.bincount(flat_N[flat_N != NO_EXPERT], minlength=num_experts)
