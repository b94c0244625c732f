"""What a router is given and what it answers; the face that a router of the user's own has, too.

A router scores the tokens of one rank in one MoE layer. It runs in float32 whatever the model's precision, and draws
from the generator it is given only, so that a step that is run again takes the same way.

    logits_TE = gate(router.before_gate(x_TD, moment))
    routing = router(Tokens(x_TD, logits_TE), moment)         # add routing.losses to the step's loss
    router.after_step(load_E)                                 # once the step is committed, on every rank alike

Suffixes: T tokens, D model, E logical experts, K picks of a token (a router may use more or fewer than the model's own
number), P rows that Soft MoE mixes for the experts, G groups of experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

NO_EXPERT = -1
"""In `expert_TK`: this pick is taken by nobody (dropped, or the token takes fewer than K)."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one forward on this rank, without padding.

    x_TD        what the experts will get
    logits_TE   float32, x times the gate's weight; None for a layer whose gate has none
    ids_T       token ids, where known (hash routing)
    sequence_T  which row of the batch each token belongs to, where known (losses per sequence, Soft MoE)
    position_T  place of each token in its sequence, where known (routes by position)
    class_T     small integers, e.g. modality, where known
    """

    x_TD: torch.Tensor
    logits_TE: torch.Tensor | None
    ids_T: torch.Tensor | None = None
    sequence_T: torch.Tensor | None = None
    position_T: torch.Tensor | None = None
    class_T: torch.Tensor | None = None


SumOverRanks = Callable[[torch.Tensor], torch.Tensor]
"""Takes float32 of any shape, gives the sum over all ranks; without a gradient. Every rank calls it equally often."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When: `progress` runs from 0 to 1 over a training run and is 1 when serving.

    scores_whole_texts   a batch of whole texts is scored at once: routers that look ahead route it as in training, and
                         what they tell of a token leaks what comes after it. Never true when serving.
    sum_over_ranks       for losses over the tokens of all ranks; None: this rank is alone
    """

    is_training: bool = False
    step: int = 0
    progress: float = 1.0
    generator: torch.Generator | None = None
    scores_whole_texts: bool = False
    sum_over_ranks: SumOverRanks | None = None

    @property
    def looks_at_batch(self) -> bool:
        """Whether tokens compete with each other. If not, each is routed as if it were alone, as decoding needs it."""
        return self.is_training or self.scores_whole_texts


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the experts lie as this rank sees it under the bound map; given anew at each epoch.

    distance_E   float32 >= 0: cost of sending a token to the nearest copy, 0 on this rank
    holds_GE     bool: which experts each group (a rank) holds a copy of; every expert is in some group
    domain_G     int64: the domain (node, rack) each group lies in, 0 being this rank's own; None where nobody knows
    """

    distance_E: torch.Tensor
    holds_GE: torch.Tensor
    domain_G: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class SoftRows:
    """Soft MoE: experts get mixtures of tokens, P = E * rows per expert, ordered by expert.

    rows = mix_TP^T x, output of token t = sum over P of share_TP[t, p] * expert(row p).
    """

    mix_TP: torch.Tensor
    share_TP: torch.Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """The answer.

    expert_TK, weight_TK   picks, NO_EXPERT where there is none (its weight is 0); weights float32 with a gradient
    probability_TE         what the balance losses look at: float32, with a gradient; None: no loss applies, as in
                           serving
    losses                 further terms of this layer by name, each a scalar already scaled by its coefficient; the
                           same names on all ranks in a step, as for counts
    counts                 plain numbers to report by name, e.g. picks dropped for capacity
    soft                   set by Soft MoE instead of picks (expert_TK is then empty, [T, 0])
    pass_TK                set by a queue: which of the `passes` of this step takes each pick; None: all in one
    passes                 at least 1; ranks make as many as the one that asks for most
    """

    expert_TK: torch.Tensor
    weight_TK: torch.Tensor
    probability_TE: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    soft: SoftRows | None = None
    pass_TK: torch.Tensor | None = None
    passes: int = 1


class Router(Protocol):
    """One MoE layer's router: a torch.nn.Module whose parameters are trained as dense ones."""

    looks_ahead: bool
    """Whether a token's picks depend on other tokens where `moment.looks_at_batch`: such a router leaks the future when
    a whole text is scored at once, and decodes otherwise than it was trained.
    """

    def before_gate(self, x_TD: torch.Tensor, moment: Moment) -> torch.Tensor:
        """What the gate is to see of the tokens (input jitter)."""

    def __call__(self, tokens: Tokens, moment: Moment) -> Routing:
        """Raises InvalidInput when the tokens lack what this router needs."""

    def use_layout(self, layout: Layout) -> None:
        """Once per epoch."""

    def after_step(self, load_E: torch.Tensor) -> None:
        """The step is committed; load_E [E] int64: picks of all ranks' tokens in this layer. For state that no gradient
        moves (the bias of auxiliary-loss-free balancing): a buffer, the same on all ranks afterwards.
        """
