"""Damaged experts are found where they are put, on real ranks: before a move counts, and before an epoch steps."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import slot_tasks
from gloo_ranks import run_ranks

pytestmark = pytest.mark.integration
SOUND = [("", 0), ("", 0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return slot_tasks.write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, checkpoint: str) -> Iterator[dict[str, list[slot_tasks.Outcome]]]:
    """By case what rank 0 and rank 1 said, and how many wrong copies each had counted by then."""
    store = str(tmp_path_factory.mktemp("store") / "store")
    results = run_ranks(slot_tasks.check_slots, num_ranks=2, store_path=store, checkpoint=checkpoint)
    yield {case: [results[rank][case] for rank in (0, 1)] for case in results[0]}


@pytest.mark.parametrize("case", ["copies agree", "no copies", "a sound move"])
def test_what_is_sound_is_let_through(said: dict[str, list[slot_tasks.Outcome]], case: str) -> None:
    assert said[case] == SOUND


def test_of_two_copies_that_differ_the_one_that_is_not_what_its_source_says_goes(
    said: dict[str, list[slot_tasks.Outcome]],
) -> None:
    first, second = said["one copy is damaged as it is loaded"]
    assert first[0] == "ends: expert 2 of layer 1: memory is not what its source says"
    assert second[0] == ""


def test_a_move_that_brings_the_wrong_weights_is_refused_by_all_ranks_and_counted(
    said: dict[str, list[slot_tasks.Outcome]],
) -> None:
    why = "staged slots are not what they should be: expert 2 of layer 1"
    assert said["a move that brings another expert's weights"] == [(why, 1), (why, 0)]
    assert [text for text, _ in said["the move in force"]] == ["", ""], "read again it is sound"


def test_an_only_copy_is_held_against_what_was_agreed_on_when_it_lay_elsewhere(
    said: dict[str, list[slot_tasks.Outcome]],
) -> None:
    newcomer, holder = said["an only copy is damaged, the other rank is new"]
    assert newcomer[0] == ""
    assert holder[0] == "ends: expert 2 of layer 1: memory is not what its source says"


def test_a_rank_that_is_to_leave_takes_part_in_the_check(tmp_path: Path, checkpoint: str) -> None:
    results = run_ranks(slot_tasks.check_leaver, num_ranks=2, store_path=str(tmp_path / "store"), checkpoint=checkpoint)
    assert [results[0], results[1]] == SOUND
