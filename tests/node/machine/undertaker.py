"""Ends a node whose test run was killed: `python undertaker.py PID HOME` waits for PID to be gone, then cleans up.

A killed test run cannot clean up itself, and containerd's shims are built to outlive everybody.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_of(home: str) -> list[int]:
    """Processes that name `home`, and everything inside the node's containers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if home in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(int(entry.name))
    for file in CGROUPS.glob("**/kubepods/**/cgroup.procs"):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in file.read_text().split()]
    return found


def bury(home: str) -> None:
    """SIGKILL all of them until none is left, then remove cgroups and files."""
    for _ in range(100):
        pids = processes_of(home)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            break
        time.sleep(0.1)
    for top in sorted(CGROUPS.glob("**/kubepods"), reverse=True):
        for folder, _, _ in sorted(os.walk(top), reverse=True):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
    shutil.rmtree(home, ignore_errors=True)


def main() -> None:
    pid, home = int(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while _is_alive(pid):
        time.sleep(0.5)
    bury(home)


if __name__ == "__main__":
    main()
