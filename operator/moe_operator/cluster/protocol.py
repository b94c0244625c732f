"""What reconcile needs of a cluster: about ten verbs, the same for Kubernetes and for one machine.

Every verb is idempotent and may raise `Conflict` (seen state is stale: observe again), `Foreign` (the object belongs to
somebody else), `Refused` (the server does not accept it: the text is the server's own) or `Unavailable` (try later,
after `retry_after` seconds when the server said so).
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_core.contract.exchange import FaultRequest, RuntimeState, RuntimeWish
from moe_core.facts import (
    ApplyObject,
    BindPod,
    CreatePod,
    DeleteObject,
    DeletePod,
    EnsureToken,
    Event,
    Facts,
    Kind,
    ReportMap,
    Wish,
)
from moe_core.outcome import MoeratorError


class ClusterError(MoeratorError):
    """A verb did not take effect."""


class Conflict(ClusterError):
    """The object changed meanwhile (409, UID precondition); observe again and decide anew."""


class Foreign(ClusterError):
    """The object exists and belongs to somebody else; the text names it and its owner."""


class Refused(ClusterError):
    """The server does not accept it (invalid, forbidden, over quota); a retry alone will not help.

    `code` is its HTTP status, `said` its own sentence.
    """

    def __init__(self, message: str, *, code: int = 0, said: str = "") -> None:
        self.code = code
        self.said = said or message
        super().__init__(message)


class Unavailable(ClusterError):
    """The server cannot answer now (429, 5xx, no connection); `retry_after` in seconds when it said so."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Names one custom resource to reconcile."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class RuntimeFace(Protocol):
    """The coordinator of one owner, over HTTP."""

    async def put_wish(self, wish: RuntimeWish) -> None: ...

    async def inject(self, fault: FaultRequest) -> None: ...

    @property
    def state(self) -> RuntimeState | None:
        """Newest state that the long poll brought; None while no coordinator answers."""

    @property
    def put_generation(self) -> int | None:
        """Generation of the wish last taken by the coordinator that answers now."""


class Cluster(Protocol):
    """Observation comes from caches that a watch keeps fresh; verbs talk to the server."""

    def dirty(self) -> AsyncIterator[Key]:
        """Keys whose facts changed, including what the watch saw and what a coordinator reported."""

    async def observe(self, key: Key) -> tuple[Wish, Facts] | None:
        """The wish and its facts; None when the object is gone."""

    async def apply_object(self, wish: Wish, action: ApplyObject) -> None: ...

    async def ensure_token(self, wish: Wish, action: EnsureToken) -> None: ...

    async def create_pod(self, wish: Wish, action: CreatePod) -> None: ...

    async def bind_pod(self, wish: Wish, action: BindPod) -> None: ...

    async def delete_pod(self, wish: Wish, action: DeletePod) -> None: ...

    async def delete_object(self, wish: Wish, action: DeleteObject) -> None: ...

    async def report_map(self, wish: Wish, action: ReportMap) -> None: ...

    async def delete_owner(self, wish: Wish) -> None: ...

    def runtime(self, wish: Wish) -> RuntimeFace:
        """Face of the coordinator of `wish`; of its target for a MoEDrill."""

    async def write_status(
        self, wish: Wish, *, conditions: Sequence[Mapping[str, Any]], status: Mapping[str, Any]
    ) -> None: ...

    async def emit(self, wish: Wish, event: Event) -> None: ...
