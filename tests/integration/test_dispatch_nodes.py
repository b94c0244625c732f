"""Dispatch by node and in fewer bits over real Gloo: what one process gives, fewer bytes, and no hang."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numerics_tasks as tasks
from gloo_ranks import run_ranks
from moe_core.contract.dispatch import Wire
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import DispatchConfig
from moe_core.experts.relayed import traffic_by_node
from moe_core.experts.tiers import side_by_side
from moe_core.experts.traffic import StepShape, Traffic, traffic_by_pick
from numerics_reference import Reference
from numerics_tasks import Fault

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

FAMILY = "qwen3_moe"
LAYERS = tasks.num_moe_layers(FAMILY)
BY_NODE = DispatchConfig(hierarchy="ByNode")
TWICE = ExpertMap(
    generation=1,
    num_logical_experts=tasks.NUM_EXPERTS,
    slots_of_rank=(4, 4, 4, 4),
    logical_of_slot=((0, 1, 2, 6, 3, 4, 5, 7, 6, 7, 0, 1, 2, 3, 4, 5),) * LAYERS,
)
UNEVEN = ExpertMap(
    generation=1,
    num_logical_experts=tasks.NUM_EXPERTS,
    slots_of_rank=(5, 0, 1, 3),
    logical_of_slot=((0, 1, 2, 3, 4, 5, 6, 7, 0),) * LAYERS,
)


def forward(tmp_path: Path, reference: Reference, expert_map: ExpertMap, **arguments: Any) -> dict[int, Any]:
    return run_ranks(
        tasks.forward_and_gradients,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=expert_map,
        world=4,
        **arguments,
    )


@pytest.mark.parametrize("expert_map", [TWICE, UNEVEN], ids=["copies", "a_rank_without_slots"])
@pytest.mark.parametrize("nodes", ["aabb", "abbb", "aaaa", "abcd"])
def test_by_node_logits_and_gradients_are_those_of_one_process(
    nodes: str, expert_map: ExpertMap, references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references[FAMILY]
    results = forward(tmp_path, reference, expert_map, nodes=nodes, dispatch=BY_NODE)
    assert_as_one_process(results, reference)


def assert_as_one_process(results: dict[int, Any], reference: Reference) -> None:
    logits, gradients = reference.logits_and_gradients(4)
    for rank in range(4):
        assert np.abs(results[rank]["logits"] - logits[rank]).max() < 1e-4
    for name in results[0]["dense"]:
        summed = sum(results[rank]["dense"][name] for rank in range(4))
        np.testing.assert_allclose(summed, gradients[name].numpy(), rtol=1e-3, atol=1e-4)
    for name in results[0]["experts"]:
        for expert in range(tasks.NUM_EXPERTS):
            rows = [results[r]["experts"].get(name, {}).get(expert) for r in range(4)]
            summed = sum(row for row in rows if row is not None)
            np.testing.assert_allclose(summed, gradients[name][expert].numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hierarchy", ["Flat", "ByNode"])
def test_in_two_batches_logits_and_gradients_are_the_same(
    hierarchy: Any, references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references[FAMILY]
    dispatch = DispatchConfig(hierarchy=hierarchy, overlap="TwoBatch")
    results = forward(tmp_path, reference, UNEVEN, nodes="aabb", dispatch=dispatch)
    assert_as_one_process(results, reference)


@pytest.mark.parametrize(("wire", "most"), [("BFloat16", 0.004), ("Float8", 0.04), ("Int8", 0.02)])
@pytest.mark.parametrize("hierarchy", ["Flat", "ByNode"])
def test_fewer_bits_send_what_the_model_says_and_tell_their_error(
    hierarchy: Any, wire: Wire, most: float, references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references[FAMILY]
    dispatch = DispatchConfig(hierarchy=hierarchy, wire=wire, combine_wire=wire)
    results = forward(tmp_path, reference, TWICE, nodes="aabb", dispatch=dispatch)
    for rank in range(4):
        error = results[rank]["wire_error"]
        assert sorted(error) == ["combine", "dispatch", "gradient"]
        assert 0 < error["dispatch"] < most
        assert 0 < error["gradient"] < 0.004
    sent_RR = np.asarray([results[rank]["sent"] for rank in range(4)])
    expected_RR = modelled(results, hierarchy, wire).total_RR
    between = np.asarray([[a != b for b in "aabb"] for a in "aabb"])
    assert sent_RR[between].sum() == pytest.approx(expected_RR[between].sum(), rel=0.1)
    assert sent_RR.sum() == pytest.approx(expected_RR.sum(), rel=0.1)


def modelled(results: dict[int, Any], hierarchy: str, wire: Wire) -> Traffic:
    load = np.asarray([results[rank]["load"] for rank in range(4)])
    tokens = sum(tasks.batch_of_rank(rank, 4).numel() for rank in range(4)) / 4
    shape = StepShape(tokens, hidden_size=32, top_k=2, wire=wire, combine_wire=wire)
    if hierarchy == "ByNode":
        return traffic_by_node(TWICE, load, shape, node_of_rank="aabb", trains=True)
    return traffic_by_pick(TWICE, load, shape, trains=True, domain_of_rank="aabb")


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
@pytest.mark.parametrize("exchange", [2, 9, 17, 24], ids=["cross", "home", "backward", "backward_end"])
def test_a_rank_lost_in_the_middle_of_a_relay_faults_the_others_in_time_and_the_repeat_is_exact(
    exchange: int, kind: signal.Signals, references: dict[str, Reference], tmp_path: Path
) -> None:
    """Five exchanges a layer forward (counts, across, fan out, home, across), four backward; three layers."""
    lose_a_rank(exchange, kind, BY_NODE, references[FAMILY], tmp_path)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
@pytest.mark.parametrize("exchange", [2, 4, 6, 15, 22], ids=["rows", "results", "second_layer", "backward", "later"])
def test_a_fault_while_two_batches_are_on_their_way_ends_both_in_time(
    exchange: int, kind: signal.Signals, references: dict[str, Reference], tmp_path: Path
) -> None:
    """Four exchanges a layer forward, counts go with the rows, and four backward; three layers."""
    lose_a_rank(exchange, kind, DispatchConfig(hierarchy="Flat", overlap="TwoBatch"), references[FAMILY], tmp_path)


def lose_a_rank(
    exchange: int,
    kind: signal.Signals,
    dispatch: DispatchConfig,
    reference: Reference,
    tmp_path: Path,
    *,
    expert_map: ExpertMap = TWICE,
) -> None:
    results = run_ranks(
        tasks.train_through_fault,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=expert_map,
        world=4,
        fault=Fault(victim=3, exchange=exchange, after=False, signal=kind),
        nodes="aabb",
        dispatch=dispatch,
        timeout_ms=1500,
        expected_ranks={0, 1, 2},
    )
    for rank in range(3):
        logits = reference.model(input_ids=tasks.batch_of_rank(rank, 4)).logits.detach().numpy()
        assert results[rank]["outcome"] == "fault"
        assert results[rank]["seconds"] < 4
        assert np.abs(results[rank]["logits"] - logits).max() <= 1e-4


GROUPS = side_by_side(
    ExpertMap(
        generation=1,
        num_logical_experts=tasks.NUM_EXPERTS,
        slots_of_rank=(4, 4),
        logical_of_slot=((0, 1, 2, 6, 3, 4, 5, 7),) * LAYERS,
    ),
    2,
)
IN_GROUPS = DispatchConfig(hierarchy="Flat", group_ranks=2)


def test_tokens_stay_in_their_ep_group_and_gradients_are_those_of_one_process(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    results = forward(tmp_path, references[FAMILY], GROUPS, nodes="abab", dispatch=IN_GROUPS)
    assert_as_one_process(results, references[FAMILY])
    sent_RR = np.asarray([results[rank]["sent"] for rank in range(4)])
    counts = LAYERS * 4 * 8  # of four slots, told before the rows
    assert (sent_RR[:2, 2:] == counts).all()
    assert (sent_RR[2:, :2] == counts).all()
    assert (sent_RR[:2, :2] > counts).all()


def test_an_ep_group_that_lost_a_rank_asks_the_other_one(references: dict[str, Reference], tmp_path: Path) -> None:
    lose_a_rank(9, signal.SIGKILL, IN_GROUPS, references[FAMILY], tmp_path, expert_map=GROUPS)
