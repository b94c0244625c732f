"""Ranks agree on the next epoch after real deaths and real hangs, and step on."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from membership_lab import STEP_MS, Event, Lab, Program, RankProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    made = Program()
    yield made
    made.close()


@pytest.fixture
def ranks_lab(program: Program, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(program, tmp_path)
    yield made
    made.close()


def report_split(what: str, fault_at: float, resumed: dict[str, Event]) -> float:
    """Prints the parts as the slowest rank saw them; seconds from the fault to the first step of the new epoch."""
    detect_ms = max((e["parts"]["detected_at"] - fault_at) * 1000 for e in resumed.values())
    agree_ms = max(e["parts"]["agree_ms"] for e in resumed.values())
    rebuild_ms = max(e["parts"]["rebuild_ms"] for e in resumed.values())
    total_s: float = max(e["at"] for e in resumed.values()) - fault_at
    print(
        f"{what}: detect {detect_ms:.0f} ms, agree {agree_ms:.0f} ms, rebuild {rebuild_ms:.0f} ms, all {total_s:.2f} s"
    )
    return total_s


def test_survivors_of_a_killed_rank_step_on_within_two_seconds(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(4)
    fault_at = ranks[2].kill()
    resumed = ranks_lab.settled({"p0", "p1", "p3"}, above=1)
    assert {e["epoch"] for e in resumed.values()} == {2}
    assert report_split("one of four killed", fault_at, resumed) < 2.0


def test_a_stopped_rank_is_excluded_at_the_deadline_and_fenced_by_its_guard(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(4)
    fault_at = ranks[1].kill(signal.SIGSTOP)
    resumed = ranks_lab.settled({"p0", "p2", "p3"}, above=1)
    ended = ranks_lab.wait(lambda e: e["event"] == "ended" and e["uid"] == "p1")
    total_s = report_split("one of four stopped", fault_at, resumed)
    assert STEP_MS / 1000 * 0.9 < total_s < STEP_MS / 1000 + 2.5
    assert "out of the epoch" in ended["reason"]


def test_a_stopped_lowest_rank_is_excluded_too(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(4)
    fault_at = ranks[0].kill(signal.SIGSTOP)
    resumed = ranks_lab.settled({"p1", "p2", "p3"}, above=1)
    report_split("lowest of four stopped", fault_at, resumed)
    assert {e["epoch"] for e in resumed.values()} == {2}


def test_of_two_halves_the_one_with_the_lowest_rank_goes_on(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(4)
    fault_at = min(ranks[2].kill(), ranks[3].kill())
    resumed = ranks_lab.settled({"p0", "p1"}, above=1)
    report_split("two of four killed", fault_at, resumed)
    assert set(resumed) == {"p0", "p1"}


def test_a_half_without_the_lowest_rank_stops_until_the_others_are_vouched_dead(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(4)
    ranks[0].kill()
    ranks[1].kill()
    ranks_lab.wait(lambda e: e["event"] == "minority" and e["uid"] == "p2")
    assert not [e for e in ranks_lab.events if e["event"] == "stepping" and e["epoch"] > 1]
    ranks_lab.tell("vouch", ["p0", "p1"])
    assert set(ranks_lab.settled({"p2", "p3"}, above=1)) == {"p2", "p3"}


def test_the_last_of_four_goes_on_only_once_the_three_are_vouched_dead(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(4)
    for rank in ranks[:3]:
        rank.kill()
    ranks_lab.wait(lambda e: e["event"] == "minority" and e["uid"] == "p3")
    vouched_at = time.time()
    ranks_lab.tell("vouch", ["p0", "p1", "p2"])
    resumed = ranks_lab.settled({"p3"}, above=1)
    print(f"alone after a vouching: {resumed['p3']['at'] - vouched_at:.2f} s")
    assert resumed["p3"]["members"] == ["p3"]


def test_the_proposer_may_die_in_the_middle_of_the_agreement(ranks_lab: Lab) -> None:
    ranks = [ranks_lab.start(rank, f"p{rank}", dies_in_recovery=rank == 0) for rank in range(5)]
    ranks_lab.tell("form", {"epoch": 1, "members": [r.member() for r in ranks], "map_digest": "map-1"})
    ranks_lab.settled({r.uid for r in ranks})
    fault_at = ranks[3].kill()
    resumed = ranks_lab.settled({"p1", "p2", "p4"}, above=1)
    report_split("one killed, then the proposer", fault_at, resumed)
    assert set(resumed) == {"p1", "p2", "p4"}


def test_two_killed_at_once_and_one_more_during_the_recovery(ranks_lab: Lab) -> None:
    ranks = [ranks_lab.start(rank, f"p{rank}", dies_in_recovery=rank == 2) for rank in range(6)]
    ranks_lab.tell("form", {"epoch": 1, "members": [r.member() for r in ranks], "map_digest": "map-1"})
    ranks_lab.settled({r.uid for r in ranks})
    fault_at = ranks[4].kill()
    ranks[5].kill()
    resumed = ranks_lab.settled({"p0", "p1", "p3"}, above=1)
    report_split("two killed, then a third", fault_at, resumed)
    assert set(resumed) == {"p0", "p1", "p3"}


def test_a_rank_that_wakes_up_after_its_exclusion_learns_that_it_is_out(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(4)
    ranks[1].kill(signal.SIGSTOP)
    # Its guard is stopped too, so nobody can fence it: it has to find out by itself.
    guard_pid = ranks[1].guard_pid
    os.kill(guard_pid, signal.SIGSTOP)
    ranks_lab.settled({"p0", "p2", "p3"}, above=1)
    ranks[1].kill(signal.SIGCONT)
    fenced = ranks_lab.wait(lambda e: e["event"] == "fenced" and e["uid"] == "p1")
    assert "not in epoch 2" in fenced["why"]
    assert not [e for e in ranks_lab.events if e["event"] == "stepping" and e["uid"] == "p1" and e["epoch"] > 1]


def test_a_joiner_takes_part_after_a_planned_change_at_a_boundary(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(3)
    joiner = ranks_lab.start(3, "p3", is_joiner=True)
    change(ranks_lab, 2, [*ranks, joiner])
    stepping = ranks_lab.settled({"p0", "p1", "p2", "p3"}, above=1)
    assert {(e["epoch"], e["map"]) for e in stepping.values()} == {(2, "map-2")}
    assert not [e for e in ranks_lab.events if e["event"] == "fault"]


def test_a_leaver_leaves_at_a_boundary_even_if_it_is_the_lowest_rank(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(3)
    change(ranks_lab, 2, ranks[1:])
    stepping = ranks_lab.settled({"p1", "p2"}, above=1)
    left = ranks_lab.wait(lambda e: e["event"] == "left")
    assert left["uid"] == "p0"
    assert {e["epoch"] for e in stepping.values()} == {2}


def test_a_dead_rank_is_replaced_by_a_new_pod_of_the_same_rank(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(4)
    ranks[0].kill()
    ranks_lab.settled({"p1", "p2", "p3"}, above=1)
    successor = ranks_lab.start(0, "p0b", is_joiner=True)
    change(ranks_lab, 3, [successor, *ranks[1:]])
    assert set(ranks_lab.settled({"p0b", "p1", "p2", "p3"}, above=2)) == {"p0b", "p1", "p2", "p3"}


def test_a_joiner_that_is_dead_before_the_change_leaves_the_members_as_they_are(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(2)
    joiner = ranks_lab.start(2, "p2", is_joiner=True)
    joiner.kill()
    change(ranks_lab, 2, [*ranks, joiner])
    stepping = ranks_lab.settled({"p0", "p1"}, above=1)
    assert {(e["epoch"], e["map"]) for e in stepping.values()} == {(2, "map-1")}


def test_a_joiner_that_dies_before_the_group_is_built_heals_to_an_epoch_without_it(ranks_lab: Lab) -> None:
    ranks = ranks_lab.form(3)
    joiner = ranks_lab.start(3, "p3", is_joiner=True, dies_on_entry=True)
    change(ranks_lab, 2, [*ranks, joiner])
    stepping = ranks_lab.settled({"p0", "p1", "p2"}, above=2)
    assert {(e["epoch"], e["map"]) for e in stepping.values()} == {(3, "map-2")}


def test_a_member_that_dies_in_the_middle_of_a_change_does_not_stop_the_others(ranks_lab: Lab) -> None:
    ranks = [ranks_lab.start(rank, f"p{rank}", dies_in_change=rank == 0) for rank in range(4)]
    ranks_lab.tell("form", {"epoch": 1, "members": [r.member() for r in ranks], "map_digest": "map-1"})
    ranks_lab.settled({r.uid for r in ranks})
    change(ranks_lab, 2, ranks)
    assert set(ranks_lab.settled({"p1", "p2", "p3"}, above=1)) == {"p1", "p2", "p3"}


def test_a_rank_that_gives_up_its_place_holds_nobody_up_and_may_come_back(ranks_lab: Lab) -> None:
    ranks = [ranks_lab.start(rank, f"p{rank}", gives_up=1 if rank == 0 else None) for rank in range(2)]
    ranks_lab.tell("form", {"epoch": 1, "members": [r.member() for r in ranks], "map_digest": "map-1"})
    alone = ranks_lab.settled({"p1"}, above=1)
    assert alone["p1"]["parts"]["agree_ms"] < 1000
    change(ranks_lab, 3, ranks)
    assert set(ranks_lab.settled({"p0", "p1"}, above=2)) == {"p0", "p1"}
    assert not [e for e in ranks_lab.events if e["event"] == "ended"], "it must not be fenced"


def test_thirty_rebuilds_leak_neither_threads_nor_files(ranks_lab: Lab) -> None:
    ranks_lab.form(4, rebuilds=30)
    last = ranks_lab.settled({"p0", "p1", "p2", "p3"}, above=30, timeout_s=40)
    early = {e["uid"]: e for e in ranks_lab.events if e["event"] == "stepping" and e["epoch"] == 5}
    print({uid: [(early[uid]["parts"][k], last[uid]["parts"][k]) for k in ("task", "fd")] for uid in sorted(last)})
    print(f"mean of 29 rebuilds: {(last['p0']['at'] - early['p0']['at']) / 26 * 1000:.0f} ms")
    for uid, event in last.items():
        assert event["parts"]["task"] <= early[uid]["parts"]["task"] + 4, "threads of old groups are still there"
        assert event["parts"]["fd"] <= early[uid]["parts"]["fd"] + 4, "files of old groups are still open"


def change(ranks_lab: Lab, epoch: int, members: list[RankProcess]) -> None:
    """Every current member finds this order and takes it at the boundary where all have found it."""
    content = {"epoch": epoch, "members": [m.member() for m in members], "map_digest": f"map-{epoch}"}
    ranks_lab.tell(f"change-{epoch}", content)
