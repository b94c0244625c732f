"""What was not accepted, as conditions: no retry helps where a quota, a policy or an invalid pod stands in the way.

The decision is made again on the same facts with the refusals among them. Its actions are tried again after a while;
with the first cycle in which nothing is refused these conditions are gone.
"""

from dataclasses import replace

from moe_core.contract.names import ROLE_RANK
from moe_core.decide.report import events_of
from moe_core.facts import (
    ApplyObject,
    BindPod,
    Condition,
    CreatePod,
    Decision,
    DeleteOwner,
    DeletePod,
    EnsureToken,
    Event,
    Facts,
    PutWish,
    RefusedAction,
    Wish,
)
from moe_core.outcome import Reason

INVALID = 422


def with_refusals(wish: Wish, facts: Facts, decision: Decision) -> Decision:
    """The decision with conditions that name what was refused, and one event when that is news."""
    refused = tuple(one for one in facts.refused if not one.is_foreign)  # accept tells of the others
    if not refused:
        return decision
    told = tell(refused)
    conditions = tuple(_refused(condition, refused, told) for condition in decision.conditions)
    is_news = wish.status.get("message") != told
    gone = events_of(wish.status, decision.conditions)
    events = [event for event in decision.events if event not in gone]
    if any(isinstance(one.action, CreatePod | DeletePod) for one in refused):  # then nothing has been replaced
        events = [event for event in events if event.reason != Reason.RANK_REPLACED]
    events += [event for event in events_of(wish.status, conditions) if event.reason != Reason.REFUSED]
    return replace(
        decision,
        conditions=conditions,
        status={**decision.status, "message": told},
        events=(*events, *([Event("Warning", Reason.REFUSED, told)] if is_news else [])),
    )


def tell(refused: tuple[RefusedAction, ...]) -> str:
    """One sentence: the first in the server's words, and how many more.

    >>> tell((RefusedAction(EnsureToken("tiny-job-token"), 403, "exceeded quota"),))
    'Secret tiny-job-token was refused: 403 exceeded quota'
    """
    first = refused[0]
    more = f"; and {len(refused) - 1} more" if len(refused) > 1 else ""
    return f"{_subject(first)} was refused: {first.code} {first.message}{more}"


def foreign_names(facts: Facts) -> tuple[str, ...]:
    """`Kind/name` of everything that bears a child's name and belongs to somebody else."""
    met = (_subject(one).replace(" ", "/") for one in facts.refused if one.is_foreign)
    return tuple(sorted({*facts.foreign, *met}))


def _subject(one: RefusedAction) -> str:
    action = one.action
    match action:
        case ApplyObject() | EnsureToken():
            return f"{action.kind if isinstance(action, ApplyObject) else 'Secret'} {action.name}"
        case PutWish():
            return f"the wish of generation {action.wish.generation}"
        case DeleteOwner():
            return "the deletion of this object"
    return f"{getattr(action, 'kind', 'Pod')} {getattr(action, 'name', '')}".strip()


def _refused(condition: Condition, refused: tuple[RefusedAction, ...], told: str) -> Condition:
    match condition.type:
        case "Progressing":
            return Condition("Progressing", "False", Reason.REFUSED, told)
        case "Ready" if condition.status != "True" and condition.reason in (Reason.STARTING, Reason.FORMING):
            return Condition("Ready", "False", Reason.REFUSED, told)
        case "Placed" if condition.status != "True" and any(_is_placing(one) for one in refused):
            return Condition("Placed", "False", Reason.REFUSED, told)
        case "Accepted" if condition.status == "True" and any(_is_invalid(one) for one in refused):
            return Condition("Accepted", "False", Reason.REFUSED, told)
    return condition


def _is_placing(one: RefusedAction) -> bool:
    return isinstance(one.action, BindPod) or (isinstance(one.action, CreatePod) and one.action.role == ROLE_RANK)


def _is_invalid(one: RefusedAction) -> bool:
    """What the spec asks for is no valid object: the spec is to blame, not the cluster."""
    return one.code == INVALID and isinstance(one.action, ApplyObject | CreatePod)
