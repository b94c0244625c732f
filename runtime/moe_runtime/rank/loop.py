"""The step loop of one rank, in a thread of its own: load, wait for an epoch, step, recover, leave, join again.

    Starting -> Loading -> Ready -> Active -> (Draining -> Left) or, fenced by the others, back to Ready

Every decision here follows from the directive (what the coordinator wants), the keeper (what the ranks have agreed) and
the control exchange (what all ranks see at the same boundary), never from a message that must not be lost.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from moe_core.contract.base import digest_of
from moe_core.contract.exchange import Coverage, RankPhase, Recovery
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.membership import Membership
from moe_core.contract.packing import FULL
from moe_core.contract.runtime_config import RuntimeConfig
from moe_runtime.errors import Fenced, GroupFault, MinorityStop
from moe_runtime.host.processes import resident_bytes
from moe_runtime.membership.deadlines import Deadlines
from moe_runtime.membership.group import EpochGroup
from moe_runtime.membership.keeper import MembershipKeeper
from moe_runtime.rank.links import LinkBook
from moe_runtime.rank.recorder import Recorder
from moe_runtime.rank.recovery import Recovering
from moe_runtime.rank.slot_check import SlotCheck
from moe_runtime.rank.staging import Staging
from moe_runtime.rank.stalls import Stalls
from moe_runtime.rank.traffic import Traffic
from moe_runtime.rank.work import ModelUnusable, Work, coverage
from moe_runtime.registration import Directive, RankReport

_IDLE_S = 0.02
"""Between two control exchanges while no rank has work: the most that a first request waits for its step to begin."""
_LONG_IDLE_S = 0.05
_LONG_IDLE_AFTER = 100
_FORM_MS = 1500
_JOIN_MS = 300
_KEPT_RECOVERIES = 16


class _Told(NamedTuple):
    """What every rank tells the others in the control exchange before each step."""

    tokens: int
    plan: int
    """`_key` of the plan that this rank could go along with now."""
    next_step: int
    probe: int
    computed_us: int
    blocked_us: int


class StepLoop:
    """`run` is the thread's; it ends with the process, or when the model is unusable. `directive()` gives the newest
    one, `settled()` is called after every step.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        *,
        rank: int,
        token: str,
        keeper: MembershipKeeper,
        work: Work,
        directive: Callable[[], Directive],
        settled: Callable[[], None],
    ) -> None:
        self._config, self._rank, self._token = config, rank, token
        self._keeper, self._work, self._directive, self._settled = keeper, work, directive, settled
        self._staging = Staging()
        self._slots = SlotCheck()
        self._traffic = Traffic(rank)
        self._stalls = Stalls(rank)
        self._links = LinkBook()
        self._recorder = (
            Recorder(config.trace, name=config.name, rank=rank, pod_uid=keeper.me.pod_uid, say=self._say)
            if config.trace is not None
            else None
        )
        self._next_step = 0
        """Number of the group's next step, as far as this rank knows; all take the highest that any of them knows."""
        self._moved_bytes = 0
        self._group: EpochGroup | None = None
        self._phase: RankPhase = "Starting"
        self._message = ""
        self._failure = ""
        self._coverage: Coverage | None = None
        self._recoveries: tuple[Recovery, ...] = ()
        self._recovering: Recovering | None = None
        self._quiet_rounds = 0
        self.crashed: BaseException | None = None

    # -- seen from other threads --

    @property
    def membership(self) -> Membership | None:
        """The committed epoch this rank takes part in; None while it is outside."""
        return self._keeper.current if self._phase in ("Active", "Draining") else None

    def report(self) -> RankReport:
        """What the coordinator is told."""
        epm, work = self._work.epm, self._work.report
        return RankReport(
            member=self._keeper.me,
            phase=self._phase,
            membership=self._keeper.current,
            staged_digest=self._staging.digest or (epm.expert_map.digest if epm is not None else ""),
            applied_digest=epm.expert_map.digest if epm is not None else "",
            memory_bytes=resident_bytes(),
            tokens=work.tokens,
            message=self._message or self._staging.problem or (self._recorder.problem if self._recorder else ""),
            degraded_tokens=work.degraded_tokens,
            coverage=self._coverage,
            recoveries=self._recoveries,
            load=work.load,
            training=work.training,
            failure=self._failure,
            digest_mismatches=self._slots.mismatches,
            dispatch_bytes=self._traffic.by_scope(),
            wire_error=work.wire_error,
            pick_bytes=epm.pick_bytes() if epm is not None else 0,
            links=self._links.links,
            step_time=self._stalls.total,
            recent_step_time=self._stalls.recent,
            moved_bytes=self._moved_bytes,
            expert_seconds=work.expert_work[0],
            expert_rows=work.expert_work[1],
            expert_bytes=epm.expert_bytes() if epm is not None else 0,
            expert_packing=str(epm.packing) if epm is not None and epm.packing != FULL else "",
        )

    # -- the thread --

    def run(self) -> None:
        try:
            self._load()
            while True:
                membership = self._await_epoch()
                if membership is not None:
                    self._live(membership)
        except ModelUnusable as error:
            self._phase, self._failure, self._message = "Failed", str(error), str(error)
            self._say(f"cannot go on: {error}")
        except BaseException as error:
            self.crashed = error
            raise

    def _load(self) -> None:
        # A rank that is to join a growing group waits for the map that has slots for it.
        while (wanted := self._directive().expert_map) is None or self._rank >= wanted.num_ranks:
            time.sleep(_LONG_IDLE_S)
        self._phase = "Loading"
        began = time.monotonic()
        self._work.load(wanted)
        if self._recorder is not None and self._work.epm is not None:
            self._work.epm.record(self._recorder.take)
        self._phase = "Ready"
        way = f", experts run by {self._work.epm.experts_way}" if self._work.epm is not None else ""
        self._say(f"ready, loaded in {time.monotonic() - began:.1f} s, {resident_bytes() >> 20} MiB resident{way}")

    def _await_epoch(self) -> Membership | None:
        """Ready and outside: form the first epoch or be taken into a running one. None: look again."""
        directive = self._directive()
        # A coordinator that starts anew names no ranks until it is told of any: nobody has left by that.
        self._phase = "Left" if directive.ranks and self._rank not in directive.ranks else "Ready"
        self._follow_map(directive, outside=True)
        plan = directive.plan
        am_in = plan is not None and self._keeper.me.pod_uid in plan.pod_uids
        try:
            known = self._keeper.known
            if directive.is_first and plan is not None and am_in and (known is None or known.epoch < plan.epoch):
                return self._keeper.form(plan, timeout_ms=_FORM_MS)
            return self._keeper.join(timeout_ms=_JOIN_MS)
        except MinorityStop as stop:
            self._message = str(stop)
            return None

    def _follow_map(self, directive: Directive, *, outside: bool) -> None:
        """Bring a new map's slots into memory: in the background while stepping, at once when outside."""
        wanted, epm = directive.expert_map, self._work.epm
        if wanted is None or epm is None:
            return
        if self._staging.want(wanted, epm, wait=outside):
            self._say(
                f"stages map {wanted.digest}" + (f" again: {self._staging.problem}" if self._staging.problem else "")
            )
        if outside and self._staging.digest == wanted.digest and epm.expert_map.digest != wanted.digest:
            self._apply_map(wanted.digest)

    def _apply_map(self, digest: str) -> ExpertMap | None:
        """Swap in the staged map if it is the one named; None when the map in force is that already."""
        epm = self._work.epm
        assert epm is not None
        if epm.expert_map.digest == digest:
            return None
        staged = self._staging.take(digest)
        if staged is None:
            # Not a GroupFault: the next epoch would name the same map, and so would every one after it.
            raise Fenced(f"epoch needs map {digest}, here are {epm.expert_map.digest} and {self._staging.digest}")
        self._moved_bytes += epm.commit_map(staged)
        epm.bind(None)
        return epm.expert_map

    def _live(self, membership: Membership) -> None:
        """From entering an epoch to being out of every epoch."""
        entered = False
        try:
            while True:
                try:
                    if not entered:
                        self._enter(membership)
                        entered = True
                    if not self._step():
                        break
                except GroupFault as fault:
                    entered = False
                    membership = self._recover(fault)
        except Fenced as fenced:
            self._message = str(fenced)
            self._say(f"is out: {fenced}")
            self._keeper.rejoin()
        finally:
            self._drop_group()
            self._work.leave("this rank left the epoch")
            self._coverage = None
            self._recovering = None

    def _enter(self, membership: Membership) -> None:
        epm = self._work.epm
        assert epm is not None
        self._drop_group()
        self._next_step += 1  # a step that some had committed when the last epoch ended is not made twice by one number
        self._group = EpochGroup.build(
            membership,
            rank=self._rank,
            token=self._token,
            device=self._config.device,
            timeout_ms=Deadlines().step_ms,
        )
        self._traffic.follow(membership, self._group.sent_bytes)
        self._stalls.forget()
        self._apply_map(membership.map_digest)
        epm.bind(self._group)
        if self._config.mode == "serve":  # a training run takes its experts from snapshots that carry digests
            self._slots.placed(self._group, epm)
        self._coverage = coverage(epm)
        self._work.enter(self._group, membership.epoch)
        self._phase, self._message = "Active", ""
        self._say(
            f"active in epoch {membership.epoch} with ranks {list(membership.ranks)}, map {membership.map_digest}"
        )
        if self._recovering is not None:
            self._recovering.rebuilt(time.time())

    def _step(self) -> bool:
        """One boundary and one step; False when this rank is out. Raises GroupFault, Fenced."""
        group = self._group
        assert group is not None
        self._keeper.check()
        current, known = self._keeper.current, self._keeper.known
        assert current is not None
        if known is not None and known.epoch > current.epoch:
            raise GroupFault(f"epoch {known.epoch} is decided, this rank steps in {current.epoch}")
        directive = self._directive()
        # A wish that takes this rank back before it has left is heard as well.
        self._phase = "Draining" if directive.ranks and self._rank not in directive.ranks else "Active"
        self._follow_map(directive, outside=False)
        plan = self._ready_plan(directive, current)
        asks = self._links.asks(current, probe=directive.probe)
        mine = _Told(self._work.prepare(), _key(plan), self._next_step, asks, *self._stalls.own)
        told = [_Told(*row) for row in group.all_gather_ints(mine)]
        self._stalls.account(group.ranks, [(one.computed_us, one.blocked_us) for one in told])
        if self._links.follow(current, group, [one.probe for one in told]):
            self._say(f"measured its links to {len(self._links.links) - 1} ranks")
        if plan is not None and all(one.plan == mine.plan for one in told):
            if self._may_change(plan):
                return self._change(plan)
            return True
        tokens = [one.tokens for one in told]
        step = max(one.next_step for one in told)
        if self._recorder is not None:
            self._recorder.step = step
        began, blocked_s = time.monotonic(), group.blocked_s
        self._work.run(tokens)
        if any(tokens):
            self._stalls.made(run_s=time.monotonic() - began, blocked_s=group.blocked_s - blocked_s)
        self._next_step = step + any(tokens)
        self._settled()
        self._resumed()
        if any(tokens):
            self._quiet_rounds = 0
        else:
            self._quiet_rounds += 1
            self._work.idle(_IDLE_S if self._quiet_rounds < _LONG_IDLE_AFTER else _LONG_IDLE_S)
        return True

    def _ready_plan(self, directive: Directive, current: Membership) -> Membership | None:
        """The directive's plan if it follows on this epoch and this rank could go along now."""
        plan, epm = directive.plan, self._work.epm
        assert epm is not None
        if plan is None or directive.is_first or plan.epoch != current.epoch + 1:
            return None
        stays = self._keeper.me.pod_uid in plan.pod_uids
        has_map = plan.map_digest in (epm.expert_map.digest, self._staging.digest)
        return plan if has_map or not stays else None

    def _may_change(self, plan: Membership) -> bool:
        """Whether every rank has in memory what the plan's map says. All members ask at the same boundary."""
        group, epm = self._group, self._work.epm
        assert group is not None and epm is not None
        if self._config.mode != "serve" or plan.map_digest == epm.expert_map.digest:
            return True
        problem = self._slots.staged(group, epm, self._staging.staged(plan.map_digest))
        if problem:
            self._say(f"map {plan.map_digest} stays out of force: {problem}")
            self._staging.reject(plan.map_digest, problem)
        return not problem

    def _change(self, plan: Membership) -> bool:
        """All members saw the same plan at this boundary. False when this rank has left by it."""
        self._drop_group()
        self._work.rollback()
        try:
            decided = self._keeper.change(plan)
        except MinorityStop as stop:
            decided = self._recover(GroupFault(str(stop)))
        if self._keeper.me.pod_uid not in decided.pod_uids:
            self._keeper.rejoin()
            return False
        self._enter(decided)
        return True

    def _recover(self, fault: GroupFault) -> Membership:
        """The next epoch without whom the fault took. Waits for a vouching as a minority. Raises Fenced."""
        self._recovering = self._recovering or Recovering(time.time())
        self._message = str(fault)
        self._say(f"suspends its step: {fault}")
        before = self._keeper.current
        self._drop_group()
        self._work.rollback()
        while True:
            directive = self._directive()
            is_left_behind = not self._keeper.vouch(directive.vouched_dead, newest_epoch=directive.newest_epoch)
            try:
                membership = self._keeper.recover()
                break
            except MinorityStop as stop:
                self._message = str(stop)
                if is_left_behind:
                    raise Fenced(f"epoch {directive.newest_epoch} was decided without this rank") from stop
        lost = frozenset(before.ranks if before else ()) - frozenset(membership.ranks)
        self._recovering.agreed(lost, time.time())
        return membership

    def _resumed(self) -> None:
        """The first step after a recovery is through."""
        recovering, self._recovering, current = self._recovering, None, self._keeper.current
        if recovering is None or current is None:
            return
        if (recovery := recovering.resumed(current.epoch, time.time())) is not None:
            self._recoveries = (*self._recoveries, recovery)[-_KEPT_RECOVERIES:]

    def _say(self, what: str) -> None:
        """One line in the pod's log, for people."""
        print(f"rank {self._rank}: {what}", flush=True)

    def _drop_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.destroy()


def _key(plan: Membership | None) -> int:
    """A plan as one number in the control exchange; 0 for none."""
    return 0 if plan is None else int(digest_of(plan.canonical())[:15], 16) + 1
