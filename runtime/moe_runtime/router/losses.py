"""Losses that keep the experts' load even and the gate's logits small. Each is a float32 scalar with a gradient.

All are means over tokens or invariant to their number, and 1 (balance losses) or 0 (variation) when load is even.
"""

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import NO_EXPERT, SumOverRanks
from moe_runtime.router.picks import count_picks


def switch_loss(
    probability_TE: torch.Tensor, expert_TK: torch.Tensor, *, sum_over_ranks: SumOverRanks | None = None
) -> torch.Tensor:
    """E * sum over experts of (share of picks) * (mean probability) (Switch Transformer, 2101.03961, eq. 4).

    With `sum_over_ranks` the shares are those of all ranks' tokens, so that the mean of the ranks' losses is the loss
    of the global batch (2501.11873), and experts may specialise by rank.
    """
    num_experts = probability_TE.shape[-1]
    count_E = count_picks(expert_TK, num_experts).float()
    if sum_over_ranks is not None:
        count_E = sum_over_ranks(count_E)
    share_E = count_E / count_E.sum().clamp_min(1.0)
    # the sum over no tokens is 0 with a gradient; their mean would be NaN
    mean_E = probability_TE.sum(dim=0) / max(1, probability_TE.shape[0])
    return num_experts * (share_E * mean_E).sum()


def sequence_loss(probability_TE: torch.Tensor, expert_TK: torch.Tensor, sequence_T: torch.Tensor) -> torch.Tensor:
    """`switch_loss` of each sequence, averaged over sequences (DeepSeek-V3, 2412.19437, eq. 17-20)."""
    num_experts = probability_TE.shape[-1]
    tokens_R = torch.bincount(sequence_T)
    num_rows = tokens_R.numel()
    key_TK = (sequence_T[:, None] * num_experts + expert_TK).masked_fill(expert_TK == NO_EXPERT, NO_EXPERT)
    count_RE = count_picks(key_TK, num_rows * num_experts).view(num_rows, num_experts).float()
    share_RE = count_RE / count_RE.sum(dim=-1, keepdim=True).clamp_min(1.0)
    sum_RE = probability_TE.new_zeros(num_rows, num_experts).index_add(0, sequence_T, probability_TE)
    loss_R = num_experts * (share_RE * sum_RE).sum(dim=-1) / tokens_R.clamp_min(1)
    return loss_R.sum() / (tokens_R > 0).sum().clamp_min(1)


def squared_variation(amount_E: torch.Tensor) -> torch.Tensor:
    """Variance over squared mean: 0 when all are equal (Shazeer 2017, 1701.06538, eq. 7); 0 when all are 0."""
    mean = amount_E.mean()
    return amount_E.var(correction=0) / (mean.square() + 1e-10)


def importance_loss(weight_TK: torch.Tensor, expert_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Variation of the experts' summed weights."""
    taken_TK = expert_TK.clamp_min(0)  # weights of picks that are none are 0
    summed_E = weight_TK.new_zeros(num_experts).index_add(0, taken_TK.reshape(-1), weight_TK.reshape(-1))
    return squared_variation(summed_E)


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean of the squared logarithm of the softmax's denominator (ST-MoE, 2202.08906, eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().sum() / max(1, logits_TE.shape[0])


def entropy_loss(probability_TE: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the tokens' probabilities, in nats (Huang 2024, 2403.07652)."""
    entropy: torch.Tensor = torch.special.entr(probability_TE).sum()
    return entropy / max(1, probability_TE.shape[0])


class SteeredCoefficient(torch.nn.Module):
    """A coefficient that follows balancedness: up by `rate` after a step below the target, down after one above it.

    Balancedness of a step is mean over max of load_E. target None: the coefficient stays as it is. The factor stays
    within [1/1000, 1000], so that no long run of one kind makes it numb to the other.
    """

    def __init__(self, coefficient: float, *, target: float | None = None, rate: float = 0.0) -> None:
        super().__init__()
        if target is not None and not (0.0 < target < 1.0 and rate > 0.0):
            raise InvalidInput(f"target must lie between 0 and 1, rate be positive (got {target}, {rate})")
        self.coefficient, self.target, self.rate = coefficient, target, rate
        self.factor: torch.Tensor
        self.register_buffer("factor", torch.ones(()), persistent=target is not None)

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.factor * self.coefficient

    def after_step(self, load_E: torch.Tensor) -> None:
        if self.target is None:
            return
        most = int(load_E.max())  # device sync: once per step and layer
        if most == 0:
            return
        balancedness = float(load_E.sum()) / (load_E.numel() * most)
        step = 1.0 + self.rate if balancedness < self.target else 1.0 / (1.0 + self.rate)
        self.factor.mul_(step).clamp_(1e-3, 1e3)
