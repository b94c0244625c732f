"""A watch that is not answered any more is told from a quiet cluster."""

from moe_operator.liveness import WatchTrace

PODS, JOBS = "/api/v1/pods", "/apis/moerator.dev/v1alpha1/namespaces/team-a/moejobs"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def traced(clock: Clock, lists: list[str]) -> WatchTrace:
    return WatchTrace([PODS, JOBS], stalled_after_s=100, start_s=300, on_list=lambda: lists.append("list"), clock=clock)


def test_it_has_started_once_every_resource_is_watched() -> None:
    trace = traced(Clock(), [])
    trace.note(PODS, is_watch=True)
    assert not trace.is_started()
    trace.note(JOBS, is_watch=True)
    assert trace.is_started() and trace.problems() == []


def test_a_watch_that_is_renewed_is_healthy_and_one_that_is_not_is_named() -> None:
    clock = Clock()
    trace = traced(clock, [])
    for clock.now in (0.0, 60.0, 120.0, 180.0):
        trace.note(PODS, is_watch=True)
        if clock.now < 100:
            trace.note(JOBS, is_watch=True)
    assert trace.problems() == [f"the watch of {JOBS} was last answered 120 s ago"]


def test_what_is_never_watched_is_told_after_the_start() -> None:
    clock = Clock()
    trace = traced(clock, [])
    trace.note(PODS, is_watch=True)
    clock.now = 90.0
    assert trace.problems() == []
    clock.now = 301.0
    trace.note(PODS, is_watch=True)
    assert trace.problems() == [f"not watched 300 s after the start: {JOBS}"]


def test_a_relist_is_told_and_the_first_list_is_not() -> None:
    lists: list[str] = []
    trace = traced(Clock(), lists)
    trace.note(PODS, is_watch=False)
    assert lists == []
    trace.note(PODS, is_watch=True)
    trace.note(PODS, is_watch=False)
    assert lists == ["list"]


def test_requests_for_other_things_do_not_count() -> None:
    lists: list[str] = []
    trace = traced(Clock(), lists)
    for path in ("/api/v1/namespaces/x/pods/p", "/apis/coordination.k8s.io/v1/leases", "/apis", "/version"):
        trace.note(path, is_watch=True)
    assert not trace.is_started()
