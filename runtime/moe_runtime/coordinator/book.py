"""The coordinator's soft state: the wish, the newest report of each pod, and a version that never falls.

Not a store: everything but the wish comes back with the next round of reports, and the operator puts the wish again.
"""

from collections.abc import Callable

from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_runtime.coordinator.plan import committed_membership, members_view, next_directive, runtime_state
from moe_runtime.registration import Directive, GatewayReport, MembersView, RankReport

HEARD_WITHIN_S = 5.0
"""A rank reports every second; one that is silent for longer is no candidate to join."""
FORM_AFTER_S = 2.0
"""A new coordinator listens for this long before it forms a first epoch: living ranks report within one second."""


class StaleWish(ValueError):
    """A wish of an older generation than the one that is known."""


class Book:
    """`clock` gives seconds since the Unix epoch; `is_serving` says whether gateways count."""

    def __init__(self, clock: Callable[[], float], *, is_serving: bool) -> None:
        self._clock = clock
        self._is_serving = is_serving
        self._started = clock()
        # Starts from the clock: a new coordinator's versions lie above every version of the one before it.
        self.version = int(self._started * 1000)
        self.wish: RuntimeWish | None = None
        self.reports: dict[str, RankReport] = {}
        self.gateways: dict[str, GatewayReport] = {}
        self._heard: dict[str, float] = {}
        self._degraded: dict[str, dict[str, int]] = {}
        self._last_epoch = 0
        self._last_state: RuntimeState | None = None

    def put_wish(self, wish: RuntimeWish) -> None:
        """Raises StaleWish."""
        if self.wish is not None and wish.generation < self.wish.generation:
            raise StaleWish(f"wish generation {wish.generation} is older than {self.wish.generation}")
        self.wish = wish
        self._last_epoch = max(self._last_epoch, wish.newest_epoch)

    def note_rank(self, report: RankReport) -> None:
        self.reports[report.member.pod_uid] = report
        self._heard[report.member.pod_uid] = self._clock()
        self._degraded[report.member.pod_uid] = dict(report.degraded_tokens)
        if report.membership is not None:
            self._last_epoch = max(self._last_epoch, report.membership.epoch)

    def note_gateway(self, report: GatewayReport) -> None:
        self.gateways[report.pod_uid] = report

    def living(self) -> dict[str, RankReport]:
        """Reports of ranks heard of lately and not proven dead; others are forgotten once they are no members."""
        now = self._clock()
        dead = set(self.wish.dead_pod_uids) if self.wish else set()
        living = {
            uid: report
            for uid, report in self.reports.items()
            if uid not in dead and now - self._heard[uid] <= HEARD_WITHIN_S
        }
        committed = committed_membership(living)
        members = set(committed.pod_uids) if committed else set()
        for uid in [u for u in self.reports if u not in living and u not in members]:
            del self.reports[uid], self._heard[uid]
        return living

    def directive(self) -> Directive:
        may_form = self._clock() - self._started >= FORM_AFTER_S
        return next_directive(self.wish, self.living(), may_form=may_form, last_epoch=self._last_epoch)

    def state(self) -> RuntimeState:
        """The state; its version rises exactly when anything else in it changed."""
        state = runtime_state(
            self.version, self.wish, self.living(), self.gateways, self._degraded_sum(), is_serving=self._is_serving
        )
        if self._last_state is None or state != self._last_state:
            self.version += 1
            state = state.model_copy(update={"version": self.version})
            self._last_state = state
        return state

    def _degraded_sum(self) -> dict[str, int]:
        """Over every rank that ever reported here: a rank that died does not take its counts along."""
        total: dict[str, int] = {}
        for counts in self._degraded.values():
            for reason, count in counts.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def members(self) -> MembersView:
        return members_view(self.living())

    def guard_address(self, pod_uid: str) -> str | None:
        """host:port of the guard of a pod that has registered."""
        report = self.reports.get(pod_uid)
        return report.member.guard_address or None if report else None
