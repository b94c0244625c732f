"""A CPU's experts equal one expert after the other, whatever share of the rows each gets."""

import pytest
import torch
from torch.nn.functional import linear, silu

from moe_runtime.kernels import experts_cpu
from moe_runtime.kernels.experts_cpu import padded, run_experts, runs_here

CASES = {
    "all_small": (8, 16, [3, 0, 2, 5]),
    "all_large": (128, 64, [400, 300, 500]),
    "both_and_an_empty_one": (128, 64, [400, 1, 0, 300, 2]),
    "one_row": (32, 16, [0, 1]),
    "every_row_to_one": (128, 64, [0, 500, 0]),
}


def weights(dim: int, hidden: int, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(1)
    gate_up = torch.randn(num_slots, 2 * hidden, dim, generator=numbers) / dim**0.5
    down = torch.randn(num_slots, dim, hidden, generator=numbers) / hidden**0.5
    return gate_up.requires_grad_(), down.requires_grad_()


def one_after_the_other(
    rows: torch.Tensor, slots: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    output = torch.zeros_like(rows)
    for slot in range(len(down)):
        own = torch.nonzero(slots == slot).squeeze(-1)
        gate, up = linear(rows[own], gate_up[slot]).chunk(2, dim=-1)
        output = output.index_add(0, own, linear(silu(gate) * up, down[slot]))
    return output


def scene(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dim, hidden, counts = CASES[name]
    numbers = torch.Generator().manual_seed(2)
    slots = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    slots = slots[torch.randperm(len(slots), generator=numbers)]
    rows = torch.randn(len(slots), dim, generator=numbers).requires_grad_()
    return rows, slots, *weights(dim, hidden, len(counts))


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_one_expert_after_the_other(name: str) -> None:
    rows, slots, gate_up, down = scene(name)

    with torch.no_grad():
        torch.testing.assert_close(
            run_experts(rows, slots, gate_up, down), one_after_the_other(rows, slots, gate_up, down)
        )


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_one_expert_after_the_other(name: str) -> None:
    rows, slots, gate_up, down = scene(name)
    wanted = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))

    given = torch.autograd.grad(run_experts(rows, slots, gate_up, down), (rows, gate_up, down), wanted)

    expected = torch.autograd.grad(one_after_the_other(rows, slots, gate_up, down), (rows, gate_up, down), wanted)
    for mine, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_scenes_meet_large_slots_and_small_ones() -> None:
    kinds = {
        name: {
            type(batch).__name__
            for batch in experts_cpu._batches(slots, num_slots=len(down), weight_size=down[0].numel())
        }
        for name in CASES
        for _, slots, _, down in [scene(name)]
    }

    assert kinds["all_small"] == {"_Group"}
    assert kinds["all_large"] == {"_Single"}
    assert kinds["both_and_an_empty_one"] == {"_Group", "_Single"}


def test_padding_holds_the_rows_and_wastes_an_eighth_at_most_beyond_the_first_few() -> None:
    for count in range(1, 5000):
        assert count <= padded(count) < max(count + 4, count * 1.125 + 1)


def test_few_different_numbers_of_rows_are_multiplied() -> None:
    assert len({padded(count) for count in range(1, 4097)}) < 80


@pytest.mark.parametrize(
    ("dim", "hidden", "dtype"), [(6, 8, torch.float32), (8, 6, torch.float32), (8, 8, torch.bfloat16)]
)
def test_weights_that_it_cannot_take_are_left_to_others(dim: int, hidden: int, dtype: torch.dtype) -> None:
    gate_up, down = weights(dim, hidden, 2)

    assert not runs_here(gate_up.to(dtype), down.to(dtype))
