"""Any tokens over any ranks, for tests of dispatchers: what each rank asks for, and what one rank alone would answer.

Slot s of the rank at position p is expert p * stride + s of one table; an expert is tanh(x * its row).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from memory_group import MemoryGroup, together
from moe_runtime.dispatch.plan import LOST, DispatchPlan
from moe_runtime.dispatch.reference import RunSlots, run_local

DIM = 4

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, DispatchPlan, MemoryGroup, RunSlots], torch.Tensor]
"""(x_TD, address_TK, weight_TK, plan, group, run_slots) -> [T, D]"""


@dataclass(frozen=True)
class Scene:
    """By position: tokens, addresses [T, K]; domains; slots_stride."""

    domains: tuple[str, ...]
    stride: int
    address: tuple[torch.Tensor, ...]
    seed: int

    @property
    def size(self) -> int:
        return len(self.domains)

    def table(self) -> torch.Tensor:
        """[slots of all ranks, D]"""
        return torch.randn(self.size * self.stride, DIM, generator=torch.Generator().manual_seed(self.seed))

    def tokens(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_TD, weight_TK)"""
        generator = torch.Generator().manual_seed(self.seed + 1 + position)
        num_tokens, top_k = self.address[position].shape
        return torch.randn(num_tokens, DIM, generator=generator), torch.rand(num_tokens, top_k, generator=generator)

    def plan(self, position: int) -> DispatchPlan:
        return DispatchPlan(tuple(range(self.size)), position, self.stride, ())

    def crossings(self) -> int:
        """(token, other node) pairs: rows that have to cross."""
        pairs = 0
        for position, address_TK in enumerate(self.address):
            for row in address_TK.tolist():
                met = {self.domains[address // self.stride] for address in row if address != LOST}
                pairs += len(met - {self.domains[position]})
        return pairs


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Uneven nodes, ranks without tokens, ranks that nobody asks, lost experts, picks that meet in one slot."""
    size = draw(st.integers(1, 6))
    domains = tuple(draw(st.lists(st.sampled_from("abc"), min_size=size, max_size=size)))
    stride, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    picks = st.lists(st.integers(LOST, size * stride - 1), min_size=top_k, max_size=top_k)
    address = tuple(
        torch.tensor(rows, dtype=torch.long).view(-1, top_k)
        for rows in draw(st.lists(st.lists(picks, max_size=5), min_size=size, max_size=size))
    )
    return Scene(domains, stride, address, draw(st.integers(0, 99)))


@dataclass(frozen=True)
class Answer:
    """Of one rank: outputs, gradients of its tokens and weights, and of the whole table."""

    output: torch.Tensor
    grad_x: torch.Tensor
    grad_weight: torch.Tensor
    grad_table: torch.Tensor
    sent_rows: list[int]
    sent_bytes: list[int]
    num_exchanges: int


def answers(scene: Scene, way: Way, *, with_gradients: bool = True, tells: bool = False) -> list[Answer]:
    """Of every rank, over a group in memory."""

    def run(group: MemoryGroup) -> Answer:
        table = scene.table().requires_grad_(with_gradients)
        x_TD, weight_TK = (t.requires_grad_(with_gradients) for t in scene.tokens(group.position))
        first = group.position * scene.stride

        def run_slots(rows_RD: torch.Tensor, slot_R: torch.Tensor) -> torch.Tensor:
            assert len(rows_RD)
            assert slot_R.min() >= 0
            assert slot_R.max() < scene.stride
            return torch.tanh(rows_RD * table[first + slot_R])

        with torch.set_grad_enabled(with_gradients):
            output = way(x_TD, scene.address[group.position], weight_TK, scene.plan(group.position), group, run_slots)
        if with_gradients:
            torch.autograd.backward((output * probe(output)).sum())
        return Answer(
            output.detach(),
            _grad(x_TD),
            _grad(weight_TK),
            _grad(table),
            group.sent_rows,
            group.sent_bytes,
            group.num_exchanges,
        )

    return together(run, scene.size, domains=scene.domains, tells=tells)


def references(scene: Scene) -> list[Answer]:
    """The same by one rank that holds all slots; grad_table is that rank's tokens' part."""
    found = []
    for position, address_TK in enumerate(scene.address):
        table = scene.table().requires_grad_()
        x_TD, weight_TK = (t.requires_grad_() for t in scene.tokens(position))

        def run_slots(rows_RD: torch.Tensor, slot_R: torch.Tensor, table: torch.Tensor = table) -> torch.Tensor:
            return torch.tanh(rows_RD * table[slot_R])

        output = run_local(x_TD, address_TK, weight_TK, run_slots)
        torch.autograd.backward((output * probe(output)).sum())
        found.append(Answer(output.detach(), _grad(x_TD), _grad(weight_TK), _grad(table), [], [], 0))
    return found


def probe(output: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, output.numel()).view(output.shape)


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
