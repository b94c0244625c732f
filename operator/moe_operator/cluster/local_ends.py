"""How pods of one machine end: asked first, killed after their grace, and nothing of them left behind."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from moe_operator.cluster import local_init

END_WITHIN_S = 5.0
"""For a pod's first process to take everything with it; it needs milliseconds, unless it is stopped itself."""


def order_end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Ask the pod's program to end; `local_init` kills what is left after `grace_s`, and is killed if it does not."""
    if process.stdin is not None and not process.stdin.is_closing():
        process.stdin.write(f"terminate {grace_s:g}\n".encode())
    asyncio.get_running_loop().call_later(grace_s + END_WITHIN_S, _kill, process)


async def end_of(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(END_WITHIN_S):
            await process.wait()
    except TimeoutError:
        _kill(process)
        await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    """A first process that is stopped ends nothing; once it is gone its children are ours, and swept."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def sweep(mark: str) -> None:
    """SIGKILL and reap every process below this one with `mark`, NAME=VALUE, in its environment: what is left of a pod
    whose first process was killed, or of a run that ends.
    """
    for pid in local_init.descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def last_line(log: Path) -> str:
    """What a pod said last: an error's own line, where one ended it."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def describe_exit(code: int) -> str:
    """
    >>> describe_exit(137), describe_exit(3)
    ('killed by SIGKILL (exit code 137)', 'exit code 3')
    """
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(code - 128).name} (exit code {code})"
    return f"exit code {code}"
