"""The rank's side of its guard: a thread that says "alive" and ends the process when nobody listens any more.

A rank must not outlive its guard: without it nobody could fence the rank, and a pod whose parent is gone would go on
holding a device. So a dropped connection ends the process at once, without exit hooks that might wait for peers.
"""

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

BEAT_S = 0.25
SETTLED_BEAT = b"+"
"""A beat of a rank that has taken part in an epoch; the others are dots."""
EXIT_GUARD_GONE = 70
_CONNECT_S = 5.0


def _end_process(code: int) -> None:
    os._exit(code)


class Heartbeat:
    """Beats from its creation until `close()`. Raises OSError when no guard listens at `path`."""

    def __init__(self, path: Path, *, pod_uid: str, end_process: Callable[[int], None] = _end_process) -> None:
        self._end_process = end_process
        self._closed = threading.Event()
        self._settled = threading.Event()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(_CONNECT_S)
        try:
            self._sock.connect(str(path))
            self._sock.sendall(json.dumps({"pod_uid": pod_uid, "pid": os.getpid()}).encode() + b"\n")
        except OSError:
            self._sock.close()
            raise
        self._sock.settimeout(BEAT_S)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """From now on silence means a fault: imports and loading are over, and others wait for this process."""
        self._settled.set()

    def close(self) -> None:
        """Say goodbye: the guard then expects this process to end by itself soon."""
        self._closed.set()
        try:
            self._sock.sendall(b"bye\n")
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the guard went first
        self._thread.join(timeout=2.0)
        self._sock.close()

    def _beat(self) -> None:
        while not self._closed.is_set():
            try:
                self._sock.sendall((SETTLED_BEAT if self._settled.is_set() else b".") + b"\n")
                is_there = bool(self._sock.recv(256))
            except TimeoutError:
                continue
            except OSError:
                is_there = False
            if self._closed.is_set():
                return
            if not is_there:
                self._end_process(EXIT_GUARD_GONE)
                return
