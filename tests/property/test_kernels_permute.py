"""Permute and combine: the Triton kernels, in the interpreter, against plain torch and its autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.outcome import InvalidInput
from moe_runtime.kernels import permute as face
from moe_runtime.kernels import permute_triton
from moe_runtime.kernels.index import NO_SLOT, SlotRows, index_rows
from moe_runtime.kernels.permute import combine_reference, permute_reference
from moe_runtime.kernels.permute_triton import combine_backward, combine_rows, permute_rows

pytestmark = pytest.mark.usefixtures("poisoned")


@st.composite
def indices(draw: st.DrawFn) -> tuple[SlotRows, int, int, int]:
    """(index, T, K, D)."""
    num_tokens, top_k, num_slots = draw(st.integers(0, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    num_picks = num_tokens * top_k
    slots = draw(st.lists(st.integers(NO_SLOT, num_slots - 1), min_size=num_picks, max_size=num_picks))
    block_rows = draw(st.sampled_from([1, 3, 8]))
    rows = index_rows(torch.tensor(slots, dtype=torch.int64), num_slots=num_slots, block_rows=block_rows)
    return rows, num_tokens, top_k, draw(st.sampled_from([1, 5, 16, 33]))


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(indices())
def test_triton_permute_copies_each_rows_token_and_zeroes_padding(case: tuple[SlotRows, int, int, int]) -> None:
    rows, num_tokens, top_k, dim = case
    x_TD = drawn(num_tokens, dim, seed=0)
    torch.testing.assert_close(
        permute_rows(x_TD, rows, top_k=top_k), permute_reference(x_TD, rows, top_k=top_k), rtol=0, atol=0
    )


@settings(max_examples=25)
@given(indices())
def test_triton_combine_equals_the_reference(case: tuple[SlotRows, int, int, int]) -> None:
    rows, num_tokens, top_k, dim = case
    y_PD, weight_TK = drawn(rows.pick_P.shape[0], dim, seed=0), drawn(num_tokens, top_k, seed=1)
    torch.testing.assert_close(
        combine_rows(y_PD, weight_TK, rows, num_tokens=num_tokens, top_k=top_k),
        combine_reference(y_PD, weight_TK, rows),
    )


@settings(max_examples=25)
@given(indices())
def test_triton_combine_backward_equals_autograds(case: tuple[SlotRows, int, int, int]) -> None:
    rows, num_tokens, top_k, dim = case
    y_PD = drawn(rows.pick_P.shape[0], dim, seed=0).requires_grad_()
    weight_TK = drawn(num_tokens, top_k, seed=1).requires_grad_()
    grad_TD = drawn(num_tokens, dim, seed=2)
    wanted = torch.autograd.grad(combine_reference(y_PD, weight_TK, rows), (y_PD, weight_TK), grad_TD)
    got = combine_backward(grad_TD, y_PD.detach(), weight_TK.detach(), rows)
    torch.testing.assert_close(got, wanted)


@settings(max_examples=25)
@given(indices())
def test_combine_with_weight_one_is_permutes_backward(case: tuple[SlotRows, int, int, int]) -> None:
    rows, num_tokens, top_k, dim = case
    x_TD, grad_PD = drawn(num_tokens, dim, seed=0).requires_grad_(), drawn(rows.pick_P.shape[0], dim, seed=1)
    (wanted_TD,) = torch.autograd.grad(permute_reference(x_TD, rows, top_k=top_k), x_TD, grad_PD)
    torch.testing.assert_close(combine_rows(grad_PD, None, rows, num_tokens=num_tokens, top_k=top_k), wanted_TD)


def test_wide_rows_are_walked_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permute_triton, "_WIDTH", 8)
    rows = index_rows(torch.tensor([1, 0, NO_SLOT, 1]), num_slots=2, block_rows=2)
    x_TD, weight_TK, grad_TD = drawn(2, 21, seed=0), drawn(2, 2, seed=1), drawn(2, 21, seed=2)
    permuted_PD = permute_rows(x_TD, rows, top_k=2)
    torch.testing.assert_close(permuted_PD, permute_reference(x_TD, rows, top_k=2))
    combined_TD = combine_rows(permuted_PD, weight_TK, rows, num_tokens=2, top_k=2)
    torch.testing.assert_close(combined_TD, combine_reference(permuted_PD, weight_TK, rows))
    _, grad_weight_TK = combine_backward(grad_TD, permuted_PD, weight_TK, rows)
    wanted_TK = (grad_TD * x_TD).sum(dim=1, keepdim=True).expand(2, 2) * (rows.row_N.view(2, 2) >= 0)
    torch.testing.assert_close(grad_weight_TK, wanted_TK)


def test_autograd_through_the_triton_pair_equals_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = index_rows(torch.tensor([1, 0, NO_SLOT, 1, 0, 2]), num_slots=3, block_rows=4)
    leaves = [drawn(3, 7, seed=0).requires_grad_(), drawn(3, 2, seed=1).requires_grad_()]

    def gradients() -> tuple[torch.Tensor, ...]:
        x_TD, weight_TK = leaves
        out_TD = face.combine(face.permute(x_TD, rows, top_k=2).sin(), weight_TK, rows)
        return torch.autograd.grad(out_TD.square().sum(), leaves)

    wanted = gradients()
    monkeypatch.setattr(face, "runs_triton", lambda _: True)
    for one, other in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_pick_without_a_row_gives_nothing_though_its_weight_is_nan() -> None:
    rows = index_rows(torch.tensor([0, NO_SLOT]), num_slots=1, block_rows=1)
    weight_12 = torch.tensor([[0.5, float("nan")]])
    y_PD = drawn(rows.pick_P.shape[0], 4, seed=0)
    got_1D = combine_rows(y_PD, weight_12, rows, num_tokens=1, top_k=2)
    torch.testing.assert_close(got_1D, 0.5 * y_PD[:1])


def test_an_index_of_other_picks_is_refused_with_its_numbers() -> None:
    rows = index_rows(torch.tensor([0, 0]), num_slots=1, block_rows=1)
    with pytest.raises(InvalidInput, match="of 2 picks, not of 3 tokens x 1"):
        face.permute(torch.zeros(3, 4), rows, top_k=1)
