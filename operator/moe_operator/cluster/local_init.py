"""Process one of a local pod: runs the pod's program and lets nothing of it live longer than the pod or the shell.

A container ends with its first process, whatever daemons it started (Ray's detach themselves with setsid). Here the
same is had without a container: this program is a child subreaper, so every orphan below it becomes its child, and it
kills them all when the pod's program ends, when it is told to, or when its standard input closes, which the kernel does
for it when the shell dies in any way, `kill -9` included.

Run as a plain file by a bare interpreter (`python -I -S local_init.py PROGRAM ARGS...`): it imports only what it needs.
Standard input: `terminate SECONDS` asks the program to end and kills after SECONDS; end of file kills at once.
Exit code: the program's, or 128 + signal, as container runtimes report it.
"""

import ctypes
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def descendants(root: int) -> list[int]:
    """Every living process below `root`, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208  pathlib would triple the size of this program
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as stat:  # noqa: PTH123
                fields = stat.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != b"Z":
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, front = [], [root]
    while front:
        front = [child for parent in front for child in children.get(parent, ())]
        found += front
    return found


def kill_below(root: int, *, within_s: float = 10.0) -> None:
    """SIGKILL everything below `root` and reap it; what is stuck in the kernel for longer than `within_s` is left."""
    deadline = time.monotonic() + within_s
    while True:
        alive = descendants(root)
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return  # no child is left, so nothing is left below us
        if not alive and not descendants(root):
            return
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def spawn(argv: list[str]) -> int:
    """Fork and exec; the child dies with us even if we are killed."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(137)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error}\n".encode())
    os._exit(127)


def reap(main: int) -> int | None:
    """Collect every child that ended; the exit code of `main` if it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == main:
            ended = os.waitstatus_to_exitcode(status)
            code = ended if ended >= 0 else 128 - ended


def supervise(main: int, wake: int) -> int:
    """Wait for the end of `main`, an order on standard input, or the end of the shell. Returns the exit code."""
    deadline: float | None = None
    pending = b""
    while True:
        code = reap(main)
        if code is not None:
            return code
        wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([0, wake], [], [], wait_s)
        if deadline is not None and time.monotonic() >= deadline:
            return 128 + signal.SIGKILL
        if wake in readable:
            os.read(wake, 4096)
        if 0 in readable:
            chunk = os.read(0, 4096)
            if not chunk:
                return 128 + signal.SIGKILL
            *orders, pending = (pending + chunk).split(b"\n")
            for order in orders:
                deadline = time.monotonic() + float(order.split()[1])
                try:
                    os.kill(main, signal.SIGTERM)
                    os.kill(main, signal.SIGCONT)
                except ProcessLookupError:
                    continue


def main(argv: list[str]) -> int:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, lambda *_: None)  # the shell decides; a group-wide signal must not orphan the pod
    program = spawn(argv)
    try:
        return supervise(program, wake_read)
    finally:
        kill_below(os.getpid())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
