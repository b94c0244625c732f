"""How a gateway learns who is a member: from the coordinator's word and the ranks' own."""

from typing import Any

import pytest

from moe_core.contract.exchange import RankPhase
from moe_core.contract.membership import Member, Membership
from moe_runtime.gateway.ranks import _DESERTED_S, RankDirectory
from moe_runtime.gateway.replay import RankUnreachable
from moe_runtime.gateway.scout import Scout
from moe_runtime.registration import MembersView, RankView


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Views:
    """Ranks by pod uid: what each says of its membership, or the error that a call to it ends with."""

    def __init__(self, **says: Membership | RankUnreachable | None) -> None:
        self.says = says

    async def view(self, pod_uid: str) -> Membership | None:
        said = self.says[pod_uid]
        if isinstance(said, RankUnreachable):
            raise said
        return said

    def forget(self, living: set[str]) -> None:
        self.says = {uid: said for uid, said in self.says.items() if uid in living}


def epoch(number: int, *uids: str) -> Membership:
    members = tuple(Member(rank=i, pod_uid=uid, address="h:1") for i, uid in enumerate(uids))
    return Membership(epoch=number, members=members, map_digest="m")


def told(number: int, **phases: RankPhase) -> MembersView:
    ranks = tuple(RankView(rank=i, pod_uid=uid, phase=phase) for i, (uid, phase) in enumerate(phases.items()))
    return MembersView(epoch=number, ranks=ranks, covered=3, total=4)


def scout(clock: Clock, views: Views) -> tuple[Scout, RankDirectory]:
    directory = RankDirectory(clock)
    nobody: Any = None  # environment and counts matter to the coordinator's side only
    return Scout(nobody, directory, views, nobody), directory


def usable(directory: RankDirectory) -> list[str]:
    return [known.pod_uid for known in directory.usable()]


async def test_a_draining_rank_gets_no_new_request_though_it_is_still_a_member() -> None:
    follower, directory = scout(Clock(), Views(a=epoch(3, "a", "b"), b=epoch(3, "a", "b")))
    follower.take(told(3, a="Active", b="Draining"))
    for _ in range(2):
        await follower.ask_next()
    assert (usable(directory), directory.covered, directory.total) == (["a"], 3, 4)


async def test_a_coordinator_that_knows_nobody_yet_changes_nothing() -> None:
    follower, directory = scout(Clock(), Views())
    follower.take(told(3, a="Active"))
    follower.take(MembersView(epoch=0, ranks=()))
    assert (usable(directory), directory.epoch) == (["a"], 3)


async def test_a_newer_epoch_is_learned_from_the_ranks_alone() -> None:
    follower, directory = scout(Clock(), Views(a=epoch(4, "a", "c"), b=epoch(4, "a", "c")))
    follower.take(told(3, a="Active", b="Active"))
    await follower.ask_next()
    assert (sorted(usable(directory)), directory.epoch) == (["a", "c"], 4)


@pytest.mark.parametrize("said", [RankUnreachable("silent"), None])
async def test_a_rank_that_is_silent_or_in_no_epoch_gets_no_request_for_a_while(said: RankUnreachable | None) -> None:
    clock = Clock()
    follower, directory = scout(clock, Views(a=said))
    follower.take(told(3, a="Active"))
    await follower.ask_next()
    assert usable(directory) == []
    clock.now += 5
    assert usable(directory) == ["a"]


async def test_a_rank_that_is_known_to_be_dead_is_never_asked_again() -> None:
    clock = Clock()
    follower, directory = scout(clock, Views(a=RankUnreachable("gone", is_gone=True)))
    follower.take(told(3, a="Active"))
    await follower.ask_next()
    clock.now += 60
    assert (usable(directory), directory.active_uids()) == ([], [])


async def test_a_coordinator_that_counts_from_one_again_is_believed_once_nobody_confirms_the_old_epoch() -> None:
    clock = Clock()
    follower, directory = scout(clock, Views(a=RankUnreachable("gone", is_gone=True)))
    follower.take(told(7, a="Active"))
    await follower.ask_next()
    follower.take(told(1, new="Active"))
    assert directory.epoch == 7
    clock.now += _DESERTED_S + 1
    follower.take(told(1, new="Active"))
    assert (usable(directory), directory.epoch) == (["new"], 1)
