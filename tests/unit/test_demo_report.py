"""The demo's figures: when it may end with 0, and what dies with a rank."""

import json

import pytest

from moe_core.contract.exchange import Recovery, TrainingProgress
from moe_core.contract.expert_map import ExpertMap
from moe_operator.demo import what_dies
from moe_operator.demo_report import Figures, Quality
from moe_operator.load_generator import Tally


def good() -> Figures:
    figures = Figures(covered=True, drill={"verdict": "Passed", "detectedSeconds": "0.1"})
    figures.tally = Tally(sent=10, ok=10)
    figures.quality = Quality(full=2.4, generalist=2.5, drop=2.6, order2=2.6)
    figures.training = TrainingProgress(step=9, heldout_bits_per_byte=2.4, order2_bits_per_byte=2.6)
    return figures


def test_a_run_that_went_well_keeps_its_promise() -> None:
    assert good().broken_promises() == []


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda f: f.tally.failures.update(["status 500"]), "1 requests failed"),
        (lambda f: setattr(f, "tally", Tally()), "no request was answered"),
        (lambda f: setattr(f, "covered", False), "live copy"),
        (lambda f: setattr(f, "drill", {"verdict": "Failed", "message": "late"}), "late"),
        (lambda f: setattr(f, "quality", Quality(2.4, 2.7, 2.6, 2.6)), "did not beat dropping"),
        (lambda f: setattr(f, "quality", Quality(2.4, None, 2.6, 2.6)), "did not beat dropping"),
        (lambda f: setattr(f, "training", None), "no held-out figures"),
    ],
)
def test_one_thing_that_went_wrong_breaks_it_and_is_named(spoil: object, word: str) -> None:
    figures = good()
    assert callable(spoil)
    spoil(figures)
    assert [broken for broken in figures.broken_promises() if word in broken] != []


def test_the_json_holds_the_split_of_the_recovery() -> None:
    figures = good()
    times = {"detected_at": 10.0, "agreed_at": 10.1, "rebuilt_at": 10.3, "resumed_at": 10.35}
    figures.recoveries = (Recovery(epoch=2, lost_ranks=(2,), **times),)
    said = json.loads(json.dumps(figures.as_json()))
    assert said["failure"]["recovery_ms"] == {"agree": 100.0, "rebuild": 200.0, "step": 50.0}


def test_an_expert_dies_only_where_no_other_rank_holds_it() -> None:
    expert_map = ExpertMap(
        generation=1,
        num_logical_experts=4,
        slots_of_rank=(3, 3),
        logical_of_slot=((0, 1, 2, 2, 3, 3), (0, 1, 2, 3, 0, 1)),
    )
    loss = what_dies(expert_map, 1)
    assert loss.copied == ((0, 2), (1, 0), (1, 1))
    assert loss.uncopied == ((0, 3), (1, 3))
