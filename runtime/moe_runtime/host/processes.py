"""Keeping a pod's processes together: nothing a pod started outlives it, however it ends.

Three threads hold: the pod leads a session of its own (a shell can kill it whole), it is the subreaper of everything
below it (an orphaned grandchild comes back to it), and its children ask the kernel for a SIGKILL when it dies.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def lead_session() -> None:
    """Lead a session and adopt orphans from below. Does nothing where this process leads one already."""
    with contextlib.suppress(PermissionError):
        os.setsid()
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent_pid: int) -> Callable[[], None]:
    """A `preexec_fn`: the kernel kills the child when its parent `parent_pid` dies, also if that happened already."""

    def in_child() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            os._exit(1)

    return in_child


def start(
    command: Sequence[str], *, env: Mapping[str, str], log: Path | None = None, pass_fds: Collection[int] = ()
) -> "subprocess.Popen[bytes]":
    """Start a child that dies with this process. From the main thread only: the kernel watches the forking thread."""
    out = log.open("ab") if log is not None else None
    try:
        return subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out is not None else None,
            pass_fds=tuple(pass_fds),
            preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 - one system call, no lock, no import
        )
    finally:
        if out is not None:
            out.close()


def parents() -> dict[int, int]:
    """pid -> parent pid of every process that can be seen."""
    table: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                table[int(entry.name)] = int(stat[stat.rindex(")") + 2 :].split()[1])
    return table


def descendants(pid: int) -> Iterator[int]:
    """Every living process below `pid`, nearest first."""
    children: dict[int, list[int]] = {}
    for child, parent in parents().items():
        children.setdefault(parent, []).append(child)
    level = children.get(pid, [])
    while level:
        yield from level
        level = [grandchild for child in level for grandchild in children.get(child, [])]


def end_descendants(*, grace_s: float) -> None:
    """SIGTERM everything below this process, after `grace_s` SIGKILL; returns when nothing is left (reaped)."""
    deadline = time.monotonic() + grace_s
    signalled: set[int] = set()
    while True:
        _reap()
        living = list(descendants(os.getpid()))
        if not living:
            return
        late = time.monotonic() > deadline
        if time.monotonic() > deadline + 5.0:
            return
        for pid in living:
            if late or pid not in signalled:
                signalled.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.05)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def resident_bytes(pid: int | str = "self") -> int:
    """Resident set size; 0 when the process is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
