"""One layer's router: a kind that picks, then capacity, then losses."""

from dataclasses import dataclass, field

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.capacity import Capacity, Placed
from moe_runtime.router.face import Layout, Moment, Routing, Tokens
from moe_runtime.router.losses import (
    SteeredCoefficient,
    entropy_loss,
    importance_loss,
    sequence_loss,
    switch_loss,
    z_loss,
)
from moe_runtime.router.noise import jitter
from moe_runtime.router.picks import Kind, Picks


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Coefficients, by name, of the losses that any kind can have; scope (of `aux`) is an option's value."""

    scope: str = "AuxLoss"
    coefficients: dict[str, float] = field(default_factory=dict)
    target: float | None = None
    rate: float = 0.0


class LayerRouter(torch.nn.Module):
    """See `face.Router`. Without capacity nothing is dropped."""

    def __init__(
        self, kind: Kind, *, losses: LossTerms | None = None, capacity: Capacity | None = None, jitter_eps: float = 0.0
    ) -> None:
        super().__init__()
        self.kind, self.capacity, self.jitter_eps = kind, capacity, jitter_eps
        self.terms = losses or LossTerms()
        self.aux = SteeredCoefficient(
            self.terms.coefficients.get("aux", 0.0), target=self.terms.target, rate=self.terms.rate
        )
        self.looks_ahead = kind.looks_ahead or capacity is not None

    def before_gate(self, x_TD: torch.Tensor, moment: Moment) -> torch.Tensor:
        return jitter(x_TD, self.jitter_eps, moment) if self.jitter_eps and moment.is_training else x_TD

    def forward(self, tokens: Tokens, moment: Moment) -> Routing:
        picks: Picks = self.kind(tokens, moment)
        if self.capacity is not None and moment.looks_at_batch:
            placed: Placed = self.capacity(picks, tokens, moment)
        else:
            placed = Placed(picks.expert_TK, picks.weigh(picks.expert_TK))
        return Routing(
            expert_TK=placed.expert_TK,
            weight_TK=placed.weight_TK,
            probability_TE=picks.probability_TE if moment.is_training else None,
            losses=picks.losses | (self._losses(picks, tokens, moment) if moment.is_training else {}),
            counts=picks.counts | placed.counts,
            soft=picks.soft,
            pass_TK=placed.pass_TK,
            passes=placed.passes,
        )

    def use_layout(self, layout: Layout) -> None:
        self.kind.use_layout(layout)

    def after_step(self, load_E: torch.Tensor) -> None:
        with torch.no_grad():
            self.kind.after_step(load_E)
            self.aux.after_step(load_E)
            if self.capacity is not None:
                self.capacity.after_step(load_E)

    def _losses(self, picks: Picks, tokens: Tokens, moment: Moment) -> dict[str, torch.Tensor]:
        """Over what tokens wanted: a pick that capacity drops still shows where load is too high."""
        coefficients, losses = self.terms.coefficients, {}
        if coefficients.get("aux") and picks.probability_TE is not None:
            losses["aux"] = self.aux(self._aux(picks.probability_TE, picks.expert_TK, tokens, moment))
        if coefficients.get("importance"):
            weight_TK, num_experts = picks.weigh(picks.expert_TK), picks.score_TE.shape[-1]
            losses["importance"] = coefficients["importance"] * importance_loss(weight_TK, picks.expert_TK, num_experts)
        if coefficients.get("z") and picks.logits_TE is not None:
            losses["z"] = coefficients["z"] * z_loss(picks.logits_TE)
        if coefficients.get("entropy") and picks.probability_TE is not None:
            losses["entropy"] = coefficients["entropy"] * entropy_loss(picks.probability_TE)
        return losses

    def _aux(
        self, probability_TE: torch.Tensor, expert_TK: torch.Tensor, tokens: Tokens, moment: Moment
    ) -> torch.Tensor:
        if self.terms.scope == "SeqAuxLoss":
            if tokens.sequence_T is None:
                raise InvalidInput("a balance loss per sequence needs sequence_T (got None)")
            return sequence_loss(probability_TE, expert_TK, tokens.sequence_T)
        everywhere = moment.sum_over_ranks if self.terms.scope == "GlobalAuxLoss" else None
        return switch_loss(probability_TE, expert_TK, sum_over_ranks=everywhere)
