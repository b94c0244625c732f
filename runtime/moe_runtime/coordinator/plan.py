"""What the coordinator tells the ranks: a pure function of the wish and of what living ranks report.

It keeps no state of its own, so a coordinator that starts anew among running ranks comes to the same directive. It
never removes a member that the ranks still count as one: losses are agreed among the ranks alone.
"""

from collections.abc import Mapping

from moe_core.contract.base import three_digits
from moe_core.contract.exchange import (
    Coverage,
    RankState,
    Recovery,
    RuntimeState,
    RuntimeWish,
    ServingProgress,
    TrainingProgress,
)
from moe_core.contract.links import Links
from moe_core.contract.membership import Member, Membership
from moe_core.contract.step_time import StepTime, in_sum
from moe_runtime.coordinator.links import links_of
from moe_runtime.registration import Directive, MembersView, RankReport, RankView

_NEWEST_RECOVERIES = 16
MOST_LOAD_EVERY_S, LOADS_PER_WINDOW = 10.0, 6.0


def committed_membership(reports: Mapping[str, RankReport]) -> Membership | None:
    """The newest membership that one of its own members reports."""
    known = [
        report.membership
        for report in reports.values()
        if report.membership is not None
        and report.membership.epoch > 0
        and report.phase in ("Active", "Draining")
        and report.member.pod_uid in report.membership.pod_uids
    ]
    return max(known, key=lambda m: (m.epoch, len(m.members)), default=None)


def next_directive(
    wish: RuntimeWish | None, reports: Mapping[str, RankReport], *, may_form: bool, last_epoch: int = 0
) -> Directive:
    """`reports`: by pod uid, of ranks heard of lately. `may_form`: up for long enough to know a living group."""
    if wish is None:
        return Directive()
    committed = committed_membership(reports)
    plan = (
        _formation(wish, reports, last_epoch)
        if committed is None and may_form
        else _change(wish, reports, committed)
        if committed is not None
        else None
    )
    return Directive(
        expert_map=wish.expert_map,
        plan=plan,
        vouched_dead=tuple(sorted(wish.dead_pod_uids)),
        ranks=tuple(sorted(wish.ranks)),
        is_first=committed is None,
        newest_epoch=max(last_epoch, committed.epoch if committed else 0),
        probe=wish.probe,
        load_every_s=min(MOST_LOAD_EVERY_S, wish.load_window_s / LOADS_PER_WINDOW),
    )


def _ready(wish: RuntimeWish, reports: Mapping[str, RankReport]) -> dict[int, Member]:
    """rank -> the living, loaded pod that could join with the wished map; of two the last uid in order."""
    return {
        report.member.rank: report.member
        for _, report in sorted(reports.items())
        if report.phase == "Ready"
        and report.staged_digest == wish.expert_map.digest
        and report.member.rank in wish.ranks
        and report.member.pod_uid not in wish.dead_pod_uids
    }


def _formation(wish: RuntimeWish, reports: Mapping[str, RankReport], last_epoch: int) -> Membership | None:
    ready = _ready(wish, reports)
    if not wish.ranks or any(rank not in ready for rank in wish.ranks):
        return None
    members = tuple(ready[rank] for rank in sorted(wish.ranks))
    return Membership(epoch=last_epoch + 1, members=members, map_digest=wish.expert_map.digest)


def _change(wish: RuntimeWish, reports: Mapping[str, RankReport], committed: Membership) -> Membership | None:
    staying = {m.rank: m for m in committed.members}
    ready = {rank: member for rank, member in _ready(wish, reports).items() if rank not in staying}
    wished = {rank: staying.get(rank) or ready.get(rank) for rank in wish.ranks}
    staged = {uid for uid, report in reports.items() if report.staged_digest == wish.expert_map.digest}
    if all(member is not None and member.pod_uid in staged for member in wished.values()):
        members, digest = [m for m in wished.values() if m is not None], wish.expert_map.digest
    elif wish.expert_map.digest == committed.map_digest:
        members, digest = [*staying.values(), *ready.values()], committed.map_digest
    else:
        return None  # a new map waits until every wished rank has its slots in memory
    members.sort(key=lambda m: m.rank)
    if tuple(m.pod_uid for m in members) == committed.pod_uids and digest == committed.map_digest:
        return None
    return Membership(epoch=committed.epoch + 1, members=tuple(members), map_digest=digest)


def runtime_state(
    version: int,
    wish: RuntimeWish | None,
    reports: Mapping[str, RankReport],
    *,
    serving: ServingProgress | None = None,
    load: tuple[tuple[int, ...], ...] = (),
    load_window_s: float = 0.0,
) -> RuntimeState:
    """The coordinator's answer to the operator; `serving` and `load` count over dead pods too."""
    committed = committed_membership(reports)
    in_force = (
        wish is not None
        and committed is not None
        and committed.map_digest == wish.expert_map.digest
        and set(committed.ranks) == set(wish.ranks)
    )
    trainings = [r.training for r in reports.values() if r.training is not None]
    return RuntimeState(
        version=version,
        wish_put=wish.generation if wish is not None else None,
        wish_generation=wish.generation if wish is not None and in_force else None,
        epoch=committed.epoch if committed else 0,
        map_digest=committed.map_digest if committed else "",
        ranks=tuple(
            RankState(
                rank=r.member.rank,
                pod_uid=r.member.pod_uid,
                phase=r.phase,
                memory_bytes=r.memory_bytes,
                tokens=r.tokens,
                message=r.message,
                seconds_per_pick=r.expert_seconds / r.expert_rows if r.expert_rows else 0.0,
            )
            for r in sorted(reports.values(), key=lambda r: (r.member.rank, r.member.pod_uid))
        ),
        member_uids=committed.pod_uids if committed else (),
        coverage=_coverage(committed, reports),
        training=max(trainings, key=_knowledge, default=None),
        serving=serving,
        recoveries=_recoveries(reports),
        load=load,
        load_window_s=load_window_s,
        seconds_per_pick=_seconds_per_pick(reports),
        pick_bytes=max((r.pick_bytes for r in reports.values()), default=0),
        links=_links(committed, reports),
        expert_bytes=max((r.expert_bytes for r in reports.values()), default=0),
        expert_packing=max((r.expert_packing for r in reports.values()), default=""),
        wire_error=_wire_error(reports),
        step_time=_step_time(reports),
        failure=next((r.failure for _, r in sorted(reports.items()) if r.failure), ""),
    )


def _seconds_per_pick(reports: Mapping[str, RankReport]) -> float:
    rows = sum(report.expert_rows for report in reports.values())
    return sum(report.expert_seconds for report in reports.values()) / rows if rows else 0.0


def _links(committed: Membership | None, reports: Mapping[str, RankReport]) -> Links | None:
    if committed is None:
        return None
    place_of = {member.rank: member.place for member in committed.members}
    told = {r.member.rank: r.links for uid, r in sorted(reports.items()) if uid in committed.pod_uids}
    return links_of(place_of, told)


def _step_time(reports: Mapping[str, RankReport]) -> StepTime | None:
    found = in_sum(report.recent_step_time for report in reports.values() if report.phase in ("Active", "Draining"))
    return found if found.steps else None


def _wire_error(reports: Mapping[str, RankReport]) -> dict[str, float]:
    """Root of the mean square over the ranks: a rank's rows are as many as another's, and as large."""
    legs = sorted({leg for report in reports.values() for leg in report.wire_error})
    errors = {leg: [r.wire_error[leg] for r in reports.values() if leg in r.wire_error] for leg in legs}
    return {leg: three_digits((sum(e * e for e in found) / len(found)) ** 0.5) for leg, found in errors.items()}


def _knowledge(training: TrainingProgress) -> tuple[int, bool, bool]:
    """Of several ranks' words the one that says most: only the writer of the checkpoint knows its figures."""
    return training.step, training.done, training.heldout_bits_per_byte is not None


def members_view(reports: Mapping[str, RankReport]) -> MembersView:
    committed = committed_membership(reports)
    coverage = _coverage(committed, reports)
    return MembersView(
        epoch=committed.epoch if committed else 0,
        ranks=tuple(
            RankView(rank=m.rank, pod_uid=m.pod_uid, phase=reports[m.pod_uid].phase)
            for m in (committed.members if committed else ())
            if m.pod_uid in reports
        ),
        covered=coverage.covered if coverage else 0,
        total=coverage.total if coverage else 0,
    )


def _coverage(committed: Membership | None, reports: Mapping[str, RankReport]) -> Coverage | None:
    """As reported by a member of the committed epoch: coverage is a matter of map and membership only."""
    if committed is None:
        return None
    for uid in committed.pod_uids:
        report = reports.get(uid)
        if report and report.membership and report.membership.epoch == committed.epoch and report.coverage:
            return report.coverage
    return None


def _recoveries(reports: Mapping[str, RankReport]) -> tuple[Recovery, ...]:
    """One per epoch: when the first rank saw the fault and the last one went on."""
    by_epoch: dict[int, list[Recovery]] = {}
    for report in reports.values():
        for recovery in report.recoveries:
            by_epoch.setdefault(recovery.epoch, []).append(recovery)
    merged = [
        Recovery(
            epoch=epoch,
            lost_ranks=tuple(sorted({rank for r in group for rank in r.lost_ranks})),
            detected_at=min(r.detected_at for r in group),
            agreed_at=max(r.agreed_at for r in group),
            rebuilt_at=max(r.rebuilt_at for r in group),
            resumed_at=max(r.resumed_at for r in group),
        )
        for epoch, group in sorted(by_epoch.items())
    ]
    return tuple(merged[-_NEWEST_RECOVERIES:])
