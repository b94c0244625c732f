"""One program of the control plane as a child process: started, watched until ready, and never left behind.

Each runs in a session of its own, so that Ctrl-C in a terminal reaches only the test run, which then stops them in
order; should the test run itself be killed, the kernel kills them (`PR_SET_PDEATHSIG`), so nothing outlives it.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class StartError(RuntimeError):
    """A program ended or did not become ready in time; the text carries the end of its log."""


def free_port() -> int:
    """A TCP port that is free on loopback now.

    Drawn below the range that the kernel hands to outgoing connections, which would otherwise take a port between this
    look and the program's own bind.
    """
    for _ in range(200):
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise StartError("no free TCP port between 20000 and 32000 on loopback")


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """A child process with its log.

    Must be started from a thread that lives as long as the process should: the kernel ties the child to that thread.
    """

    def __init__(self, name: str, command: Sequence[str | Path], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = [str(part) for part in command]
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._popen is None:
            raise StartError(f"{self.name} was not started")
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def start(self) -> None:
        """Start, or start again after `kill`; the log is appended to."""
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
                # A test's own settings (proxies, a kubeconfig) must not reach the control plane.
                env={"PATH": os.environ.get("PATH", ""), "HOME": str(self.log.parent), "TZ": "UTC"},
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one C call, loaded above: nothing that could hold a lock
            )

    def wait_ready(self, is_ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Poll until ready.

        Raises:
            StartError: it ended first, or `timeout_s` passed.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if not self.is_running:
                code = self._popen.returncode if self._popen else None
                raise StartError(f"{self.name} ended with code {code} before it was ready{self.log_tail()}")
            if time.monotonic() > deadline:
                raise StartError(f"{self.name} was not ready after {timeout_s:.0f} s{self.log_tail()}")
            time.sleep(0.05)

    def log_tail(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"; the end of {self.log}:\n  " + "\n  ".join(text.splitlines()[-lines:])

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, as on a hung machine."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def terminate(self, *, timeout_s: float = 30.0) -> int:
        """SIGTERM, and its exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: it did not end in time.
        """
        assert self._popen is not None, f"{self.name} was not started"
        self._popen.terminate()
        return self._popen.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL to the whole process group, and reaped. Harmless when it has ended already."""
        if self._popen is None:
            return
        if self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
