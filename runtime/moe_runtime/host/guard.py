"""The guard of one process, a rank or a gateway: its pod's first process, and the only one who may end it.

It hears the ward's heartbeat over a unix socket and fences: a SIGKILL by a pidfd, so that a recycled pid is never hit,
and the answer "reaped" only once the process is really gone. A ward that is silent for too long (stopped, swapped out,
deadlocked in C) is fenced without being asked to. Until it says that it is settled (a rank: after its first step; a
gateway: once it takes requests) it may be silent for longer: importing and loading hold the interpreter, and nobody
waits for it yet.

States: absent (no heartbeat yet), alive, reaped. A fence holds for good: a ward that shows up after it is ended at
once.

This module must not import torch or Ray: it has to stay small and alive when they do not.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Literal

from moe_runtime.host.heartbeat import SETTLED_BEAT
from moe_runtime.host.pod_env import PodEnv

State = Literal["absent", "alive", "reaped"]
SILENCE_S = 5.0
"""Twenty heartbeats, for a rank that has taken part in an epoch."""
LOADING_SILENCE_S = 60.0
"""Before that. Twelve ranks that load at once on two cores are silent for up to 1.4 s (23 Nov); one was once for over
5 s, at a load of 19 with a busy disk. A rank that really hangs here delays nothing but its own entry."""
_REAP_S = 5.0
_TICK_S = 0.1
_LONGEST_TICK_S = 0.5
"""More than this between two looks is the guard's own absence (stopped, or starved like its ward): not the ward's."""


class Victim:
    """One process, held by a pidfd where the kernel has them, else told apart by its start time."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._started = _start_time(pid)
        try:
            self._pidfd: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            raise
        except OSError:  # no such call in this kernel or sandbox
            self._pidfd = None

    @property
    def is_gone(self) -> bool:
        """Whether it has ended; its parent may still have to collect the exit code."""
        if self._pidfd is not None:
            return bool(select.select([self._pidfd], [], [], 0)[0])
        started = _start_time(self.pid)
        return started is None or started != self._started

    def send(self, number: signal.Signals) -> None:
        if self.is_gone:
            return
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def guard_socket_path(env: PodEnv) -> Path:
    """Short: a unix socket's path must stay under 108 bytes."""
    key = sha256(f"{env.config.uid}:{env.pod_uid}".encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"moe-guard-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{key}.sock"


def _start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None when it is gone or only waits to be collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


class Guard:
    """Watches one process from before it exists until it is gone. `ended` is set then, with the cause in `reason`."""

    def __init__(
        self,
        *,
        pod_uid: str,
        socket_path: Path,
        silence_s: float = SILENCE_S,
        loading_silence_s: float = LOADING_SILENCE_S,
    ) -> None:
        """`socket_path` is where the ward finds its guard; at most 107 bytes, in a folder of its own user."""
        self.pod_uid = pod_uid
        self.socket_path = socket_path
        self.reason = ""
        self.ended = threading.Event()
        self._silence_s, self._loading_silence_s = silence_s, loading_silence_s
        self._lock = threading.Condition()
        self._victim: Victim | None = None
        self._link: socket.socket | None = None
        self._is_settled = False
        self._silent_s = 0.0
        self._is_fenced = False
        self._is_closed = threading.Event()
        socket_path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(socket_path))
        socket_path.chmod(0o600)
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        with self._lock:
            if self.ended.is_set():
                return "reaped"
            return "absent" if self._victim is None else "alive"

    def fence(self, reason: str) -> State:
        """End the ward and wait until it is gone: `reaped`; `absent` if it never came (it will be ended if it does).

        Blocks for at most 5 s; a process that even SIGKILL does not end by then (in the kernel) is still `alive`.
        """
        with self._lock:
            self._is_fenced = True
            victim = self._victim
            if victim is None or self.ended.is_set():
                return self.state
            self.reason = self.reason or f"fenced: {reason}"
            victim.send(signal.SIGKILL)
        self.ended.wait(_REAP_S)
        return self.state

    def close(self) -> None:
        """Stop watching. A ward that still lives ends itself when its heartbeat finds nobody."""
        self._is_closed.set()
        self._thread.join(timeout=2.0)
        self._listener.close()
        self.socket_path.unlink(missing_ok=True)
        with self._lock:
            if self._link is not None:
                self._link.close()
            if self._victim is not None:
                self._victim.close()

    @property
    def pid(self) -> int:
        """Of the ward; 0 while it is absent."""
        with self._lock:
            return self._victim.pid if self._victim is not None else 0

    @property
    def silent_s(self) -> float:
        with self._lock:
            return self._silent_s

    def inject(self, fault: str) -> None:
        """A drill's fault: it must look like an accident, so nothing is noted beforehand. Raises ValueError."""
        with self._lock:
            if self._victim is None:
                return
            if fault == "kill":
                self._victim.send(signal.SIGKILL)
            elif fault == "hang":
                self._victim.send(signal.SIGSTOP)
            else:
                raise ValueError(f"fault {fault!r} is none of kill, hang")

    def _watch(self) -> None:
        self._listener.setblocking(False)
        looked_at = time.monotonic()
        while not self._is_closed.is_set():
            watched = [self._listener] + ([self._link] if self._link is not None else [])
            ready = select.select(watched, [], [], _TICK_S)[0]
            now = time.monotonic()
            with self._lock:
                self._silent_s += min(now - looked_at, _LONGEST_TICK_S)
            looked_at = now
            # What has been said is heard before silence is judged: this process may have been stopped itself.
            if self._link in ready:
                self._hear()
            if self._listener in ready:
                self._greet()
            self._judge()

    def _greet(self) -> None:
        """A process says it is the ward. The kernel names its pid; only the first may, until that one is gone."""
        try:
            link, _ = self._listener.accept()
        except OSError:
            return
        link.settimeout(1.0)
        try:
            pid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            hello = json.loads(link.recv(4096).split(b"\n")[0])
            if hello["pod_uid"] != self.pod_uid or self._victim is not None:
                raise ValueError(f"not the ward of pod {self.pod_uid}")
            victim = Victim(pid)
        except (OSError, ValueError, KeyError, TypeError):
            link.close()
            return
        link.setblocking(False)
        with self._lock:
            self._victim, self._link, self._silent_s = victim, link, 0.0
            if self._is_fenced:
                self.reason = "fenced before it came"
                victim.send(signal.SIGKILL)

    def _hear(self) -> None:
        assert self._link is not None
        try:
            said = self._link.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        with self._lock:
            if said:
                self._silent_s = 0.0
                self._is_settled = self._is_settled or SETTLED_BEAT in said
            else:
                # It says nothing more: it has ended, is ending, or will be judged silent.
                self._link.close()
                self._link = None

    def _judge(self) -> None:
        with self._lock:
            victim = self._victim
            if victim is None or self.ended.is_set():
                return
            if victim.is_gone:
                self.reason = self.reason or "its process ended"
                self.ended.set()
                return
            if self._silent_s > (self._silence_s if self._is_settled else self._loading_silence_s):
                doing = "" if self._is_settled else " while it was loading"
                self.reason = self.reason or f"fenced: silent for {self._silent_s:.1f} s{doing}"
                victim.send(signal.SIGKILL)
