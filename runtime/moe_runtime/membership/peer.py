"""A rank's face to its peers, and the other side of it: probe, prepare, accept, commit, form, rendezvous.

Every request names the incarnation it is meant for, so that a process which inherited an address answers nothing, and
the epoch its sender knows: who knows a newer one says so in the reply. That is how a rank that was away finds out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_core.contract.membership import Member, Membership
from moe_runtime.membership.agreement import Ballot, Promise, Refusal
from moe_runtime.membership.ledger import Ledger
from moe_runtime.membership.rendezvous import RendezvousBook
from moe_runtime.membership.wire import Json, LineServer, SilentCall, WireError, ask_many


class PeerFace:
    """Answers peers from the ledger, on its own threads, also while the step thread is busy or stuck."""

    def __init__(self, ledger_of: Callable[[str], Ledger], *, token: str, host: str, port: int = 0) -> None:
        """`ledger_of(address)` makes the ledger once the port is known; the address is part of the Member."""
        self._book = RendezvousBook()
        self._ledger: Ledger | None = None
        self._server = LineServer(self._answer, token=token, host=host, port=port)
        self.address = self._server.address
        self._ledger = ledger_of(self.address)

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            raise ValueError("still starting")
        return self._ledger

    def close(self) -> None:
        self._server.close()

    def _answer(self, request: Json) -> Json:
        op = str(request["op"])
        if op.startswith("rendezvous_"):
            return self._book.answer(request)
        ledger = self.ledger
        if request["to"] != ledger.me.pod_uid:
            return {"error": f"this is {ledger.me.pod_uid}, not {request['to']}"}
        reply = _OPS[op](ledger, request)
        known = ledger.known
        if known is not None and known.epoch > int(request["epoch"]):
            reply["known"] = known.model_dump(mode="json")
        return {"epoch": ledger.known_epoch, **reply}


def _probe(ledger: Ledger, request: Json) -> Json:
    return {"waiting": ledger.waiting, "is_out": ledger.is_out_of(int(request["epoch"]))}


def _prepare(ledger: Ledger, request: Json) -> Json:
    vote = ledger.prepare(Membership.model_validate(request["base"]), Ballot(*request["ballot"]))
    if isinstance(vote, Promise):
        accepted = vote.accepted and [_ballot(vote.accepted[0]), vote.accepted[1].model_dump(mode="json")]
        return {"promised": _ballot(vote.ballot), "accepted": accepted}
    return _refusal(vote)


def _accept(ledger: Ledger, request: Json) -> Json:
    base, value = Membership.model_validate(request["base"]), Membership.model_validate(request["value"])
    vote = ledger.accept(base, Ballot(*request["ballot"]), value)
    return {"accepted": _ballot(vote)} if isinstance(vote, Ballot) else _refusal(vote)


def _commit(ledger: Ledger, request: Json) -> Json:
    ledger.learn(Membership.model_validate(request["value"]))
    return {}


def _form(ledger: Ledger, request: Json) -> Json:
    return {"acknowledged": ledger.acknowledge_first(Membership.model_validate(request["value"]))}


_OPS: Mapping[str, Callable[[Ledger, Json], Json]] = {
    "probe": _probe,
    "prepare": _prepare,
    "accept": _accept,
    "commit": _commit,
    "form": _form,
}


def _ballot(ballot: Ballot) -> list[int]:
    return [ballot.attempt, ballot.rank]


def _refusal(vote: Refusal | Promise[Any] | Ballot | None) -> Json:
    return {"refused": _ballot(vote.promised)} if isinstance(vote, Refusal) else {"refused": None}


@dataclass(frozen=True, slots=True)
class Silence:
    """A peer that did not answer; `is_hung` when something there still takes connections or packets vanish."""

    why: str
    is_hung: bool


class Peers:
    """Asks other ranks, side by side, each within the deadline; what they know of newer epochs goes into the ledger."""

    def __init__(self, ledger: Ledger, *, token: str) -> None:
        self._ledger = ledger
        self._token = token

    def ask(self, members: Iterable[Member], request: Json, *, timeout_ms: float) -> dict[str, Json | Silence]:
        """Replies or silences by pod_uid, for every member except this rank itself."""
        epoch = self._ledger.known_epoch
        calls = {
            m.pod_uid: (m.address, {**request, "to": m.pod_uid, "epoch": epoch})
            for m in members
            if m.pod_uid != self._ledger.me.pod_uid
        }
        results = ask_many(calls, token=self._token, timeout_ms=timeout_ms)
        answers: dict[str, Json | Silence] = {}
        for pod_uid, result in results.items():
            if isinstance(result, WireError):
                answers[pod_uid] = Silence(str(result), isinstance(result, SilentCall))
                continue
            answers[pod_uid] = result
            if "known" in result:
                self._ledger.learn(Membership.model_validate(result["known"]))
        return answers

    def probe(self, members: Iterable[Member], *, timeout_ms: float) -> dict[str, Json | Silence]:
        return self.ask(members, {"op": "probe"}, timeout_ms=timeout_ms)


def promise_of(reply: Json) -> Promise[Membership] | Refusal | None:
    """The vote in a reply to `prepare`."""
    if "promised" in reply:
        accepted = reply["accepted"]
        return Promise(
            Ballot(*reply["promised"]),
            (Ballot(*accepted[0]), Membership.model_validate(accepted[1])) if accepted else None,
        )
    return refusal_of(reply)


def refusal_of(reply: Json) -> Refusal | None:
    refused = reply.get("refused")
    return Refusal(Ballot(*refused)) if refused else None
