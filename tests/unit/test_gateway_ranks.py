"""A gateway's view of the ranks: whose word counts, and for how long."""

from moe_runtime.gateway.ranks import _DESERTED_S, RankDirectory


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_older_news_than_known_is_ignored_while_a_rank_confirms_the_known_epoch() -> None:
    clock = Clock()
    directory = RankDirectory(clock)
    directory.tell(5, [(0, "a")])
    clock.now += _DESERTED_S
    directory.clear("a")
    clock.now += _DESERTED_S
    assert not directory.tell(1, [(0, "new")])
    assert (directory.epoch, directory.active_uids()) == (5, ["a"])


def test_a_group_that_counts_from_one_again_is_followed_once_the_known_epoch_is_deserted() -> None:
    clock = Clock()
    directory = RankDirectory(clock)
    directory.tell(5, [(0, "a")])
    clock.now += _DESERTED_S + 1
    assert directory.tell(1, [(0, "new")])
    assert (directory.epoch, directory.active_uids()) == (1, ["new"])
