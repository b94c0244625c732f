"""Routers of ours in training and serving, over real ranks: one run whatever the ranks, and served as trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

import train_tasks
from gloo_ranks import run_ranks
from moe_core.contract.router import LocalityConfig
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.train.evaluate import evaluate_checkpoint
from train_checks import assert_a_lost_rank_leaves_no_trace, assert_parameters_agree, trained

pytestmark = pytest.mark.integration

STEPS = 4
BIASED: dict[str, Any] = {
    "type": "TopK",
    "score_function": "Sigmoid",
    "enable_expert_bias": True,
    "bias_update_rate": 0.01,
}
EVERYWHERE: dict[str, Any] = {
    "type": "TopK",
    "aux_loss_coeff": 0.1,
    "load_balancing_type": "GlobalAuxLoss",
    "z_loss_coeff": 0.01,
}
DRAWN: dict[str, Any] = {**BIASED, "input_jitter_eps": 0.1, "expert_dropout": 0.2}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return train_tasks.write_text(tmp_path / "text")


def _losses(
    tmp_path: Path, text: Path, name: str, *, num_ranks: int, router: dict[str, Any], **changes: Any
) -> tuple[list[float], list[float]]:
    redundant = int(num_ranks > 1)
    return trained(
        tmp_path, text, name, num_ranks=num_ranks, steps=STEPS, redundant=redundant, router=router, **changes
    )


@pytest.mark.parametrize("router", [BIASED, EVERYWHERE], ids=["biased", "everywhere"])
def test_ranks_route_and_learn_like_one_process(tmp_path: Path, text: Path, router: dict[str, Any]) -> None:
    """Tokens are looked at one by one, and the losses are of all ranks' tokens."""
    alone, alone_norms = _losses(tmp_path, text, "alone", num_ranks=1, router=router)
    losses, norms = _losses(tmp_path, text, "ranks", num_ranks=4, router=router)
    assert losses == pytest.approx(alone, rel=2e-5)
    assert norms == pytest.approx(alone_norms, rel=1e-3)
    assert_parameters_agree(tmp_path / "alone", tmp_path / "ranks", step=STEPS)


LOOKING_AHEAD: dict[str, dict[str, Any]] = {
    "experts choose": {"type": "ExpertChoice"},
    "soft": {"type": "SoftMoE", "rows_per_expert": 2},
    "sinkhorn": {"type": "Sinkhorn"},
    "base": {"type": "Base"},
    "full": {"type": "TopK", "expert_capacity_factor": 0.5, "token_drop_policy": "Position"},
    "rerouted": {"type": "TopK", "expert_capacity_factor": 1.0, "overflow": "Reroute"},
    "queued": {"type": "TopK", "expert_capacity_factor": 0.5, "overflow": "Queue", "queue_passes": 2},
    "few or many": {"type": "TopP", "top_p": 0.3},
}


def test_a_rank_routes_its_own_texts_alone_wherever_the_experts_live(tmp_path: Path, text: Path) -> None:
    """Of whoever looks at other tokens: at those of its own rank."""
    named: dict[str, Any] = {"text": str(text), "routers": LOOKING_AHEAD}
    ranks = run_ranks(train_tasks.route_own_texts, num_ranks=2, size=2, store_path=str(tmp_path / "s"), **named)
    alone = train_tasks.route_own_texts(0, "", size=1, **named)
    for name in LOOKING_AHEAD:
        logits, gradients = alone[name]
        for rank, found in ranks.items():
            there, gradients_there = found[name]
            torch.testing.assert_close(torch.tensor(there[0]), torch.tensor(logits[rank]), rtol=0, atol=2e-5)
            for key, gradient in gradients.items():
                assert torch.allclose(
                    torch.tensor(gradients_there[key]), torch.tensor(gradient), rtol=1e-3, atol=1e-6
                ), (name, key)


@pytest.mark.parametrize("name", LOOKING_AHEAD)
def test_a_text_is_scored_as_it_would_be_generated_token_by_token(tmp_path: Path, text: Path, name: str) -> None:
    """Unless it is asked for whole texts, and then a router that looks ahead gives something else."""
    config = train_tasks.config_for(tmp_path, text, num_ranks=1)
    epm = train_tasks.trainer_for(config, train_tasks.even_map(1), 0, router=LOOKING_AHEAD[name]).epm
    assert epm.routed is not None
    for parameter in epm.module.parameters():  # a fresh model's experts hardly differ
        parameter.data.mul_(3.0)
    ids_BQ = train_tasks.own_texts(1)
    with torch.no_grad():
        scored_BQV = epm.module(input_ids=ids_BQ, use_cache=False).logits
        with epm.routed.scoring_whole_texts():
            whole_BQV = epm.module(input_ids=ids_BQ, use_cache=False).logits
    cache = epm.new_cache(num_rows=len(ids_BQ), max_length=ids_BQ.shape[1])
    for place in range(ids_BQ.shape[1]):
        places_B1 = torch.full((len(ids_BQ), 1), place)
        generated_BV = epm.forward_tokens(ids_BQ[:, place : place + 1], places_B1, range(len(ids_BQ)), cache)
        epm.commit()
        torch.testing.assert_close(generated_BV, scored_BQV[:, place], rtol=0, atol=1e-4)
    assert torch.allclose(whole_BQV, scored_BQV, atol=1e-4) == (not epm.routed.looks_ahead)


def test_each_experts_gradient_is_bounded_alike_on_all_its_copies(tmp_path: Path, text: Path) -> None:
    bounded: dict[str, Any] = {"router": BIASED, "max_expert_gradient_norm": 0.01}
    alone, alone_norms = _losses(tmp_path, text, "alone", num_ranks=1, **bounded)
    losses, norms = _losses(tmp_path, text, "ranks", num_ranks=4, **bounded)
    free_norms = _losses(tmp_path, text, "free", num_ranks=1, router=BIASED)[1]
    assert alone_norms[0] < free_norms[0]
    assert norms == pytest.approx(alone_norms, rel=1e-3)
    assert losses == pytest.approx(alone, rel=2e-5)


@pytest.mark.parametrize("where", ["forward", "gradients"])
def test_a_step_that_is_run_again_draws_and_routes_the_same(tmp_path: Path, text: Path, where: str) -> None:
    assert_a_lost_rank_leaves_no_trace(tmp_path, text, where=where, at_step=4, router=DRAWN)


def test_a_service_routes_as_the_model_was_trained(tmp_path: Path, text: Path) -> None:
    output = tmp_path / "output"
    trained = run_ranks(
        train_tasks.train_to_the_end,
        num_ranks=2,
        size=2,
        store_path=str(tmp_path / "store1"),
        output=str(output),
        text=str(text),
        router=BIASED,
    )
    bits, summary, _ = trained[0]
    assert evaluate_checkpoint(output, data=str(text)).full == pytest.approx(bits, abs=1e-4)
    assert summary.whole_text_bits_per_byte is None, "it looks at single tokens"

    alone = ExpertParallelModel.load(ModelSource(path=str(output)), expert_map=train_tasks.even_map(1), rank=0)
    assert alone.routed is not None
    bias_E = alone.routed.tensors()["moerator_router.0.kind.bias_E"]
    assert bias_E.abs().max() > 0, "the bias was trained and published"
    ids_BQ = torch.arange(3 * 12).view(3, 12) % 128
    with torch.no_grad():
        whole_BV = alone.module(input_ids=ids_BQ).logits[:, -1]
        bias_E.zero_()
        unbiased_BV = alone.module(input_ids=ids_BQ).logits[:, -1]
    assert not torch.allclose(unbiased_BV, whole_BV, atol=1e-4), "without it another way would be taken"

    def served(name: str, locality: LocalityConfig | None) -> tuple[list[list[float]], list[list[int]]]:
        logits, load = run_ranks(
            train_tasks.serve_like_trained,
            num_ranks=2,
            size=2,
            store_path=str(tmp_path / name),
            output=str(output),
            texts=ids_BQ.tolist(),
            locality=locality,
        )[0]
        return logits, load

    far = slice(train_tasks.NUM_EXPERTS // 2, None)
    logits, load = served("store2", None)
    torch.testing.assert_close(torch.tensor(logits), whole_BV, rtol=0, atol=1e-4)
    assert all(sum(row[far]) for row in load)
    _, near_load = served("store3", LocalityConfig(bias=100.0, budget_percent=100))
    assert not any(sum(row[far]) for row in near_load), "rank 0's tokens stay with its own experts"


def test_a_router_that_mixes_in_training_is_served_token_by_token_over_ranks(tmp_path: Path, text: Path) -> None:
    """Every token then takes all experts, more than the model's own number."""
    output = tmp_path / "output"
    named: dict[str, Any] = {"num_ranks": 2, "size": 2, "output": str(output)}
    store = str(tmp_path / "store1")
    router = LOOKING_AHEAD["soft"]
    run_ranks(train_tasks.train_to_the_end, store_path=store, text=str(text), router=router, **named)
    held = evaluate_checkpoint(output, data=str(text))
    assert held.whole_text is not None
    alone = ExpertParallelModel.load(ModelSource(path=str(output)), expert_map=train_tasks.even_map(1), rank=0)
    ids_BQ = train_tasks.own_texts(0)
    with torch.no_grad():
        expected_BV = alone.module(input_ids=ids_BQ).logits[:, -1]
    logits, load = run_ranks(
        train_tasks.serve_like_trained,
        store_path=str(tmp_path / "store2"),
        texts=ids_BQ.tolist(),
        locality=None,
        **named,
    )[0]
    torch.testing.assert_close(torch.tensor(logits), expected_BV, rtol=0, atol=1e-4)
    assert load == [[ids_BQ.numel()] * train_tasks.NUM_EXPERTS] * train_tasks.NUM_LAYERS


def test_a_users_router_that_is_another_on_every_rank_is_made_alike_or_refused(tmp_path: Path, text: Path) -> None:
    (tmp_path / "output").mkdir()
    whats = ["nothing", "passes", "beginning", "names", "shape"]
    results = run_ranks(
        train_tasks.train_with_unlike_routers,
        num_ranks=2,
        store_path=str(tmp_path / "store"),
        size=2,
        output=str(tmp_path / "output"),
        text=str(text),
        whats=whats,
    )
    expected = results[0]["nothing"]
    for found in results.values():
        assert found["nothing"] == expected
        torch.testing.assert_close(found["passes"], expected)  # sums in another order
        assert found["beginning"] == expected, "position 0's is taken"
        assert "ranks differ in the training text, the model's shape or its router" in found["shape"]
    assert [f"losses ['of rank {rank}']" in results[rank]["names"] for rank in (0, 1)] == [True, True]
