"""What each expert is asked, sampled so that every expert is reached.

Routing is uneven, and a sample of text is more so: the experts that a text hardly takes would be packed on a few rows.
Every expert therefore keeps equally many of its own rows, drawn evenly from all that came (Vitter 1985), and text is
read until each has enough. An expert that stays short is given rows of the layer's other tokens, which count less: it
might be asked them another time. Balanced sampling and rows that count by their routing weight: MoEQuant (Chen et al.
2025, arXiv 2505.03804).

Suffixes: T tokens, K picks of a token, D model, E logical experts, N rows of one expert.
"""

from dataclasses import dataclass

import torch

FOREIGN_WEIGHT = 0.1
"""Of a row that was not routed here, against the layer's mean."""


@dataclass(frozen=True, slots=True)
class Rows:
    """count_N: what an error at each row counts, the square of its routing weight. num_own: the rest is foreign."""

    x_ND: torch.Tensor
    count_N: torch.Tensor
    num_own: int


class LayerSample:
    """One layer's rows, at most `rows_per_expert` each; float32 on the CPU."""

    def __init__(self, num_experts: int, *, rows_per_expert: int, seed: int) -> None:
        self._most = rows_per_expert
        self._generator = torch.Generator().manual_seed(seed)
        self._kept = [_Reservoir(rows_per_expert) for _ in range(num_experts)]
        self._everybodys = _Reservoir(rows_per_expert)

    def add(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> None:
        """Picks of nobody (-1) are left out."""
        x_TD, weight_TK = x_TD.detach().float().cpu(), weight_TK.detach().float().cpu()
        expert_TK = expert_TK.cpu()
        self._everybodys.add(x_TD, weight_TK.mean(dim=1), self._generator)
        for logical_id, kept in enumerate(self._kept):
            token_N, k_N = torch.nonzero(expert_TK == logical_id, as_tuple=True)
            kept.add(x_TD[token_N], weight_TK[token_N, k_N], self._generator)

    @property
    def seen_E(self) -> list[int]:
        """Rows that each expert was really asked."""
        return [kept.num_seen for kept in self._kept]

    def rows_of(self, logical_id: int) -> Rows:
        """In no order that tells which came first. Never fewer than were seen by anybody, up to `rows_per_expert`."""
        own, others = self._kept[logical_id], self._everybodys
        x_ND, count_N = own.x_ND, own.weight_N.square()
        lacking = min(self._most, others.num_seen) - own.num_kept
        if lacking > 0:
            foreign_N = (FOREIGN_WEIGHT * others.weight_N[:lacking].mean()).square().expand(lacking)
            x_ND = others.x_ND[:lacking] if not own.num_kept else torch.cat([x_ND, others.x_ND[:lacking]])
            count_N = torch.cat([count_N, foreign_N])
        order_N = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(logical_id))
        return Rows(x_ND[order_N], count_N[order_N], own.num_kept)


class _Reservoir:
    """An even draw of `most` rows from all that were added: those with the largest of random keys."""

    def __init__(self, most: int) -> None:
        self._most, self.num_seen = most, 0
        self.x_ND, self.weight_N, self._key_N = torch.zeros(0, 0), torch.zeros(0), torch.zeros(0)

    @property
    def num_kept(self) -> int:
        return len(self.weight_N)

    def add(self, x_ND: torch.Tensor, weight_N: torch.Tensor, generator: torch.Generator) -> None:
        if not len(x_ND):
            return
        self.num_seen += len(x_ND)
        key_N = torch.rand(len(x_ND), generator=generator)
        if self.num_kept:
            x_ND = torch.cat([self.x_ND, x_ND])
            weight_N, key_N = torch.cat([self.weight_N, weight_N]), torch.cat([self._key_N, key_N])
        largest_N = key_N.topk(min(self._most, len(key_N))).indices
        self.x_ND, self.weight_N, self._key_N = x_ND[largest_N], weight_N[largest_N], key_N[largest_N]
