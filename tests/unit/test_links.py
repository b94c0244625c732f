"""Links between ranks: when they are measured, how it is put together, and what the planner makes of it."""

from itertools import combinations
from typing import Any, cast

import numpy as np
import pytest

from moe_core.contract.links import MOST_PLACES, Link, Links, LinkSpeed
from moe_core.contract.membership import Member, Membership
from moe_core.experts.links import seconds_per_byte
from moe_runtime.coordinator.links import links_of
from moe_runtime.membership.group import EpochGroup
from moe_runtime.membership.link_probe import rounds_of
from moe_runtime.rank import links as rank_links
from moe_runtime.rank.links import LinkBook


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 31])
def test_in_a_tournament_everybody_meets_everybody_once(size: int) -> None:
    pairs = [(i, p) for partners in rounds_of(size, most=99) for i, p in enumerate(partners) if i < p]
    assert sorted(pairs) == list(combinations(range(size), 2))


def test_of_a_large_group_rounds_are_left_out_and_partners_still_agree() -> None:
    rounds = rounds_of(100, most=9)
    assert len(rounds) == 9
    assert all(partners[partners[i]] == i for partners in rounds for i in range(100))


def epoch(*uids: str) -> Membership:
    members = tuple(Member(rank=rank, pod_uid=uid, address="h:1") for rank, uid in enumerate(uids))
    return Membership(epoch=1, members=members, map_digest="")


class Probes:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        monkeypatch.setattr(rank_links, "probe_links", self.probe)

    def probe(self, _: object) -> dict[int, LinkSpeed]:
        self.made += 1
        return {1: LinkSpeed(latency_us=5, bytes_per_s=1e9)}


def boundary(book: LinkBook, members: Membership, *, probe: int = 0, others: tuple[int, ...] = (0,)) -> bool:
    asks = book.asks(members, probe=probe)
    return book.follow(members, cast("EpochGroup", None), [asks, *others])


def test_links_are_measured_when_a_pod_is_new_and_when_asked_and_not_again_after_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes, book = Probes(monkeypatch), LinkBook()
    steps: list[tuple[Membership, int]] = [
        (epoch("a", "b", "c"), 0),
        (epoch("a", "b", "c"), 0),
        (epoch("a", "b"), 0),
        (epoch("a", "b", "d"), 0),
        (epoch("a", "b", "d"), 7),
        (epoch("a", "b", "d"), 7),
    ]
    assert [boundary(book, members, probe=probe) for members, probe in steps] == [True, False, False, True, True, False]
    assert [(link.rank, link.bytes_per_s) for link in book.links] == [(1, 1e9)]
    assert probes.made == 3


def test_a_rank_goes_along_when_another_one_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    Probes(monkeypatch)
    book = LinkBook()
    members = epoch("a", "b")
    assert boundary(book, members)
    assert boundary(book, members, others=(2 * 9 + 1,))
    assert not boundary(book, members, probe=9)  # it was told later and has been asked already


def test_pods_whose_probe_ended_in_a_fault_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(_: object) -> Any:
        raise ConnectionError

    monkeypatch.setattr(rank_links, "probe_links", fault)
    book = LinkBook()
    with pytest.raises(ConnectionError):
        boundary(book, epoch("a", "b", "c"))
    assert not boundary(book, epoch("a", "b"))


def test_a_rank_alone_has_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    Probes(monkeypatch)
    assert not boundary(LinkBook(), epoch("a"), others=())


def link(rank: int, mb_per_s: float) -> Link:
    return Link(rank=rank, latency_us=10, bytes_per_s=mb_per_s * 1e6)


PLACES = {0: "a", 1: "a", 2: "b"}
TOLD = {
    0: (link(0, 9000), link(1, 500), link(2, 100)),
    1: (link(0, 500), link(2, 50), link(7, 1)),
    2: (link(0, 40),),
}


def test_measurements_are_means_of_times_by_scope_and_by_pair_of_machines() -> None:
    links = links_of(PLACES, TOLD)
    assert links is not None
    assert {scope: speed.bytes_per_s for scope, speed in links.scopes.items()} == {
        "host": 500e6,
        "network": 54.5e6,  # three times: 10, 20 and 25 s for a gigabyte
        "self": 9000e6,
    }
    assert links.places == ("a", "b")
    between = [[None if speed is None else speed.bytes_per_s for speed in row] for row in links.between]
    assert between == [[500e6, 66.7e6], [40e6, None]]


def test_nothing_is_told_before_anybody_measured_another_rank() -> None:
    assert links_of(PLACES, {0: (link(0, 9000),)}) is None


def test_of_many_machines_only_scopes_are_told_apart() -> None:
    places = {rank: f"n{rank}" for rank in range(MOST_PLACES + 1)}
    links = links_of(places, {0: (link(1, 100),)})
    assert links is not None
    assert (links.places, links.between) == ((), ())


def test_the_planner_takes_what_was_measured_and_the_mean_of_the_scope_for_what_was_not() -> None:
    links = Links(
        scopes={
            "host": LinkSpeed(latency_us=1, bytes_per_s=5e9),
            "network": LinkSpeed(latency_us=9, bytes_per_s=1e8),
        },
        places=("a", "b"),
        between=((None, LinkSpeed(latency_us=9, bytes_per_s=2e8)), (None, None)),
    )
    cost_RR = seconds_per_byte(links, ("a", "a", "b"))
    assert cost_RR is not None
    np.testing.assert_allclose(cost_RR, [[0, 2e-10, 5e-9], [2e-10, 0, 5e-9], [1e-8, 1e-8, 0]])


def test_on_one_machine_links_decide_nothing() -> None:
    links = Links(scopes={"host": LinkSpeed(latency_us=1, bytes_per_s=5e9)})
    assert seconds_per_byte(links, ("a", "a")) is None
    assert seconds_per_byte(None, ("a", "b")) is None
