"""Sampling that reaches every expert, and codes that make up for each other."""

import numpy as np
import pytest
import torch

from moe_core.contract.packing import Packing, Precision
from moe_runtime.convert.gptq import gptq
from moe_runtime.convert.sample import FOREIGN_WEIGHT, LayerSample
from moe_runtime.kernels.quantise import best_scales, extreme_scales, pack, unpack


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def correlated(num_rows: int, num_columns: int, *, rank: int = 4) -> torch.Tensor:
    """Rows that lie mostly in few directions, as activations do."""
    mixed = normal(num_rows, rank, seed=1) @ normal(rank, num_columns, seed=2)
    return mixed + 0.1 * normal(num_rows, num_columns, seed=3)


def output_error(packed_OM: torch.Tensor, weight_OM: torch.Tensor, x_NM: torch.Tensor) -> float:
    return float((x_NM @ (packed_OM - weight_OM).T).square().sum())


@pytest.mark.parametrize(("precision", "group_size"), [("Int4", 16), ("Int4", 24), ("Int8", 0), ("Float8", 0)])
@pytest.mark.parametrize("num_columns", [40, 300])
def test_codes_that_make_up_for_each_other_err_less_on_rows_they_have_not_seen(
    precision: Precision, group_size: int, num_columns: int
) -> None:
    packing, weight = Packing.of(precision, group_size), normal(24, num_columns)
    x_NM = correlated(2000, num_columns)
    seen, unseen = x_NM[:1000], x_NM[1000:]
    moment = seen.T @ seen / len(seen)
    scales = best_scales(weight, packing)
    nearest = unpack(pack(weight, packing, scales_XNG=scales), packing, num_columns=num_columns)
    found = unpack(gptq(weight, moment, packing, scales_NG=scales), packing, num_columns=num_columns)
    assert output_error(found, weight, unseen) < 0.6 * output_error(nearest, weight, unseen)


def test_where_columns_do_not_go_together_the_nearest_codes_are_the_best() -> None:
    packing, weight = Packing.of("Int4", 8), normal(6, 20)
    scales = extreme_scales(weight, packing)
    found = gptq(weight, torch.eye(20), packing, scales_NG=scales)
    assert torch.equal(found.codes, pack(weight, packing, scales_XNG=scales).codes)


def test_columns_that_met_nothing_keep_their_nearest_codes() -> None:
    packing, weight = Packing.of("Int8"), normal(6, 20)
    x_NM = correlated(200, 20)
    x_NM[:, 5] = 0
    scales = extreme_scales(weight, packing)
    found = gptq(weight, x_NM.T @ x_NM / 200, packing, scales_NG=scales)
    assert torch.equal(found.codes[:, 5], pack(weight, packing, scales_XNG=scales).codes[:, 5])


def test_nothing_met_at_all_gives_nearest_codes() -> None:
    packing, weight = Packing.of("Int4", 8), normal(6, 20)
    scales = extreme_scales(weight, packing)
    found = gptq(weight, torch.zeros(20, 20), packing, scales_NG=scales)
    assert torch.equal(found.codes, pack(weight, packing, scales_XNG=scales).codes)


def filled(*, rows_per_expert: int = 8) -> LayerSample:
    """Expert 0 is asked all the time, 1 three times, 2 never."""
    sample = LayerSample(3, rows_per_expert=rows_per_expert, seed=0)
    for step in range(5):
        x_TD = torch.full((10, 2), float(step))
        expert_TK = torch.tensor([[0, 1] if step == 2 and token < 3 else [0, -1] for token in range(10)])
        sample.add(x_TD, expert_TK, torch.full((10, 2), 0.5))
    return sample


def test_every_expert_has_equally_many_rows_however_uneven_the_routing() -> None:
    sample = filled()
    assert sample.seen_E == [50, 3, 0]
    assert [len(sample.rows_of(e).x_ND) for e in range(3)] == [8, 8, 8]
    assert [sample.rows_of(e).num_own for e in range(3)] == [8, 3, 0]


def test_rows_of_other_tokens_count_less_than_its_own() -> None:
    rows = filled().rows_of(1)
    own = torch.tensor(0.25)
    foreign = torch.tensor((FOREIGN_WEIGHT * 0.5) ** 2)
    assert sorted(rows.count_N.tolist()) == pytest.approx([float(foreign)] * 5 + [float(own)] * 3)
    assert rows.x_ND[rows.count_N == own].tolist() == [[2.0, 2.0]] * 3


def test_rows_are_drawn_from_all_that_came_not_from_the_first() -> None:
    drawn = filled(rows_per_expert=25).rows_of(0).x_ND[:, 0]
    assert set(drawn.tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_the_same_text_gives_the_same_rows() -> None:
    assert torch.equal(filled().rows_of(1).x_ND, filled().rows_of(1).x_ND)


def test_less_text_than_rows_gives_what_there_is() -> None:
    sample = LayerSample(2, rows_per_expert=100, seed=0)
    sample.add(normal(6, 4), torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1))
    assert [len(sample.rows_of(e).x_ND) for e in range(2)] == [6, 6]
