"""Expected failures as values.

An expected "no" carries its numbers and the next lever, so that a message written from it tells a person what to do.
Exceptions are kept for input that breaks a function's own contract:

    MoeratorError
    ├── InvalidSpec      a resource that cannot be accepted; holds every Problem found, not only the first
    └── InvalidInput     an argument of a pure function is outside its domain
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Reasons of conditions and events: typed and specific, never free text."""

    ACCEPTED = "Accepted"
    INVALID_SPEC = "InvalidSpec"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_NOT_SUPPORTED = "ModelNotSupported"
    COVERAGE_IMPOSSIBLE = "CoverageImpossible"
    TOPOLOGY_NOT_FOUND = "TopologyNotFound"
    FOREIGN_OBJECT = "ForeignObject"
    REFUSED = "Refused"
    MANAGED_ELSEWHERE = "ManagedElsewhere"
    SUSPENDED = "Suspended"
    NO_FIT = "NoFit"
    PLACED = "Placed"
    PLACING = "Placing"
    STARTING = "Starting"
    FORMING = "Forming"
    RUNNING = "Running"
    RESIZING = "Resizing"
    RANK_LOST = "RankLost"
    RANK_REPLACED = "RankReplaced"
    ALL_ACTIVE = "AllActive"
    FULL_COVERAGE = "FullCoverage"
    EXPERTS_LOST = "ExpertsLost"
    COUNTING = "Counting"
    BALANCED = "Balanced"
    REBALANCED = "Rebalanced"
    IMBALANCED = "Imbalanced"
    LOAD_NOT_FOLLOWED = "LoadNotFollowed"
    MAP_UNREADABLE = "MapUnreadable"
    COORDINATOR_AWAY = "CoordinatorAway"
    COMPLETED = "Completed"
    BUDGET_EXHAUSTED = "RestartBudgetExhausted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    RUNTIME_FAILED = "RuntimeFailed"
    STABLE = "Stable"
    DRILL_PENDING = "DrillPending"
    DRILL_INJECTED = "DrillInjected"
    DRILL_PASSED = "DrillPassed"
    DRILL_FAILED = "DrillFailed"
    TARGET_NOT_FOUND = "TargetNotFound"
    TARGET_NOT_READY = "TargetNotReady"
    DRILLS_FORBIDDEN = "DrillsForbidden"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input: where, what was given, why not, and what to write instead.

    >>> str(Problem("spec.parallelism.expert", 0, "must be at least 1"))
    'spec.parallelism.expert: must be at least 1 (got 0)'
    """

    field: str
    value: object
    message: str
    hint: str = ""

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return f"{self.field}: {self.message} (got {shown})" + (f"; {self.hint}" if self.hint else "")


class MoeratorError(Exception):
    """Root of every error moerator raises on purpose."""


class InvalidInput(MoeratorError, ValueError):
    """An argument of a pure function is outside its domain; the text names the argument and the value."""


class InvalidSpec(MoeratorError):
    """A resource cannot be accepted.

    >>> InvalidSpec([Problem("spec.model", None, "is required")]).problems[0].field
    'spec.model'
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


@dataclass(frozen=True, slots=True)
class Relaxation:
    """One change after which the gang was seen to fit. `amount` is how much of it: nodes, ranks, places or spares."""

    kind: str
    amount: int
    text: str


@dataclass(frozen=True, slots=True)
class NoFit:
    """The gang does not fit whole; nothing was placed.

    `excluded` counts per cause, in words, the ranks that would have had room otherwise; where a cause begins with
    `nodes` it counts nodes on which no rank ever has room. `relaxations` were each tried alone, the cheapest first;
    `lever` is what the message tells.
    """

    wanted: int
    level: str
    best: int
    best_domain: str
    excluded: Mapping[str, int] = field(default_factory=dict)
    lever: str = ""
    relaxations: tuple[Relaxation, ...] = ()
    terms: str = ""
    """What was asked beside the level: subgroups, ranks per node, spares."""
    beside: str = ""
    """What has no room beside the ranks, where they themselves have."""

    def __str__(self) -> str:
        where = f"in one {self.level}" if self.level else "in the cluster"
        where += f" {self.terms}" if self.terms else ""
        if self.beside:
            ranks = "rank has" if self.wanted == 1 else "ranks have"
            return f"its {self.wanted} {ranks} room {where}, but {self.beside}"
        best = f"best is {self.best_domain} with {self.best}" if self.best_domain else f"best is {self.best}"
        excluded = ", ".join(f"{cause} {count}" for cause, count in sorted(self.excluded.items()))
        text = f"needs room for {self.wanted} {'rank' if self.wanted == 1 else 'ranks'} {where}; {best}"
        text += f"; excluded: {excluded}" if excluded else ""
        return text + (f"; {self.lever}" if self.lever else "")
