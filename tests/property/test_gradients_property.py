"""Gradients over ranks: what every rank ends with, for any assignment of experts, and who is sent what."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_group import MemoryGroup, together
from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_runtime.engine.model import ExpertParallelModel, ExpertParameter
from moe_runtime.train.gradients import Complete, complete_gradients, holders_of

LAYERS, EXPERTS = 2, 4
SHAPES = {"up": (3, 2), "down": (2,)}


@dataclass(frozen=True)
class Scene:
    expert_map: ExpertMap
    seed: int

    def dense(self, rank: int) -> torch.Tensor:
        return torch.randn(5, generator=torch.Generator().manual_seed(self.seed + rank))

    def experts(self, rank: int) -> dict[tuple[int, str], torch.Tensor]:
        """By layer and name [slots, ...], nothing in empty slots."""
        generator = torch.Generator().manual_seed(self.seed + 100 + rank)
        slots = self.expert_map.slot_range(rank)
        found = {}
        for layer, row in enumerate(self.expert_map.logical_of_slot):
            held = torch.tensor([row[s] != EMPTY_SLOT for s in slots], dtype=torch.float32)
            for name, shape in SHAPES.items():
                gradient = torch.randn(len(slots), *shape, generator=generator)
                found[layer, name] = gradient * held.view(-1, *[1] * len(shape))
        return found

    def model(self, rank: int) -> ExpertParallelModel:
        dense, slots = torch.nn.Parameter(torch.zeros(5)), self.expert_map.slot_range(rank)
        dense.grad = self.dense(rank)
        experts = []
        for (layer, name), gradient in self.experts(rank).items():
            parameter = torch.nn.Parameter(torch.zeros_like(gradient))
            parameter.grad = gradient
            held = self.expert_map.logical_of_slot[layer][slots.start : slots.stop]
            experts.append(ExpertParameter(f"{layer}.{name}", layer, parameter, held))
        found: Any = SimpleNamespace(
            rank=rank,
            expert_map=self.expert_map,
            dense_parameters=lambda: [("dense", dense)],
            expert_parameters=lambda: experts,
        )
        return cast("ExpertParallelModel", found)

    def whole(self) -> dict[tuple[int, str, int], torch.Tensor]:
        """By layer, name and expert: the sum over all its copies."""
        found: dict[tuple[int, str, int], torch.Tensor] = {}
        for rank in range(self.expert_map.num_ranks):
            for (layer, name), gradient in self.experts(rank).items():
                for place, slot in enumerate(self.expert_map.slot_range(rank)):
                    expert = self.expert_map.logical_of_slot[layer][slot]
                    if expert != EMPTY_SLOT:
                        key = layer, name, expert
                        found[key] = found.get(key, torch.zeros(SHAPES[name])) + gradient[place]
        return found


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Copies on any ranks, several on one, slots and ranks that are empty, experts that nobody holds."""
    slots = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    row = st.lists(st.integers(EMPTY_SLOT, EXPERTS - 1), min_size=sum(slots), max_size=sum(slots))
    rows = tuple(tuple(draw(row)) for _ in range(LAYERS))
    expert_map = ExpertMap(generation=0, num_logical_experts=EXPERTS, slots_of_rank=tuple(slots), logical_of_slot=rows)
    return Scene(expert_map, draw(st.integers(0, 99)))


def completed(scene: Scene, max_expert_norm: float | None = None) -> list[Complete]:
    def run(group: MemoryGroup) -> Complete:
        model = scene.model(group.position)
        return complete_gradients(model, group, sums=(group.position,), max_expert_norm=max_expert_norm)

    return together(run, scene.expert_map.num_ranks)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@settings(max_examples=30, deadline=None)
@given(scene=scenes())
def test_every_copy_gets_the_sum_over_all_copies_and_every_rank_the_same_norm(
    max_norm: float | None, scene: Scene
) -> None:
    expected, ranks = scene.whole(), range(scene.expert_map.num_ranks)
    if max_norm is not None:
        for layer, _, expert in list(expected):
            names = [(layer, name, expert) for name in SHAPES]
            norm = float(sum(expected[key].double().square().sum() for key in names)) ** 0.5
            for key in names if norm > max_norm else ():
                expected[key] = expected[key] * (max_norm / norm)
    dense = torch.stack([scene.dense(rank) for rank in ranks]).sum(0)
    square = sum(float(one.double().square().sum()) for one in (dense, *expected.values()))
    found = completed(scene, max_norm)
    assert len({one.norm for one in found}) == 1
    assert found[0].norm == pytest.approx(square**0.5, rel=1e-5)
    assert {one.sums for one in found} == {(sum(ranks),)}
    seen: dict[tuple[int, str, int], torch.Tensor] = {}
    for rank, one in zip(ranks, found, strict=True):
        torch.testing.assert_close(one.of["dense"], dense)
        for layer, name in scene.experts(rank):
            for place, slot in enumerate(scene.expert_map.slot_range(rank)):
                expert = scene.expert_map.logical_of_slot[layer][slot]
                mine = one.of[f"{layer}.{name}"][place]
                if expert == EMPTY_SLOT:
                    assert not mine.any()
                    continue
                torch.testing.assert_close(mine, expected[layer, name, expert])
                assert torch.equal(mine, seen.setdefault((layer, name, expert), mine)), "copies are equal bit by bit"


@settings(max_examples=30, deadline=None)
@given(scene=scenes())
def test_only_ranks_that_hold_the_same_expert_send_each_other_gradients(scene: Scene) -> None:
    ranks = range(scene.expert_map.num_ranks)
    holders = holders_of(scene.expert_map, ranks)
    numbers = sum(torch.zeros(shape).numel() for shape in SHAPES.values())

    def run(group: MemoryGroup) -> list[int]:
        sent = [0] * group.size

        def swap(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
            sent[:] = counts
            return MemoryGroup.swap(group, rows, counts)

        group.swap = swap  # type: ignore[method-assign, assignment]
        complete_gradients(scene.model(group.position), group, sums=())
        return sent

    for rank, sent in zip(ranks, together(run, len(ranks)), strict=True):
        for other in ranks:
            both = sum({rank, other} <= set(of) for layer in holders for of in layer.values()) if other != rank else 0
            assert sent[other] == both * numbers
