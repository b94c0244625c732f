"""The collectives of one epoch: built for a committed membership, used until its first fault, then destroyed.

Stock Gloo on CPUs, stock NCCL on GPUs, without torch's global default group: a process builds many of these in its
life. Every operation has its own deadline and raises GroupFault for whatever the backend raises; after a fault every
further operation raises at once, since the ranks no longer agree on what was exchanged. Destroying a group closes its
sockets, and that is what tells the peers that still wait in a collective: destroy first, then agree on the next
epoch.

Positions number the members 0..size-1 in the order of `ranks`.
"""

import contextlib
import datetime
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch._C import _distributed_c10d as c10d

from moe_core.contract.membership import Member, Membership
from moe_runtime.errors import GroupFault
from moe_runtime.membership.all_to_all import AllToAll, Far, Heard
from moe_runtime.membership.near_memory import NearMemory
from moe_runtime.membership.rendezvous import RendezvousStore
from moe_runtime.membership.wire import split_address

T = TypeVar("T")

_TAG = 1
"""Of messages between two members; they go one after the other."""
_DEVICES: dict[str, object] = {}
"""Gloo devices by bound address: each has a thread and a listening socket, so one serves every group of the process."""


class EpochGroup:
    """One epoch's process group. Not thread-safe: the step thread owns it.

    >>> with EpochGroup.build(membership, rank=0, token=token) as group:      # doctest: +SKIP
    ...     rows = group.all_gather_ints([tokens, epoch])
    """

    def __init__(
        self,
        store: c10d.Store,
        ranks: Sequence[int],
        rank: int,
        *,
        address: str,
        device: str,
        timeout_ms: int,
        domains: Sequence[str] | None = None,
    ):
        """Connects to all members; raises GroupFault when that fails or takes longer than `timeout_ms`.

        `timeout_ms` also bounds every operation that is not given its own. `address` is what this rank binds to.
        domains: where each of `ranks` runs, if that is known.
        """
        if rank not in ranks:
            raise ValueError(f"rank {rank} is not one of {list(ranks)}")
        self.ranks = tuple(ranks)
        self.domains = None if domains is None else tuple(domains)
        self.position = self.ranks.index(rank)
        self.device = torch.device(device)
        self._timeout_ms = timeout_ms
        self._broken = ""
        self.sent_bytes = [0] * len(self.ranks)
        """By position: what all-to-alls have sent there; at this rank's own position, what stayed."""
        self.blocked_s = 0.0
        """Time inside collectives so far: moving bytes and waiting for others."""
        self._works: dict[int, Any] = {}  # of exchanges under way: here alone, so that they go with the group
        self._backend: Any = None  # a c10d.Backend; torch's stubs leave its operations out
        if len(self.ranks) > 1:
            try:
                self._backend = _backend(
                    store, self.position, self.size, address=address, device=self.device, timeout_ms=timeout_ms
                )
            except RuntimeError as error:
                self._broken = f"connect: {_first_line(error)}"
                raise GroupFault(self._broken) from None
        self._exchanges = AllToAll(position=self.position, near=None)
        if self._backend is not None and self.device.type == "cpu":
            try:
                near = NearMemory.meet(self.all_gather_ints, ranks=self.ranks, position=self.position)
            except GroupFault:
                self.destroy()
                raise
            self._exchanges = AllToAll(position=self.position, near=near)

    @classmethod
    def build(
        cls, membership: Membership, *, rank: int, token: str, device: str = "cpu", timeout_ms: int = 3000
    ) -> "EpochGroup":
        """The group of a committed epoch. Its members meet in the peer face of the first of them."""
        member = member_of(membership, rank)
        host, _ = split_address(member.address)
        prefix = f"{membership.epoch}-{'.'.join(m.pod_uid for m in membership.members)}"
        store = RendezvousStore(membership.members[0].address, prefix=prefix, token=token, timeout_ms=timeout_ms)
        return cls(
            store,
            membership.ranks,
            rank,
            address=host,
            device=device,
            timeout_ms=timeout_ms,
            domains=[m.place for m in membership.members],
        )

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_to_all(
        self,
        rows: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        *,
        timeout_ms: int | None = None,
    ) -> torch.Tensor:
        """Send `send_counts[p]` rows (dim 0, in order of positions) to each position; returns the rows received.

        rows [sum(send_counts), ...] -> [sum(receive_counts), ...]. No autograd.
        """
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        self.all_to_all_single(received, rows, receive_counts, send_counts, timeout_ms=timeout_ms)
        return received

    def swap(self, rows: torch.Tensor, counts: Sequence[int], *, timeout_ms: int | None = None) -> torch.Tensor:
        """`all_to_all` of what is no dispatch: as many rows come from each position as go there; none is counted."""
        received = torch.empty_like(rows)
        self._begin(received, rows.detach().contiguous(), counts, counts, timeout_ms, counted=False)()
        return received

    def all_to_all_single(
        self,
        out: torch.Tensor,
        rows: torch.Tensor,
        out_splits: Sequence[int],
        in_splits: Sequence[int],
        *,
        timeout_ms: int | None = None,
    ) -> None:
        """The same into a tensor that is already there."""
        if len(out_splits) != self.size or sum(out_splits) != out.shape[0]:
            raise ValueError(f"out_splits {list(out_splits)} do not fit {self.size} members and {out.shape[0]} rows")
        if len(in_splits) != self.size or sum(in_splits) != rows.shape[0]:
            raise ValueError(f"in_splits {list(in_splits)} do not fit {self.size} members and {rows.shape[0]} rows")
        self._begin(out, rows.detach().contiguous(), out_splits, in_splits, timeout_ms)()

    def post_all_to_all(
        self,
        rows: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        *,
        timeout_ms: int | None = None,
    ) -> "Posted[torch.Tensor]":
        """`all_to_all`, begun and not waited for; operations end in the order in which they began.

        Its deadline counts from now: what is computed before `wait` must take less.
        """
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        end = self._begin(received, rows.detach().contiguous(), receive_counts, send_counts, timeout_ms)

        def wait() -> torch.Tensor:
            end()
            return received

        return Posted(wait)

    @property
    def tells(self) -> bool:
        """Whether rows may go to members that do not know how many come; the same on all."""
        return self._exchanges.is_near

    def post_telling(
        self,
        rows: torch.Tensor,
        send_counts: Sequence[int],
        told_GC: torch.Tensor,
        *,
        timeout_ms: int | None = None,
    ) -> "Posted[Heard]":
        """`post_all_to_all` where this group `tells`, and told_GC[p] (int64) to each position. No autograd."""
        until = self._until(timeout_ms)
        rows = rows.detach().contiguous()
        end = self._attempt("all_to_all", lambda: self._exchanges.tell(rows, send_counts, told_GC))
        self._count(rows, send_counts)
        self._count(told_GC, (1,) * self.size)
        return Posted(lambda: self._attempt("all_to_all", lambda: end(until)))

    def _begin(
        self,
        out: torch.Tensor,
        rows: torch.Tensor,
        receive_counts: Sequence[int],
        send_counts: Sequence[int],
        timeout_ms: int | None,
        *,
        counted: bool = True,
    ) -> Callable[[], None]:
        """What ends the exchange. Both raise GroupFault."""
        self._check("all_to_all")
        if counted:
            self._count(rows, send_counts)
        if self._backend is None:
            out.copy_(rows)
            return lambda: None
        until, deadline = self._until(timeout_ms), _timedelta(timeout_ms or self._timeout_ms)
        exchange = self._attempt("all_to_all", lambda: self._exchanges.begin(out, rows, receive_counts, send_counts))
        far = exchange.far
        if far is not None:
            self._works[exchange.number] = self._attempt("all_to_all", lambda: self._start(far, deadline))

        def end() -> None:
            if far is not None:
                self._await(self._works.pop(exchange.number), deadline)
            exchange.end(until)

        return lambda: self._attempt("all_to_all", end)

    def _start(self, far: Far, deadline: datetime.timedelta) -> Any:
        options = c10d.AllToAllOptions()
        options.timeout = deadline
        return self._backend.alltoall_base(far.received, far.sent, far.receive_counts, far.send_counts, options)

    def _count(self, rows: torch.Tensor, in_splits: Sequence[int]) -> None:
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        for position, count in enumerate(in_splits):
            self.sent_bytes[position] += count * row_bytes

    def send(self, tensor: torch.Tensor, position: int, *, timeout_ms: int | None = None) -> None:
        """To one other member, which receives as many numbers. Returns when the tensor may be changed."""
        self._one_to_one("send", lambda: self._backend.send([tensor], position, _TAG), timeout_ms)

    def receive(self, tensor: torch.Tensor, position: int, *, timeout_ms: int | None = None) -> None:
        """From one other member, into `tensor`."""
        self._one_to_one("receive", lambda: self._backend.recv([tensor], position, _TAG), timeout_ms)

    def _one_to_one(self, what: str, start: Callable[[], Any], timeout_ms: int | None) -> None:
        self._check(what)
        try:
            start().wait(_timedelta(timeout_ms or self._timeout_ms))
        except RuntimeError as error:
            self._broken = f"{what}: {_first_line(error)}"
            raise GroupFault(self._broken) from None

    def all_gather_ints(self, row: Sequence[int], *, timeout_ms: int | None = None) -> list[list[int]]:
        """Every member's row of equally many integers, by position."""
        if self._backend is None:
            self._check("all_gather")
            return [list(row)]
        mine = torch.tensor(row, dtype=torch.int64, device=self.device)
        if self._exchanges.is_near:
            each, until = (1,) * self.size, self._until(timeout_ms)
            rows, heard = mine.expand(self.size, -1).contiguous(), mine.new_empty(self.size, len(row))
            self._attempt("all_gather", lambda: self._exchanges.begin(heard, rows, each, each).end(until))
            return heard.tolist()
        table = torch.empty((self.size, len(row)), dtype=torch.int64, device=self.device)
        options = c10d.AllgatherOptions()
        self._run(
            "all_gather", lambda: self._backend._allgather_base(table.view(-1), mine, options), options, timeout_ms
        )
        return table.tolist()  # device sync: the control exchange decides on the host

    def all_reduce_sum(self, tensor: torch.Tensor, *, timeout_ms: int | None = None) -> None:
        """Sum over members, in place. After a GroupFault the tensor holds anything."""
        self._check("all_reduce")
        if self._backend is None:
            return
        if self._exchanges.is_near:
            until = self._until(timeout_ms)
            self._attempt("all_reduce", lambda: self._exchanges.sum(tensor, until=until))
            return
        options = c10d.AllreduceOptions()
        options.reduceOp = c10d.ReduceOp.SUM
        self._run("all_reduce", lambda: self._backend.allreduce([tensor], options), options, timeout_ms)

    def destroy(self) -> None:
        """Close the sockets and threads of this group; peers that wait for it fault at once. Idempotent."""
        self._broken = self._broken or "destroyed"
        self._exchanges.close()
        self._works.clear()
        backend, self._backend = self._backend, None
        if backend is None:
            return
        with contextlib.suppress(RuntimeError):  # an aborted backend may complain; it is being thrown away
            if self.device.type == "cuda":
                backend.abort()
            else:
                backend.shutdown()

    def __enter__(self) -> "EpochGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def _check(self, what: str) -> None:
        if self._broken:
            raise GroupFault(f"{what}: this epoch's group is gone: {self._broken}")

    def _until(self, timeout_ms: int | None) -> float:
        """By time.monotonic."""
        return time.monotonic() + (timeout_ms or self._timeout_ms) / 1000

    def _run(self, what: str, start: Callable[[], Any], options: Any, timeout_ms: int | None) -> None:
        options.timeout = _timedelta(timeout_ms or self._timeout_ms)
        self._attempt(what, lambda: self._await(start(), options.timeout))

    def _attempt(self, what: str, do: Callable[[], T]) -> T:
        self._check(what)
        began = time.monotonic()
        try:
            return do()
        except RuntimeError as error:
            # Its text alone: its traceback, kept by whoever handles the fault, would hold the backend's work and with
            # it the sockets, and `destroy` could not close them.
            self._broken = f"{what}: {_first_line(error)}"
        finally:
            self.blocked_s += time.monotonic() - began
        raise GroupFault(self._broken)

    def _await(self, work: Any, deadline: datetime.timedelta) -> None:
        if self.device.type == "cuda":
            work.wait(deadline)  # device sync: with a time-out NCCL's wait blocks the host until the deadline
        else:
            work.wait()


class Posted(Generic[T]):
    """An exchange that has begun; `wait` once."""

    def __init__(self, wait: Callable[[], T]) -> None:
        self.wait = wait


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def member_of(membership: Membership, rank: int) -> Member:
    """The member with this rank id. Raises ValueError."""
    for member in membership.members:
        if member.rank == rank:
            return member
    raise ValueError(f"rank {rank} is not a member of epoch {membership.epoch}: {list(membership.ranks)}")


def _timedelta(milliseconds: float) -> datetime.timedelta:
    return datetime.timedelta(milliseconds=math.ceil(milliseconds))


def _backend(
    store: c10d.Store, position: int, size: int, *, address: str, device: torch.device, timeout_ms: int
) -> c10d.Backend:
    if device.type == "cuda":
        return _nccl(store, position, size, timeout_ms)
    _take_turns()
    options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = _timedelta(timeout_ms)
    options._threads = 1  # operations of a step come one after the other
    if address not in _DEVICES:
        # Not lazily: a member that cannot be reached must fault the build, not a collective in the middle of a step.
        _DEVICES[address] = c10d.ProcessGroupGloo.create_device(hostname=address, lazy_init=False)
    options._devices = [_DEVICES[address]]
    return c10d.ProcessGroupGloo(store, position, size, options)


def _take_turns() -> None:
    """Woken threads of this rank wait for their turn on a core, Gloo's with them: they inherit it from this thread.

    Gloo's event thread spins while another one holds a connection's lock. Where ranks share cores, a thread that sends
    is put aside with that lock in favour of the peer it has just woken, and the spinning lasts for a turn of the
    scheduler: an exchange of four ranks on two cores took 3.8 ms of processor time, and takes 0.65 so.
    """
    with contextlib.suppress(AttributeError, OSError):  # not every system has it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _nccl(store: c10d.Store, position: int, size: int, timeout_ms: int) -> c10d.Backend:
    # NCCL's watchdog ends the whole process on a fault unless told to leave errors to us.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = _timedelta(timeout_ms)
    return c10d.ProcessGroupNCCL(store, position, size, options)
