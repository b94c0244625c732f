"""The coordinator's directive as a pure function of wish and reports."""

import pytest

from moe_core.contract.exchange import Coverage, Recovery, RuntimeWish
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.membership import Member, Membership
from moe_runtime.coordinator.book import COUNTS_EVERY_S, FORM_AFTER_S, HEARD_WITHIN_S, Book, StaleWish
from moe_runtime.coordinator.plan import committed_membership, next_directive, runtime_state
from moe_runtime.registration import GatewayReport, RankReport


def emap(num_ranks: int = 2, generation: int = 1) -> ExpertMap:
    return ExpertMap(
        generation=generation,
        num_logical_experts=2 * num_ranks,
        slots_of_rank=(2,) * num_ranks,
        logical_of_slot=(tuple(range(2 * num_ranks)),),
    )


MAP = emap()
WISH = RuntimeWish(generation=3, ranks=(0, 1), expert_map=MAP)


def member(rank: int, uid: str = "") -> Member:
    return Member(rank=rank, pod_uid=uid or f"p{rank}", address=f"h:{rank}", guard_address=f"g:{rank}")


def ready(rank: int, uid: str = "", digest: str = MAP.digest) -> RankReport:
    return RankReport(member=member(rank, uid), phase="Ready", staged_digest=digest)


def active(rank: int, membership: Membership, uid: str = "", digest: str = MAP.digest) -> RankReport:
    return RankReport(member=member(rank, uid), phase="Active", membership=membership, staged_digest=digest)


def epoch(number: int, *members: Member, digest: str = MAP.digest) -> Membership:
    return Membership(epoch=number, members=members, map_digest=digest)


def by_uid(*reports: RankReport) -> dict[str, RankReport]:
    return {report.member.pod_uid: report for report in reports}


def test_nothing_is_ordered_without_a_wish() -> None:
    directive = next_directive(None, by_uid(ready(0), ready(1)), may_form=True)
    assert (directive.plan, directive.expert_map) == (None, None)


def test_the_first_epoch_is_formed_only_when_every_wished_rank_is_ready_with_the_map() -> None:
    assert next_directive(WISH, by_uid(ready(0)), may_form=True).plan is None
    assert next_directive(WISH, by_uid(ready(0), ready(1, digest="other")), may_form=True).plan is None
    directive = next_directive(WISH, by_uid(ready(1), ready(0)), may_form=True)
    assert directive.is_first
    assert directive.plan == epoch(1, member(0), member(1))


def test_a_new_coordinator_listens_before_it_forms() -> None:
    assert next_directive(WISH, by_uid(ready(0), ready(1)), may_form=False).plan is None


def test_after_all_ranks_were_lost_the_next_first_epoch_has_a_higher_number() -> None:
    plan = next_directive(WISH, by_uid(ready(0), ready(1)), may_form=True, last_epoch=7).plan
    assert plan is not None and plan.epoch == 8


def test_a_replacement_that_is_ready_joins_the_committed_epoch() -> None:
    alone = epoch(4, member(0))
    directive = next_directive(WISH, by_uid(active(0, alone), ready(1, "p1b")), may_form=True)
    assert not directive.is_first
    assert directive.plan == epoch(5, member(0), member(1, "p1b"))


def test_a_member_is_never_removed_for_its_silence() -> None:
    both = epoch(4, member(0), member(1))
    assert next_directive(WISH, by_uid(active(0, both)), may_form=True).plan is None


def test_a_replacement_waits_while_its_predecessor_is_still_a_member() -> None:
    both = epoch(4, member(0), member(1))
    assert next_directive(WISH, by_uid(active(0, both), ready(1, "p1b")), may_form=True).plan is None


def test_a_rank_that_is_not_wished_any_more_leaves() -> None:
    both = epoch(4, member(0), member(1))
    wish = WISH.model_copy(update={"ranks": (0,)})
    plan = next_directive(wish, by_uid(active(0, both), active(1, both)), may_form=True).plan
    assert plan == epoch(5, member(0))


def test_a_new_map_waits_until_every_wished_rank_has_staged_it() -> None:
    new = emap(3, generation=2)
    wish = RuntimeWish(generation=4, ranks=(0, 1, 2), expert_map=new)
    both = epoch(4, member(0), member(1))
    old = (active(0, both), active(1, both))
    staged = (active(0, both, digest=new.digest), active(1, both, digest=new.digest))
    joiner = ready(2, digest=new.digest)
    assert next_directive(wish, by_uid(*old, joiner), may_form=True).plan is None
    assert next_directive(wish, by_uid(*staged), may_form=True).plan is None
    plan = next_directive(wish, by_uid(*staged, joiner), may_form=True).plan
    assert plan == epoch(5, member(0), member(1), member(2), digest=new.digest)


def test_a_pod_that_is_proven_dead_does_not_join() -> None:
    wish = WISH.model_copy(update={"dead_pod_uids": ("p1b",)})
    directive = next_directive(wish, by_uid(active(0, epoch(4, member(0))), ready(1, "p1b")), may_form=True)
    assert directive.plan is None
    assert directive.vouched_dead == ("p1b",)


def test_directives_of_equal_content_have_equal_seals() -> None:
    reports = by_uid(ready(0), ready(1))
    shuffled = dict(reversed(list(reports.items())))
    first, second = (next_directive(WISH, r, may_form=True) for r in (reports, shuffled))
    assert first.seal == second.seal
    assert first.seal != next_directive(WISH, by_uid(ready(0)), may_form=True).seal


def test_the_newest_epoch_counts_and_only_a_member_may_tell_it() -> None:
    old, new = epoch(4, member(0), member(1)), epoch(5, member(0))
    assert committed_membership(by_uid(active(0, new), active(1, old))) == new
    assert committed_membership(by_uid(active(1, new))) is None


def test_the_wish_is_in_force_when_members_and_map_are_as_wished() -> None:
    both = epoch(4, member(0), member(1))
    whole = by_uid(active(0, both), active(1, both))
    state = runtime_state(1, WISH, whole)
    assert (state.wish_generation, state.epoch, state.map_digest) == (3, 4, MAP.digest)
    alone = by_uid(active(0, epoch(5, member(0))))
    assert runtime_state(1, WISH, alone).wish_generation is None


def test_one_fault_seen_by_several_ranks_is_one_recovery() -> None:
    both = epoch(4, member(0), member(1))

    def seen(detected: float, resumed: float) -> tuple[Recovery, ...]:
        return (
            Recovery(epoch=4, lost_ranks=(2,), detected_at=detected, agreed_at=2.0, rebuilt_at=3.0, resumed_at=resumed),
        )

    reports = [active(rank, both).model_copy(update={"recoveries": seen(1.0 + rank, 5.0 + rank)}) for rank in (0, 1)]
    (recovery,) = runtime_state(1, WISH, by_uid(*reports)).recoveries
    assert (recovery.detected_at, recovery.resumed_at, recovery.lost_ranks) == (1.0, 6.0, (2,))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def book(clock: Clock) -> Book:
    book = Book(clock, is_serving=True, first_version=int(clock.now * 1000))
    book.put_wish(WISH)
    return book


def passes(known: Book, clock: Clock, seconds: float) -> None:
    for _ in range(round(4 * seconds)):
        clock.now += 0.25
        known.tick()


def test_an_older_wish_is_refused_and_the_same_one_taken_again() -> None:
    known = book(Clock())
    known.put_wish(WISH)
    with pytest.raises(StaleWish):
        known.put_wish(WISH.model_copy(update={"generation": 2}))


def test_the_version_rises_only_with_news_and_over_restarts() -> None:
    clock = Clock()
    first = book(clock)
    version = first.state().version
    assert first.state().version == version
    first.note_rank(ready(0))
    assert first.state().version > version
    clock.now += 1.0
    assert book(clock).state().version > first.state().version


def test_a_silent_candidate_is_forgotten_and_a_silent_member_is_not() -> None:
    clock = Clock()
    known = book(clock)
    both = epoch(4, member(0), member(1))
    known.note_rank(active(1, both))
    known.note_rank(ready(1, "spare"))
    passes(known, clock, HEARD_WITHIN_S - 1)
    known.note_rank(active(0, both))
    passes(known, clock, 2)
    known.note_rank(active(0, both))
    assert [r.pod_uid for r in known.state().ranks] == ["p0"]
    assert known.guard_address("spare") is None
    assert known.guard_address("p1") == "g:1"


def test_a_rank_that_died_leaves_its_degraded_tokens_counted() -> None:
    clock = Clock()
    known = book(clock)
    known.note_rank(ready(1).model_copy(update={"degraded_tokens": {"drop": 5}}))
    passes(known, clock, HEARD_WITHIN_S + 1)
    known.note_rank(ready(0).model_copy(update={"degraded_tokens": {"drop": 2}}))
    known.note_gateway(GatewayReport(pod_uid="g", requests_ok=3))
    serving = known.state().serving
    assert serving is not None
    assert (serving.degraded_tokens, serving.requests_ok) == ({"drop": 7}, 3)


def test_a_new_book_forms_nothing_before_it_has_listened() -> None:
    clock = Clock()
    known = book(clock)
    known.note_rank(ready(0))
    known.note_rank(ready(1))
    assert known.directive().plan is None
    passes(known, clock, FORM_AFTER_S)
    assert known.directive().plan is not None


def test_a_new_coordinator_counts_epochs_on_from_what_the_operator_remembers() -> None:
    clock = Clock()
    known = book(clock)
    known.put_wish(WISH.model_copy(update={"newest_epoch": 7}))
    known.note_rank(ready(0))
    known.note_rank(ready(1))
    passes(known, clock, FORM_AFTER_S)
    plan = known.directive().plan
    assert plan is not None
    assert plan.epoch == 8


def test_time_in_which_the_coordinator_stood_still_is_no_silence_of_its_ranks() -> None:
    clock = Clock()
    known = book(clock)
    both = epoch(4, member(0), member(1))
    for rank in (0, 1):
        known.note_rank(active(rank, both))
    clock.now += 60.0
    known.tick()
    assert (known.state().epoch, len(known.state().ranks), known.directive().is_first) == (4, 2, False)


def test_counts_alone_make_a_new_state_once_a_second_and_news_at_once() -> None:
    clock = Clock()
    known = book(clock)
    both = epoch(4, member(0), member(1))
    known.note_rank(active(0, both))
    version = known.state().version
    known.note_rank(active(0, both).model_copy(update={"tokens": 9}))
    assert known.state().version == version
    passes(known, clock, COUNTS_EVERY_S)
    assert (known.state().version, known.state().ranks[0].tokens) == (version + 1, 9)
    known.note_rank(active(1, both))
    assert known.state().version == version + 2


def test_the_directive_is_planned_again_only_when_what_it_is_made_of_changed() -> None:
    clock = Clock()
    known = book(clock)
    known.note_rank(ready(0))
    passes(known, clock, FORM_AFTER_S)
    before = known.directive()
    known.note_rank(ready(0).model_copy(update={"tokens": 9, "memory_bytes": 5}))
    passes(known, clock, 1)
    assert known.directive() is before
    known.note_rank(ready(1))
    assert known.directive().plan is not None


def test_the_load_is_that_of_the_last_window_over_all_ranks_dead_ones_too() -> None:
    clock = Clock()
    known = book(clock)
    both = epoch(4, member(0), member(1))
    known.put_wish(WISH.model_copy(update={"load_window_s": 4.0}))
    for load in ((), ((1, 2),), ()):
        known.note_rank(active(0, both).model_copy(update={"load": load}))
    for load in ((), ((3, 4),)):
        known.note_rank(active(1, both).model_copy(update={"load": load}))
    passes(known, clock, 4.0)
    assert (known.state().load, known.state().load_window_s) == (((4, 6),), 4.0)
    known.put_wish(WISH.model_copy(update={"generation": 9, "load_window_s": 4.0, "dead_pod_uids": ("p1",)}))
    known.note_rank(active(0, both).model_copy(update={"load": ((2, 2),)}))
    passes(known, clock, 3.0)
    assert known.state().load == ((1, 0),)


def test_what_was_counted_before_a_new_coordinator_listened_is_not_of_its_window() -> None:
    clock = Clock()
    known = book(clock)
    known.put_wish(WISH.model_copy(update={"load_window_s": 8.0}))
    one = epoch(4, member(0))
    for count in (7000, 7005):
        known.note_rank(active(0, one).model_copy(update={"load": ((count,),), "tokens": 9999}))
    passes(known, clock, 2.0)
    assert known.state().load == ((5,),)


def test_what_a_pick_costs_is_measured_over_all_ranks() -> None:
    both = epoch(4, member(0), member(1))
    work = [{"expert_seconds": 3.0, "expert_rows": 100}, {"expert_seconds": 1.0, "expert_rows": 300}]
    reports = by_uid(*(active(rank, both).model_copy(update=told) for rank, told in enumerate(work)))
    assert runtime_state(1, WISH, reports).seconds_per_pick == 0.01


def test_coverage_is_told_by_a_member_of_the_newest_epoch() -> None:
    both = epoch(4, member(0), member(1))
    told = Coverage(covered=3, total=4)
    reports = by_uid(active(0, both), active(1, both).model_copy(update={"coverage": told}))
    assert runtime_state(1, WISH, reports).coverage == told
