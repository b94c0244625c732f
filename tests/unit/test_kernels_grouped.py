"""The grouped products in Triton's interpreter: each equals its plain torch namesake, on shapes that fit no tile."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moe_core.outcome import InvalidInput
from moe_runtime.kernels import grouped
from moe_runtime.kernels.index import SlotRows, index_rows
from moe_runtime.kernels.mixture import mixture, mixture_reference
from moe_runtime.kernels.permute import permute_reference

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Case:
    """Slots from `used_slots` on stay empty, and some picks have none."""

    num_tokens: int
    top_k: int
    num_slots: int
    d: int
    f: int
    used_slots: int


CASES = [
    Case(13, 2, 5, 40, 24, 3),
    Case(1, 1, 3, 16, 16, 1),  # one row
    Case(30, 3, 4, 72, 56, 4),
    Case(4, 2, 2, 16, 16, 0),  # no pick has a slot
]


@dataclass(frozen=True)
class Drawn:
    case: Case
    rows: SlotRows
    x_TD: torch.Tensor
    gate_up_S2FD: torch.Tensor
    down_SDF: torch.Tensor
    weight_N: torch.Tensor

    @property
    def used(self) -> int:
        return int(self.rows.start_S1[-1])


def drawn(case: Case, dtype: torch.dtype = torch.float32) -> Drawn:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(case.num_tokens)
    s, d, f, num_picks = case.num_slots, case.d, case.f, case.num_tokens * case.top_k
    slot_N = torch.randint(-1, case.used_slots, (num_picks,), generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Drawn(
        case=case,
        rows=index_rows(slot_N, num_slots=s, block_rows=16),
        x_TD=normal(case.num_tokens, d),
        gate_up_S2FD=normal(s, 2 * f, d) * 0.3,
        down_SDF=normal(s, d, f) * 0.3,
        weight_N=torch.rand(num_picks, generator=generator),
    )


def small_tile() -> Any:
    from moe_runtime.kernels.grouped_triton import Tile

    return Tile(columns=32, depth=16, blocks_in_turn=2)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 5e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def gathered(x_TD: torch.Tensor, draw: Drawn) -> torch.Tensor:
    return permute_reference(x_TD, draw.rows, top_k=draw.case.top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_gate_up_equals_gather_product_and_swiglu(case: Case, dtype: torch.dtype) -> None:
    from moe_runtime.kernels import grouped_triton

    draw = drawn(case, dtype)
    hidden_PF, kept_P2F = grouped_triton.gate_up(
        draw.x_TD, draw.gate_up_S2FD, draw.rows, gather_top_k=case.top_k, keep=True, tile=small_tile()
    )
    expected_P2F = grouped.rows_times_weights(gathered(draw.x_TD, draw).float(), draw.gate_up_S2FD.float(), draw.rows)
    assert kept_P2F is not None
    close(kept_P2F[: draw.used], expected_P2F[: draw.used], dtype)
    close(hidden_PF[: draw.used], grouped.swiglu(expected_P2F)[: draw.used], dtype)


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_kept_changes_nothing(case: Case) -> None:
    from moe_runtime.kernels import grouped_triton

    draw = drawn(case)
    hidden_PF, kept = grouped_triton.gate_up(
        draw.x_TD, draw.gate_up_S2FD, draw.rows, gather_top_k=case.top_k, tile=small_tile()
    )
    expected_P2F = grouped.rows_times_weights(gathered(draw.x_TD, draw), draw.gate_up_S2FD, draw.rows)
    assert kept is None
    close(hidden_PF[: draw.used], grouped.swiglu(expected_P2F)[: draw.used])


@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_in_order_already_are_not_gathered(case: Case) -> None:
    from moe_runtime.kernels import grouped_triton

    draw = drawn(case)
    hidden_PF, _ = grouped_triton.gate_up(
        gathered(draw.x_TD, draw), draw.gate_up_S2FD, draw.rows, gather_top_k=None, tile=small_tile()
    )
    expected_P2F = grouped.rows_times_weights(gathered(draw.x_TD, draw), draw.gate_up_S2FD, draw.rows)
    close(hidden_PF[: draw.used], grouped.swiglu(expected_P2F)[: draw.used])


@pytest.mark.parametrize("case", CASES)
def test_rows_are_multiplied_with_the_transpose_of_their_slots_weight(case: Case) -> None:
    from moe_runtime.kernels import grouped_triton

    draw = drawn(case)
    hidden_PF = torch.randn(draw.rows.pick_P.shape[0], case.f)
    out_PD = grouped_triton.rows_times_weights(hidden_PF, draw.down_SDF, draw.rows, transposed=True, tile=small_tile())
    served_P = draw.rows.pick_P < case.num_tokens * case.top_k  # what padding holds is the input's to say
    close(out_PD[served_P], grouped.rows_times_weights(hidden_PF, draw.down_SDF, draw.rows)[served_P])


@pytest.mark.parametrize("case", CASES)
def test_rows_are_multiplied_with_their_slots_weight_as_it_lies(case: Case) -> None:
    from moe_runtime.kernels import grouped_triton

    draw = drawn(case)
    x_PD = gathered(draw.x_TD, draw)
    out_PF = grouped_triton.rows_times_weights(x_PD, draw.down_SDF, draw.rows, transposed=False, tile=small_tile())
    expected_PF = grouped.rows_times_weights(x_PD, draw.down_SDF.transpose(1, 2), draw.rows)
    close(out_PF[: draw.used], expected_PF[: draw.used])


@pytest.mark.parametrize("case", CASES)
def test_weights_gradient_is_zero_for_an_empty_slot_and_a_sum_elsewhere(case: Case) -> None:
    from moe_runtime.kernels import grouped_backward_triton

    draw = drawn(case)
    left_PD, right_PF = gathered(draw.x_TD, draw), torch.randn(draw.rows.pick_P.shape[0], case.f)
    actual = grouped_backward_triton.weights_gradient(left_PD, right_PF, draw.rows, tile=small_tile())
    close(actual, grouped.weights_gradient(left_PD, right_PF, draw.rows))


@pytest.mark.parametrize("case", CASES)
def test_gradients_through_swiglu_equal_the_references(case: Case) -> None:
    from moe_runtime.kernels import grouped_backward_triton

    draw = drawn(case)
    num_rows = draw.rows.pick_P.shape[0]
    d_hidden_PF, kept_P2F = torch.randn(num_rows, case.f), torch.randn(num_rows, 2 * case.f)
    d_gate_up_P2F, weighted_PF, d_weight_N = grouped_backward_triton.swiglu_backward(
        d_hidden_PF, kept_P2F, draw.weight_N, draw.rows
    )
    weight_P = torch.nn.functional.pad(draw.weight_N, (0, 1))[draw.rows.pick_P.long()]
    expected = grouped.swiglu_backward(d_hidden_PF, kept_P2F, weight_P)
    close(d_gate_up_P2F[: draw.used], expected[0][: draw.used])
    close(weighted_PF[: draw.used], expected[1][: draw.used])
    has_row_N = draw.rows.row_N >= 0
    close(d_weight_N[has_row_N], expected[2][draw.rows.row_N[has_row_N].long()])
    assert not d_weight_N[~has_row_N].any()


@pytest.mark.parametrize("case", CASES)
def test_a_mixture_and_its_gradients_equal_plain_torchs(case: Case) -> None:
    draw = drawn(case)
    shape = (case.num_tokens, case.top_k)
    slot_N = torch.full((case.num_tokens * case.top_k,), -1)
    for slot in range(case.num_slots):
        start, count = int(draw.rows.start_S1[slot]), int(draw.rows.count_S[slot])
        slot_N[draw.rows.pick_P[start : start + count].long()] = slot
    d_out_TD = torch.randn(case.num_tokens, case.d)
    answers = []
    for run in (mixture_reference, lambda *given: mixture(*given, block_rows=16)):
        given = [
            t.clone().requires_grad_() for t in (draw.x_TD, draw.weight_N.view(shape), draw.gate_up_S2FD, draw.down_SDF)
        ]
        out_TD = run(given[0], slot_N.view(shape), *given[1:])
        answers.append([out_TD.detach(), *torch.autograd.grad(out_TD, given, d_out_TD)])
    for expected, actual in zip(*answers, strict=True):
        close(actual, expected)


def test_wide_experts_take_permuted_tokens_to_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = drawn(CASES[0])
    slot_TK = torch.randint(0, 5, (13, 2))
    given = (draw.x_TD, slot_TK, draw.weight_N.view(13, 2), draw.gate_up_S2FD, draw.down_SDF)
    monkeypatch.setattr("moe_runtime.kernels.mixture.PERMUTE_FROM_F", 1)
    close(mixture(*given, block_rows=16), mixture_reference(*given))


def test_no_tokens_give_no_rows() -> None:
    out = mixture(
        torch.zeros(0, 16),
        torch.zeros(0, 2, dtype=torch.long),
        torch.zeros(0, 2),
        torch.zeros(3, 32, 16),
        torch.zeros(3, 16, 16),
    )
    assert out.shape == (0, 16)


def test_a_side_that_descriptors_cannot_read_is_refused_by_name() -> None:
    draw = drawn(Case(4, 1, 2, 18, 16, 2))
    with pytest.raises(InvalidInput, match=r"D must be a positive multiple of 4 for torch.float32, not 18"):
        mixture(draw.x_TD, torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), draw.gate_up_S2FD, draw.down_SDF)
