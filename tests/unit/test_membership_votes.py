"""Votes of one rank: what it promises, what it learns, and when it is out."""

import pytest

from moe_core.contract.membership import Member, Membership
from moe_runtime.errors import Fenced
from moe_runtime.membership.agreement import Acceptor, Ballot, Promise, Proposal, Refusal
from moe_runtime.membership.ledger import Ledger


def member(rank: int, incarnation: str = "a") -> Member:
    return Member(rank=rank, pod_uid=f"p{rank}{incarnation}", address=f"10.0.0.{rank}:1")


def epoch(number: int, *ranks: int) -> Membership:
    return Membership(epoch=number, members=tuple(member(r) for r in ranks), map_digest="m")


def ledger_in(current: Membership, rank: int) -> Ledger:
    ledger = Ledger(member(rank))
    ledger.learn(current)
    assert ledger.take_up() == current
    return ledger


def test_the_newest_accepted_value_is_kept_by_a_later_proposal() -> None:
    proposal = Proposal(Ballot(9, 0), "mine", lambda ranks: len(ranks) >= 3)
    proposal.on_promise(0, Promise(Ballot(9, 0), (Ballot(2, 1), "older")))
    proposal.on_promise(1, Promise(Ballot(9, 0), (Ballot(5, 2), "newest")))
    proposal.on_promise(2, Promise(Ballot(9, 0), None))
    assert proposal.value == "newest"


def test_a_late_promise_does_not_change_the_value_that_is_out_already() -> None:
    proposal = Proposal(Ballot(9, 0), "mine", lambda ranks: len(ranks) >= 1)
    proposal.on_promise(0, Promise(Ballot(9, 0), None))
    assert proposal.value == "mine"
    proposal.on_promise(1, Promise(Ballot(9, 0), (Ballot(5, 2), "late")))
    assert proposal.value == "mine"


def test_an_acceptor_refuses_what_is_older_than_its_promise_and_says_which() -> None:
    acceptor: Acceptor[str] = Acceptor()
    acceptor.prepare(Ballot(3, 1))
    assert acceptor.accept(Ballot(2, 9), "old") == Refusal(Ballot(3, 1))
    assert acceptor.accept(Ballot(3, 1), "new") is None


def test_a_decision_changes_nothing_under_a_running_step_until_it_is_taken_up() -> None:
    ledger = ledger_in(epoch(1, 0, 1, 2), rank=0)
    ledger.learn(epoch(2, 0, 1))
    assert ledger.current == epoch(1, 0, 1, 2)
    assert ledger.take_up() == epoch(2, 0, 1)
    assert ledger.current == epoch(2, 0, 1)


def test_a_rank_that_hears_of_an_epoch_without_it_is_fenced_and_takes_nothing_up() -> None:
    ledger = ledger_in(epoch(1, 0, 1, 2), rank=2)
    ledger.learn(epoch(2, 0, 1))
    assert ledger.take_up() is None
    with pytest.raises(Fenced, match="rank 2 of epoch 1 is not in epoch 2"):
        ledger.check()


def test_a_rank_that_was_excluded_does_not_go_back_to_an_older_epoch_that_names_it() -> None:
    ledger = ledger_in(epoch(1, 0, 1, 2), rank=2)
    ledger.learn(epoch(3, 0, 1))
    ledger.step_out()
    ledger.learn(epoch(2, 0, 1, 2))
    assert ledger.take_up() is None


def test_another_incarnation_of_the_same_rank_is_no_member() -> None:
    ledger = Ledger(member(1, "b"))
    ledger.learn(epoch(4, 0, 1))
    assert ledger.take_up() is None


def test_a_rank_has_no_vote_on_an_epoch_that_is_decided_already() -> None:
    ledger = ledger_in(epoch(1, 0, 1), rank=1)
    ledger.learn(epoch(2, 0, 1))
    assert ledger.prepare(epoch(1, 0, 1), Ballot(1, 0)) is None
    assert isinstance(ledger.prepare(epoch(2, 0, 1), Ballot(1, 0)), Promise)


def test_a_proposal_tells_a_voter_of_the_epoch_it_stands_on() -> None:
    ledger = ledger_in(epoch(1, 0, 1, 2), rank=2)
    assert isinstance(ledger.prepare(epoch(5, 0, 2), Ballot(1, 0)), Promise)
    assert ledger.known_epoch == 5


def test_a_minority_is_a_quorum_only_with_everybody_else_vouched_dead() -> None:
    base = epoch(1, 0, 1, 2, 3)
    ledger = ledger_in(base, rank=3)
    alone = frozenset({3})
    ledger.vouch(["p0a", "p1a"])
    assert not ledger.is_quorum(base, alone)
    ledger.vouch(["p2a"])
    assert ledger.is_quorum(base, alone)
    assert not ledger.is_quorum(base, frozenset())


def test_a_vouching_for_another_incarnation_counts_for_nothing() -> None:
    base = epoch(1, 0, 1)
    ledger = ledger_in(base, rank=1)
    ledger.vouch(["p0b"])
    assert not ledger.is_quorum(base, frozenset({1}))


def test_a_first_epoch_is_acknowledged_only_by_who_waits_for_exactly_it() -> None:
    ledger = Ledger(member(1))
    assert not ledger.acknowledge_first(epoch(1, 0, 1))
    ledger.wait_for("form", epoch(1, 0, 1))
    assert ledger.acknowledge_first(epoch(1, 0, 1))
    assert not ledger.acknowledge_first(epoch(1, 0, 1, 2))


def test_a_rank_that_gave_up_its_place_says_so_until_it_is_taken_in_again() -> None:
    ledger = ledger_in(epoch(3, 0, 1), rank=1)
    ledger.step_out()
    assert ledger.is_out_of(3)
    assert ledger.take_up() is None
    assert not ledger.is_out_of(4)
    ledger.learn(epoch(4, 0, 1))
    assert not ledger.is_out_of(4)
    ledger.take_up()
    assert not ledger.is_out_of(3)


def test_a_rank_whose_epoch_is_gone_may_help_to_form_a_newer_one() -> None:
    ledger = ledger_in(epoch(3, 0, 1), rank=1)
    ledger.wait_for("form", epoch(4, 1))
    assert not ledger.acknowledge_first(epoch(4, 1))
    ledger.step_out()
    assert ledger.acknowledge_first(epoch(4, 1))
    ledger.wait_for("form", epoch(3, 1))
    assert not ledger.acknowledge_first(epoch(3, 1))
