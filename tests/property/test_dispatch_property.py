"""Every dispatcher gives what one rank with all slots gives, in values and in gradients, whatever the ranks ask for."""

import pytest
import torch
from hypothesis import given, settings

from dispatch_scenes import Scene, Way, answers, references, scenes
from memory_group import MemoryGroup
from moe_core.contract.dispatch import Wire
from moe_runtime.dispatch.all_to_all import run_by_token
from moe_runtime.dispatch.by_node import Relay
from moe_runtime.dispatch.mixture import mix
from moe_runtime.dispatch.plan import LOST, DispatchPlan
from moe_runtime.dispatch.reference import RunSlots
from moe_runtime.dispatch.step import StepContext
from moe_runtime.dispatch.wire import Legs

WAYS = ("pick", "node", "pick in two batches", "node in two batches")
TOLD = ("pick", "pick in two batches")
"""Those that send counts with the rows where the group takes them."""
TOLERANCE: dict[Wire, float] = {"Float32": 1e-5, "BFloat16": 0.06, "Float8": 0.5, "Int8": 0.2}
"""Of sums of a few numbers of size one, each coded up to four times on its way."""


def way_of(name: str, wire: Wire = "Float32") -> Way:
    def way(  # noqa: PLR0917
        x_TD: torch.Tensor,
        address_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        plan: DispatchPlan,
        group: MemoryGroup,
        run_slots: RunSlots,
    ) -> torch.Tensor:
        legs = Legs.of(dispatch=wire, combine=wire)
        if name == "token":
            return run_by_token(
                x_TD,
                address_TK,
                weight_TK,
                plan=plan,
                group=group,
                run_slots=run_slots,
                legs=legs,
                tokens_of_position=[row[0] for row in group.all_gather_ints((len(x_TD),))],
            )
        assert group.domains is not None
        by_node = name.startswith("node")
        context = StepContext(
            plan,
            group,
            num_experts=1,
            legs=legs,
            overlap="TwoBatch" if name.endswith("batches") else "OneBatch",
            relay=Relay.of(group.domains, position=group.position) if by_node else None,
        )
        return mix(x_TD, address_TK, weight_TK, context=context, run_slots=run_slots)

    return way


@pytest.mark.parametrize(("name", "tells"), [(name, False) for name in WAYS] + [(name, True) for name in TOLD])
@settings(max_examples=60)
@given(scene=scenes())
def test_values_and_gradients_are_those_of_one_rank(name: str, tells: bool, scene: Scene) -> None:
    expected, found = references(scene), answers(scene, way_of(name), tells=tells)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.output, its.output)
        torch.testing.assert_close(mine.grad_x, its.grad_x)
        torch.testing.assert_close(mine.grad_weight, its.grad_weight)
    tables = [torch.stack([answer.grad_table for answer in both]).sum(0) for both in (found, expected)]
    torch.testing.assert_close(*tables)


@pytest.mark.parametrize("wire", ["BFloat16", "Float8", "Int8"])
@pytest.mark.parametrize("name", WAYS[:2])
@settings(max_examples=15)
@given(scene=scenes())
def test_fewer_bits_change_values_and_gradients_by_no_more_than_they_lose(name: str, wire: Wire, scene: Scene) -> None:
    expected, found = references(scene), answers(scene, way_of(name, wire))
    for mine, its in zip(found, expected, strict=True):
        for got, wanted in ((mine.output, its.output), (mine.grad_x, its.grad_x), (mine.grad_weight, its.grad_weight)):
            torch.testing.assert_close(got, wanted, atol=TOLERANCE[wire], rtol=TOLERANCE[wire])


@pytest.mark.parametrize("name", ["pick", "token", "node"])
@settings(max_examples=20)
@given(scene=scenes())
def test_without_gradients_values_are_the_same(name: str, scene: Scene) -> None:
    expected, found = references(scene), answers(scene, way_of(name), with_gradients=False)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.output, its.output)


@pytest.mark.parametrize("name", [*WAYS, "token"])
@settings(max_examples=20)
@given(scene=scenes())
def test_experts_compute_a_row_for_every_pick_and_none_for_a_pick_of_nobody(name: str, scene: Scene) -> None:
    """Routers whose tokens take few of all experts answer as wide as all of them."""
    way, num_rows = way_of(name), []

    def counting(  # noqa: PLR0917
        x_TD: torch.Tensor,
        address_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        plan: DispatchPlan,
        group: MemoryGroup,
        run_slots: RunSlots,
    ) -> torch.Tensor:
        def counted(rows_RD: torch.Tensor, slot_R: torch.Tensor) -> torch.Tensor:
            num_rows.append(len(rows_RD))
            return run_slots(rows_RD, slot_R)

        return way(x_TD, address_TK, weight_TK, plan, group, counted)

    answers(scene, counting, with_gradients=False)
    assert sum(num_rows) == sum(int((address_TK != LOST).sum()) for address_TK in scene.address)


@settings(max_examples=60)
@given(scene=scenes())
def test_by_node_a_token_crosses_once_to_each_node_that_it_needs(scene: Scene) -> None:
    found = answers(scene, way_of("node"), with_gradients=False)
    crossed = 0
    for position, answer in enumerate(found):
        elsewhere = [p for p in range(scene.size) if scene.domains[p] != scene.domains[position]]
        crossed += sum(answer.sent_rows[p] for p in elsewhere)
        crossed -= len(elsewhere)  # the exchange of counts has one row for each
    assert crossed == 2 * scene.crossings()  # there and back


@pytest.mark.parametrize("name", TOLD)
@settings(max_examples=20)
@given(scene=scenes())
def test_counts_that_go_with_the_rows_save_an_exchange_and_change_nothing_else(name: str, scene: Scene) -> None:
    before, told = answers(scene, way_of(name)), answers(scene, way_of(name), tells=True)
    for mine, its in zip(told, before, strict=True):
        assert torch.equal(mine.output, its.output)
        assert torch.equal(mine.grad_x, its.grad_x)
        assert torch.equal(mine.grad_table, its.grad_table)
        assert its.num_exchanges - mine.num_exchanges == name.count("batches") + 1


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=20)
@given(scene=scenes())
def test_every_rank_makes_as_many_exchanges_as_the_others(name: str, scene: Scene) -> None:
    found = answers(scene, way_of(name))
    assert len({answer.num_exchanges for answer in found}) == 1
