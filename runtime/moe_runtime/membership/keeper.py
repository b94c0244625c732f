"""Keeps one rank's place in the committed membership: form, recover, change, join, vouch.

The step thread calls; peers vote through the peer face meanwhile. Any member may propose at any time, agreement.py
keeps that safe; to also get done quickly, only the lowest living member proposes and the others wait for it, take
over when it falls silent, and pick up a decision from whoever knows it.

    keeper = MembershipKeeper(rank=2, pod_uid="p2", host="10.0.0.7", token=token)
    membership = keeper.form(first)
    ...
    except GroupFault:
        group.destroy()                     # first: it tells the peers that still wait in a collective
        membership = keeper.recover()       # the next epoch, without the dead and the hung
        group = EpochGroup.build(membership, rank=2, token=token)

Raises MinorityStop when this side may not go on (call `recover` again: a vouching may have come), Fenced when the
others have gone on without this rank. No wait here is longer than a few `agree_ms`.
"""

import time
from collections.abc import Iterable, Mapping

from moe_core.contract.membership import Member, Membership
from moe_runtime.errors import MinorityStop
from moe_runtime.membership.agreement import Ballot, Promise, Proposal, Refusal
from moe_runtime.membership.deadlines import Deadlines
from moe_runtime.membership.fencing import Fencing
from moe_runtime.membership.ledger import Ledger, Waiting
from moe_runtime.membership.peer import PeerFace, Peers, Silence, promise_of, refusal_of
from moe_runtime.membership.wire import Json

_POLL_S = 0.02
"""Between two looks at peers that have not come out of their step yet: short against a step, long against a probe."""
_FORM_POLL_S = 0.1
_WAIT_FOR_LEADER_S = 0.15
"""How long a follower waits for news before it looks whether the leader still lives."""
_PATIENCE = 3
"""A call gives up after so many `agree_ms`; the caller calls again."""


class MembershipKeeper:
    """One rank's side of the membership. `form`, `join`, `recover`, `change` belong to the step thread."""

    def __init__(
        self,
        *,
        rank: int,
        pod_uid: str,
        token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        guard_address: str = "",
        node: str = "",
        deadlines: Deadlines | None = None,
    ) -> None:
        self._deadlines = deadlines or Deadlines()

        def ledger_at(address: str) -> Ledger:
            me = Member(rank=rank, pod_uid=pod_uid, address=address, guard_address=guard_address, node=node)
            return Ledger(me)

        self._face = PeerFace(ledger_at, token=token, host=host, port=port)
        self._ledger = self._face.ledger
        self._peers = Peers(self._ledger, token=token)
        self._attempt = 0
        self._gave_up: set[str] = set()
        """Members of the current epoch that say they have left it: they still vote, and are neither waited for nor
        fenced."""
        self.fencing = Fencing(token=token)

    @property
    def me(self) -> Member:
        """This rank as others reach it: what to register with the coordinator."""
        return self._ledger.me

    @property
    def current(self) -> Membership | None:
        """The epoch this rank steps in; None before the first and after leaving."""
        return self._ledger.current

    @property
    def known(self) -> Membership | None:
        """The newest decided epoch this rank has heard of; newer than `current` means that a recovery is due."""
        return self._ledger.known

    def check(self) -> None:
        """Raises Fenced once this rank has heard that an epoch without it was decided. Cheap: call it every step."""
        self._ledger.check()

    def close(self) -> None:
        self._face.close()
        self.fencing.close()

    def vouch(self, dead_pod_uids: Iterable[str], *, newest_epoch: int = 0) -> bool:
        """The coordinator's word that these pods are gone for good. Thread-safe.

        `newest_epoch` is the newest epoch that the coordinator has seen anywhere. A rank of an older epoch must not
        go on by this word, since the dead may have decided with others before they died: False means refused for that
        reason.
        """
        if newest_epoch > self._ledger.known_epoch:
            return False
        self._ledger.vouch(dead_pod_uids)
        return True

    def form(self, first: Membership, *, timeout_ms: int | None = None) -> Membership:
        """Take up a first epoch once every member of it waits for the same one. Raises MinorityStop when some do not.

        First means that no member is in an epoch: also after all members of an older one are gone, with a higher
        number. Call it again with whatever the coordinator names then. Where an epoch was formed already, that one is
        returned.
        """
        if not self._ledger.is_member(first):
            raise ValueError(f"pod {self.me.pod_uid} is not a member of {first.canonical()}")
        deadline = time.monotonic() + (timeout_ms or self._deadlines.agree_ms) / 1000
        missing = first.ranks
        self._ledger.wait_for("form", first)
        try:
            while (formed := self._ledger.take_up()) is None:
                news = self._ledger.news
                known = self._ledger.known
                if known is not None and known.epoch >= first.epoch:
                    raise MinorityStop(f"epoch {known.epoch} was formed without pod {self.me.pod_uid}: ask to join")
                if time.monotonic() > deadline:
                    raise MinorityStop(f"epoch {first.epoch} is not formed: waiting for ranks {list(missing)}")
                missing = self._form_once(first)
                if missing:
                    self._ledger.sleep(_FORM_POLL_S, since=news)
            return formed
        finally:
            self._ledger.wait_for("")

    def join(self, *, timeout_ms: int) -> Membership | None:
        """Wait until the members take this rank in by `change`; None when they did not in time."""
        deadline = time.monotonic() + timeout_ms / 1000
        while True:
            news = self._ledger.news
            if (taken := self._ledger.take_up()) is not None:
                return taken
            if (remaining_s := deadline - time.monotonic()) <= 0:
                return None
            self._ledger.sleep(remaining_s, since=news)

    def rejoin(self) -> None:
        """Give up the place in the current epoch, or forget one that went on without this rank; then `join` as
        anybody else.

        Members that are still in it go on without this rank at their next fault, without waiting for it or fencing it.
        """
        self._ledger.step_out()

    def recover(self) -> Membership:
        """The next epoch after a fault, without members that are gone, silent or stuck in their step.

        Raises MinorityStop, Fenced.
        """
        return self._settle("recover", None)

    def change(self, to: Membership) -> Membership:
        """A planned next epoch, called by every member at the same step boundary with the same `to`.

        Returns what was decided, which is not `to` when a member was lost or a joiner did not answer meanwhile:
        compare. A leaver gets the epoch that it is no longer in. Raises MinorityStop, Fenced.
        """
        current = self.current
        if current is None or to.epoch != current.epoch + 1:
            raise ValueError(f"change to epoch {to.epoch} from {None if current is None else current.epoch}")
        return self._settle("change", to)

    def _form_once(self, first: Membership) -> tuple[int, ...]:
        """The lowest rank asks all and commits; the others ask it for news. Ranks that are missing."""
        probe_ms = self._deadlines.probe_ms
        if self.me.pod_uid != first.members[0].pod_uid:
            if not all(isinstance(a, dict) for a in self._peers.probe(first.members[:1], timeout_ms=probe_ms).values()):
                self._peers.probe(first.members[1:], timeout_ms=probe_ms)  # it may have told somebody before it died
            return first.ranks[:1]
        ask = {"op": "form", "value": first.model_dump(mode="json")}
        answers = self._peers.ask(first.members, ask, timeout_ms=probe_ms)
        missing = [m.rank for m in first.members[1:] if not _says(answers[m.pod_uid], "acknowledged")]
        if not missing and self._ledger.acknowledge_first(first):
            self._decide(first, first.members)
        return tuple(missing)

    def _settle(self, waiting: Waiting, wish: Membership | None) -> Membership:
        """Look, wait, propose, until a next epoch is taken up."""
        base = self.current
        if base is None:
            raise ValueError("no current epoch: form or join first")
        started = time.monotonic()
        agree_s = self._deadlines.agree_ms / 1000
        written_off: set[str] = set()
        self._gave_up.clear()
        self._ledger.wait_for(waiting)
        try:
            while True:
                news = self._ledger.news
                if (next_epoch := self._take_up(wish)) is not None:
                    return next_epoch
                base = self._ledger.known or base
                waited_s = time.monotonic() - started
                if waited_s > _PATIENCE * agree_s:
                    raise MinorityStop(f"no agreement after epoch {base.epoch} within {waited_s:.1f} s")
                present = self._look(base, written_off, is_patient=waited_s < agree_s)
                if present is None:
                    self._ledger.sleep(_POLL_S, since=news)
                elif min(present) < self.me.rank:
                    self._ledger.sleep(_WAIT_FOR_LEADER_S, since=news)
                elif not self._ledger.is_quorum(base, present | self._gave_up_ranks(base)):
                    if waited_s > agree_s:
                        raise MinorityStop(
                            f"ranks {sorted(present)} are no quorum of epoch {base.epoch} with {list(base.ranks)}"
                        )
                    written_off.clear()
                    self._ledger.sleep(_POLL_S * 5, since=news)
                else:
                    self._propose(base, present, self._next(base, present, wish))
                    # Unlike ranks back off unlike times, should two take themselves for the lowest.
                    self._ledger.sleep(_POLL_S * (1 + self.me.rank), since=news)
        finally:
            self._ledger.wait_for("")

    def _take_up(self, wish: Membership | None) -> Membership | None:
        taken = self._ledger.take_up()
        if taken is not None:
            return taken
        known = self._ledger.known
        if wish is not None and known == wish and not self._ledger.is_member(wish):
            self._ledger.step_out()
            return wish
        self._ledger.check()
        return None

    def _look(self, base: Membership, written_off: set[str], *, is_patient: bool) -> frozenset[int] | None:
        """Ranks that live and wait for the next epoch, this one included; None while some are still on their way.

        Looks at lower ranks first: while one of them lives, it leads, and the rest is its business.
        """
        for higher_too in (False, True):
            asked = [
                m
                for m in base.members
                if m.pod_uid not in written_off and (m.rank > self.me.rank if higher_too else m.rank < self.me.rank)
            ]
            answers = self._peers.probe(asked, timeout_ms=self._deadlines.probe_ms)
            if self._ledger.known_epoch > base.epoch:
                return None
            self._gave_up.update(m.pod_uid for m in asked if _says(answers[m.pod_uid], "is_out"))
            living = [m for m in asked if isinstance(answers[m.pod_uid], dict) and m.pod_uid not in self._gave_up]
            written_off.update(m.pod_uid for m in asked if _is_hung(answers[m.pod_uid]))
            late = [m for m in living if not _says(answers[m.pod_uid], "waiting")]
            if late and is_patient:
                return None
            written_off.update(m.pod_uid for m in late)
            arrived = frozenset(m.rank for m in living if m not in late)
            if arrived and not higher_too:
                return arrived
        return arrived | {self.me.rank}

    def _gave_up_ranks(self, base: Membership) -> frozenset[int]:
        return frozenset(m.rank for m in base.members if m.pod_uid in self._gave_up)

    def _next(self, base: Membership, present: frozenset[int], wish: Membership | None) -> Membership:
        """The wish if all members and joiners are there for it, else the present ones with the map they have."""
        if wish is not None and wish.epoch == base.epoch + 1 and present == frozenset(base.ranks):
            joiners = [m for m in wish.members if m.pod_uid not in base.pod_uids]
            answers = self._peers.probe(joiners, timeout_ms=self._deadlines.probe_ms)
            if all(isinstance(answer, dict) for answer in answers.values()):
                return wish
        members = tuple(m for m in base.members if m.rank in present)
        return Membership(epoch=base.epoch + 1, members=members, map_digest=base.map_digest)

    def _propose(self, base: Membership, present: frozenset[int], wanted: Membership) -> None:
        """One attempt; whether or not it gets there, the caller looks again."""
        self._attempt += 1
        ballot = Ballot(self._attempt, self.me.rank)
        proposal = Proposal(ballot, wanted, lambda ranks: self._ledger.is_quorum(base, ranks))
        voters = [m for m in base.members if m.rank in present or m.pod_uid in self._gave_up]
        rank_of = {m.pod_uid: m.rank for m in voters}
        request = {"base": base.model_dump(mode="json"), "ballot": [ballot.attempt, ballot.rank]}

        own = self._ledger.prepare(base, ballot)
        if not isinstance(own, Promise):
            return self._outbid(own)
        proposal.on_promise(self.me.rank, own)
        prepare: Json = {**request, "op": "prepare"}
        for pod_uid, reply in self._replies(self._peers.ask(voters, prepare, timeout_ms=self._deadlines.probe_ms)):
            vote = promise_of(reply)
            if isinstance(vote, Promise):
                proposal.on_promise(rank_of[pod_uid], vote)
            else:
                self._outbid(vote)
        if not proposal.is_promised:
            return None

        value = proposal.value
        accepted = self._ledger.accept(base, ballot, value)
        if not isinstance(accepted, Ballot):
            return self._outbid(accepted)
        proposal.on_accepted(self.me.rank, ballot)
        accept: Json = {**request, "op": "accept", "value": value.model_dump(mode="json")}
        for pod_uid, reply in self._replies(self._peers.ask(voters, accept, timeout_ms=self._deadlines.probe_ms)):
            if "accepted" in reply:
                proposal.on_accepted(rank_of[pod_uid], Ballot(*reply["accepted"]))
            else:
                self._outbid(refusal_of(reply))
        if proposal.is_decided:
            self._decide(value, voters)
            spared = {*value.pod_uids, *self._gave_up}
            self.fencing.ask(m for m in base.members if m.rank not in present and m.pod_uid not in spared)
        return None

    def _decide(self, value: Membership, voters: Iterable[Member]) -> None:
        self._ledger.learn(value)
        told = {m.pod_uid: m for m in (*voters, *value.members)}.values()
        commit = {"op": "commit", "value": value.model_dump(mode="json")}
        self._peers.ask(told, commit, timeout_ms=self._deadlines.probe_ms)

    def _outbid(self, refusal: Refusal | None) -> None:
        if refusal is not None:
            self._attempt = max(self._attempt, refusal.promised.attempt)

    def _replies(self, answers: Mapping[str, Json | Silence]) -> list[tuple[str, Json]]:
        return [(pod_uid, answer) for pod_uid, answer in answers.items() if isinstance(answer, dict)]


def _says(answer: Json | Silence, key: str) -> bool:
    return isinstance(answer, dict) and bool(answer.get(key))


def _is_hung(answer: Json | Silence) -> bool:
    return isinstance(answer, Silence) and answer.is_hung
