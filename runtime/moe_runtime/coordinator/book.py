"""The coordinator's soft state: the wish, the newest report of each pod, and a version that never falls.

Not a store: everything but the wish comes back with the next round of reports, and the operator puts the wish again.
Directive and state are made anew only when something they are made of has changed: every rank asks for them several
times a second.
"""

from collections.abc import Callable

import numpy as np

from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_runtime.coordinator.counts import Counts
from moe_runtime.coordinator.load_window import LoadWindow
from moe_runtime.coordinator.plan import committed_membership, members_view, next_directive, runtime_state
from moe_runtime.registration import Directive, GatewayReport, MembersView, RankReport

HEARD_WITHIN_S = 5.0
"""A rank reports every second; one that is silent for longer is no candidate to join."""
FORM_AFTER_S = 2.0
"""A new coordinator listens for this long before it forms a first epoch: living ranks report within one second."""
LOAD_WINDOW_S = 60.0
"""Until a wish says how long the load is to be counted."""
COUNTS_EVERY_S = 1.0
"""How often counts alone make a new state. 72 ranks change one 180 times a second, and each is read by an operator."""
LONGEST_TICK_S = 1.0
"""Ticks are due every quarter of a second. What one is later than this, the coordinator itself stood still and could
hear nobody: that is no silence of theirs."""


class StaleWish(ValueError):
    """A wish of an older generation than the one that is known."""


class Book:
    """`clock` gives seconds from any start and never falls; `is_serving` says whether gateways count.

    `first_version`: above every version of the coordinator before this one.
    """

    def __init__(self, clock: Callable[[], float], *, is_serving: bool, first_version: int = 0) -> None:
        self._clock = clock
        self._is_serving = is_serving
        self._looked_at = clock()
        self._lived_s = 0.0
        self.version = first_version
        self.wish: RuntimeWish | None = None
        self.counts = Counts()
        self._window = LoadWindow(0.0)
        self._reports: dict[str, RankReport] = {}
        self._living: dict[str, RankReport] = {}
        self._dead: frozenset[str] = frozenset()
        self._heard: dict[str, float] = {}
        self._last_epoch = 0
        self._directive: tuple[str, Directive] | None = None
        self._state: RuntimeState | None = None
        self._stated_s = 0.0
        self._has_news = self._has_counts = True

    def put_wish(self, wish: RuntimeWish) -> None:
        """Raises StaleWish."""
        if self.wish is not None and wish.generation < self.wish.generation:
            raise StaleWish(f"wish generation {wish.generation} is older than {self.wish.generation}")
        self.wish, self._dead = wish, frozenset(wish.dead_pod_uids)
        self._last_epoch = max(self._last_epoch, wish.newest_epoch)
        self._judge()
        self._mark_news()

    def note_rank(self, report: RankReport) -> None:
        uid = report.member.pod_uid
        before = self._reports.get(uid)
        self._reports[uid] = report
        self._heard[uid] = self._lived_s
        self.counts.note_rank(report)
        if report.load:
            # A pod that has counted when it is first heard of: this coordinator is the newcomer.
            self._window.note(uid, np.array(report.load, dtype=np.int64), counted_before=before is None)
        if report.membership is not None:
            self._last_epoch = max(self._last_epoch, report.membership.epoch)
        self._judge()
        if before is None or _news_of(before) != _news_of(report):
            self._mark_news()
        self._has_counts = True

    def note_gateway(self, report: GatewayReport) -> None:
        self.counts.note_gateway(report)
        self._has_counts = True

    def tick(self) -> None:
        """Time passes: who has not been heard of is silent, and who is silent and no member is forgotten."""
        now = self._clock()
        could_form = self._may_form
        self._lived_s += min(now - self._looked_at, LONGEST_TICK_S)
        self._looked_at = now
        self._window.tick(self._lived_s, length_s=self.wish.load_window_s if self.wish else LOAD_WINDOW_S)
        self._judge()
        if self._may_form != could_form:
            self._mark_news()
        committed = committed_membership(self._living)
        members = committed.pod_uids if committed else ()
        for uid in [u for u in self._reports if u not in self._living and u not in members]:
            del self._reports[uid], self._heard[uid]
            self.counts.forget_load(uid)
            self._window.forget(uid)

    @property
    def _may_form(self) -> bool:
        return self._lived_s >= FORM_AFTER_S

    def _judge(self) -> None:
        """Who is heard of and not proven dead."""
        living = {
            uid: report
            for uid, report in self._reports.items()
            if self._lived_s - self._heard[uid] <= HEARD_WITHIN_S and uid not in self._dead
        }
        if living.keys() != self._living.keys():
            self._mark_news()
        self._living = living

    def _mark_news(self) -> None:
        self._directive, self._has_news = None, True

    def directive(self) -> Directive:
        return self._planned()[1]

    @property
    def seal(self) -> str:
        """Of the directive."""
        return self._planned()[0]

    def _planned(self) -> tuple[str, Directive]:
        if self._directive is None:
            directive = next_directive(self.wish, self._living, may_form=self._may_form, last_epoch=self._last_epoch)
            self._directive = directive.seal, directive
        return self._directive

    def state(self) -> RuntimeState:
        """The state; its version rises exactly when anything else in it changed."""
        is_due = self._has_counts and self._lived_s - self._stated_s >= COUNTS_EVERY_S
        if self._state is not None and not self._has_news and not is_due:
            return self._state
        state = runtime_state(
            self.version,
            self.wish,
            self._living,
            serving=self.counts.serving() if self._is_serving else None,
            load=self._window.load(),
            load_window_s=self._window.covers_s,
        )
        self._has_news = self._has_counts = False
        self._stated_s = self._lived_s
        if self._state is None or state != self._state:
            self.version += 1
            self._state = state.model_copy(update={"version": self.version})
        return self._state

    def members(self) -> MembersView:
        return members_view(self._living)

    def guard_address(self, pod_uid: str) -> str | None:
        """host:port of the guard of a pod that has registered."""
        report = self._reports.get(pod_uid)
        return report.member.guard_address or None if report else None


def _news_of(report: RankReport) -> tuple[object, ...]:
    """What somebody waits for. The rest are counts."""
    is_done = report.training is not None and report.training.done
    return (
        report.phase,
        report.staged_digest,
        report.coverage,
        report.message,
        report.failure,
        is_done,
        report.recoveries,
        report.member,
        report.membership,
    )
