"""A network, a mount table and a family of processes of the test's own, so that a whole node leaves nothing behind.

The calling thread (and what it starts) moves into a new network namespace and a new mount namespace. Every descendant
is adopted by this process, daemons that forked away included, and can therefore be killed at the end.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

CLONE_FS, CLONE_NEWNS, CLONE_NEWNET = 0x00000200, 0x00020000, 0x40000000
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


@contextlib.contextmanager
def isolated(address: str, *, keep: Sequence[int] = ()) -> Iterator[None]:
    """Loopback, and an empty bridge that holds `address` (a kubelet refuses a loopback address for its node)."""
    with contextlib.ExitStack() as stack:
        before = [stack.enter_context(Path(f"/proc/thread-self/ns/{kind}").open("rb")) for kind in ("net", "mnt")]
        folder = Path.cwd()
        _check(_libc.unshare(CLONE_NEWNET | CLONE_NEWNS), "unshare")
        _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
        try:
            run("mount", "--make-rprivate", "/")
            Path("/run/netns").mkdir(exist_ok=True)
            run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")  # CNI leaves a file per pod there
            run("ip", "link", "set", "lo", "up")
            run("ip", "link", "add", "node0", "type", "bridge")
            run("ip", "address", "add", f"{address}/32", "dev", "node0")
            run("ip", "link", "set", "node0", "up")
            run("ip", "route", "add", "default", "dev", "node0")  # Service addresses are rewritten on the way out
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            yield
        finally:
            kill_descendants(keep=keep)
            _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0), "prctl")
            _check(_libc.unshare(CLONE_FS), "unshare")  # threads that were started meanwhile share it with this one
            for file in before:
                _check(_libc.setns(file.fileno(), 0), "setns")
            os.chdir(folder)


def run(*command: str | Path, timeout_s: float = 120, stdin: str | None = None) -> str:
    """Run to the end and return what it printed. Raises RuntimeError with its message when it fails."""
    done = subprocess.run(
        [str(part) for part in command], input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s
    )
    if done.returncode != 0:
        shown = " ".join(str(part) for part in command)
        raise RuntimeError(f"{shown} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def descendants(root: int) -> list[int]:
    """Every living process below `root`, nearest first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def kill_descendants(*, keep: Sequence[int] = (), within_s: float = 20) -> None:
    """SIGKILL whatever this process has started, directly or not, until nothing is left.

    Raises RuntimeError naming what stays.
    """
    deadline = time.monotonic() + within_s
    while left := [pid for pid in descendants(os.getpid()) if pid not in keep]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} outlive their node")
        time.sleep(0.05)
