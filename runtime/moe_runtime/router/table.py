"""Routes without a gate: by token id (hash layers, Roller 2021, 2106.04426) or by place in the sequence.

Random: K experts per id drawn once. Balanced: ids are dealt out by falling count, each to the experts that have the
fewest tokens so far, so that load is as even as the counts allow. By position: place p takes experts pK, pK + 1, ...
(mod E). Picks weigh 1 / K; there is nothing to learn and no balance loss.

Tables belong to the weights: they are saved with them, and a router whose table was never built waits for it.
"""

import heapq

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import NO_EXPERT, Moment, Tokens
from moe_runtime.router.noise import seeded
from moe_runtime.router.picks import Kind, Picks, ids_of


class Hash(Kind):
    """table_VK None: to be loaded."""

    def __init__(self, *, num_experts: int, top_k: int, vocab_size: int, table_VK: torch.Tensor | None) -> None:
        super().__init__()
        self.num_experts = num_experts
        empty_VK = torch.full((vocab_size, top_k), NO_EXPERT)
        self.register_buffer("table_VK", empty_VK if table_VK is None else table_VK)
        self.table_VK: torch.Tensor

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:  # noqa: ARG002  the same at all times
        expert_TK = self.table_VK[ids_of(tokens, len(self.table_VK))]
        if bool((expert_TK == NO_EXPERT).any()):  # device sync
            raise InvalidInput("the table of routes was neither built from token counts nor loaded with the weights")
        return by_table(expert_TK, tokens, self.num_experts)


class ByPosition(Kind):
    def __init__(self, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:  # noqa: ARG002  the same at all times
        if tokens.position_T is None:
            raise InvalidInput("a route by position needs position_T (got None)")
        first_T1 = tokens.position_T.long()[:, None] * self.top_k
        picks_K = torch.arange(self.top_k, device=first_T1.device)
        return by_table((first_T1 + picks_K) % self.num_experts, tokens, self.num_experts)


def by_table(expert_TK: torch.Tensor, tokens: Tokens, num_experts: int) -> Picks:
    """Picks of equal weight. Who is refused by capacity is as welcome at any other expert."""
    num_tokens, top_k = expert_TK.shape
    score_TE = torch.zeros(num_tokens, num_experts, device=tokens.x_TD.device).scatter_(1, expert_TK, 1.0)

    def weigh(chosen_TK: torch.Tensor) -> torch.Tensor:
        return score_TE.new_full(chosen_TK.shape, 1.0 / top_k).masked_fill(chosen_TK == NO_EXPERT, 0.0)

    return Picks(expert_TK, score_TE, weigh)


def random_table(*, num_experts: int, top_k: int, vocab_size: int, seed: int, layer_idx: int) -> torch.Tensor:
    """[V, K] distinct experts per id."""
    return torch.rand(vocab_size, num_experts, generator=seeded(seed, layer_idx)).topk(top_k, dim=-1).indices


def balanced_table(count_V: torch.Tensor, *, num_experts: int, top_k: int, seed: int, layer_idx: int) -> torch.Tensor:
    """[V, K] distinct experts per id, such that the counts spread evenly; the draw decides between equals.

    Raises InvalidInput for counts that are none.
    """
    if count_V.ndim != 1 or not bool((count_V >= 0).all()):
        raise InvalidInput(f"token counts are numbers >= 0, one per id (got {count_V.dtype} {list(count_V.shape)})")
    generator = seeded(seed, layer_idx)
    rank_E = torch.randperm(num_experts, generator=generator).tolist()
    order_V = torch.randperm(count_V.numel(), generator=generator)
    order_V = order_V[count_V.cpu()[order_V].argsort(stable=True, descending=True)]
    line = [(0.0, 0, rank_E[expert], expert) for expert in range(num_experts)]  # tokens, ids, draw
    heapq.heapify(line)
    table: list[list[int]] = [[]] * count_V.numel()
    for token_id, count in zip(order_V.tolist(), count_V.cpu()[order_V].tolist(), strict=True):
        emptiest = [heapq.heappop(line) for _ in range(top_k)]
        table[token_id] = [expert for *_, expert in emptiest]
        for tokens, ids, rank, expert in emptiest:
            heapq.heappush(line, (tokens + count, ids + 1, rank, expert))
    return torch.tensor(table, dtype=torch.int64).view(-1, top_k)
