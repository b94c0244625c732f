"""Lost experts: what calibration fits, what the ranks answer, what they count; and moves between steps."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import numerics_tasks as tasks
from gloo_ranks import run_ranks
from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.calibrate import calibrate
from moe_runtime.experts.generalists import read_generalists, write_generalists
from numerics_reference import Reference

pytestmark = pytest.mark.integration

LOST = (6, 7)


def whole_map(family: str, *, without: tuple[int, ...] = ()) -> ExpertMap:
    row = tuple(EMPTY_SLOT if e in without else e for e in range(tasks.NUM_EXPERTS))
    return ExpertMap(
        generation=1,
        num_logical_experts=tasks.NUM_EXPERTS,
        slots_of_rank=(tasks.NUM_EXPERTS,),
        logical_of_slot=(row,) * tasks.num_moe_layers(family),
    )


def four_rank_map(family: str) -> ExpertMap:
    """Rank 3 alone holds LOST and also a copy of expert 0."""
    return ExpertMap(
        generation=1,
        num_logical_experts=tasks.NUM_EXPERTS,
        slots_of_rank=(3, 2, 1, 3),
        logical_of_slot=((0, 1, 2, 3, 4, 5, 6, 0, 7),) * tasks.num_moe_layers(family),
    )


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "gpt_oss"])
def calibrated(
    request: pytest.FixtureRequest, references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Reference, Path]:
    reference = references[request.param]
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(reference.folder, folder)
    torch.manual_seed(1)
    write_generalists(calibrate(reference.model, torch.randint(0, 64, (96, 16)), map_rank=8), folder)
    return reference, folder


def logits_alone(folder: Path, emap: ExpertMap, fallback: str) -> np.ndarray:
    epm = ExpertParallelModel.load(ModelSource(path=str(folder)), expert_map=emap, rank=0, fallback=fallback)  # type: ignore[arg-type]
    with torch.no_grad():
        logits: np.ndarray = epm.module(input_ids=tasks.batch_of_rank(0, 1)).logits.numpy()
    return logits


def test_generalists_are_nearer_to_the_whole_model_than_dropping(calibrated: tuple[Reference, Path]) -> None:
    reference, folder = calibrated
    emap = whole_map(reference.family, without=LOST)
    whole = reference.model(input_ids=tasks.batch_of_rank(0, 1)).logits.detach().numpy()
    by_generalist = np.square(logits_alone(folder, emap, "Generalist") - whole).mean()
    by_dropping = np.square(logits_alone(folder, emap, "Drop") - whole).mean()
    assert 0 < by_generalist < by_dropping


def test_every_expert_has_an_answer_no_worse_than_the_plain_ones(calibrated: tuple[Reference, Path]) -> None:
    reference, folder = calibrated
    generalists = read_generalists(folder)
    assert generalists is not None
    assert len(generalists.layers) == tasks.num_moe_layers(reference.family)
    for layer, errors in zip(generalists.layers, generalists.report["relative_error"], strict=True):
        for e, kind in enumerate(layer.kind):
            assert errors[kind][e] <= min(errors["drop"][e], errors["constant"][e])
            assert kind == "drop" or layer.has_map[e] or layer.stand_in[e] >= 0


@pytest.mark.parametrize("fallback", ["Generalist", "Drop", "Refuse"])
def test_ranks_answer_for_lost_experts_as_one_process_does_and_count_them(
    calibrated: tuple[Reference, Path], fallback: str, tmp_path: Path
) -> None:
    reference, folder = calibrated
    results = run_ranks(
        tasks.degraded_logits,
        num_ranks=3,
        store_path=str(tmp_path / "store"),
        folder=str(folder),
        expert_map=four_rank_map(reference.family),
        ranks=[0, 1, 2],
        fallback=fallback,
    )

    expected = logits_alone(folder, whole_map(reference.family, without=LOST), fallback)[:, -1]
    lost_picks = sum(layer[e] for layer in results[0]["load"] for e in LOST)
    assert lost_picks > 0
    for result in results.values():
        assert result["lost"] == [LOST] * tasks.num_moe_layers(reference.family)
        assert np.abs(result["logits"] - expected).max() <= 1e-4
        assert sum(result["degraded"].values()) == lost_picks
        assert result["rows"] == [True, True]
        if fallback != "Generalist":
            assert result["degraded"]["generalist"] == 0


def test_a_map_committed_between_steps_changes_slots_and_no_logit(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references["mixtral"]
    before = four_rank_map("mixtral")
    after = before.model_copy(
        update={
            "generation": 2,
            "slots_of_rank": (2, 4, 2, 2),
            "logical_of_slot": ((6, 7, 0, 1, 2, 3, 4, -1, 5, 6),) * tasks.num_moe_layers("mixtral"),
        }
    )
    after = ExpertMap.model_validate(after.model_dump())
    results = run_ranks(
        tasks.move_between_steps,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        maps=[before, after],
        world=4,
    )

    whole = reference.model(input_ids=tasks.batch_of_rank(0, 1)).logits.detach().numpy()
    for rank, result in results.items():
        for step, last in zip(result["steps"], (4, 6, 8), strict=True):
            assert np.abs(step - whole[:, last]).max() <= 1e-4
        assert set(result["slots"]) == {tuple(after.logical_of_slot[0][s] for s in after.slot_range(rank))}
