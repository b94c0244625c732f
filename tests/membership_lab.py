"""Real ranks on loopback for the membership tests: forked from one process that has torch imported already.

`Program` and `Lab` are the tests' side. The program (`python membership_lab.py`) takes one JSON order a line on
stdin, forks a guard and a rank for each `start`, and every process writes its events as JSON lines to the one stdout
pipe.

A rank steps: a control exchange, then an uneven all-to-all whose content it checks. Orders to ranks are files in the
run's folder.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]
TOKEN = "lab-token"
STEP_MS = 1000
SILENCE_S = 2.5
FAREWELL_S = 2.0


# ---------------------------------------------------------------- the tests' side


@dataclass
class RankProcess:
    rank: int
    uid: str
    port: int
    guard_port: int
    pid: int = 0
    guard_pid: int = 0

    def member(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "pod_uid": self.uid,
            "address": f"127.0.0.1:{self.port}",
            "guard_address": f"127.0.0.1:{self.guard_port}",
        }

    def kill(self, number: signal.Signals = signal.SIGKILL) -> float:
        os.kill(self.pid, number)
        return time.time()


class Program:
    """The process that has everything imported; it serves many labs, one after the other."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self.news: queue.Queue[Event | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        ready = self.news.get(timeout=90)
        assert ready is not None
        assert ready["event"] == "ready"

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.news.put(json.loads(line))
        self.news.put(None)

    def order(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=5)
        self._reader.join(timeout=5)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


class Lab:
    """One run: its ranks and their events. Every wait has a deadline."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self.ranks: dict[str, RankProcess] = {}
        self._program = program

    def wait(self, matches: Callable[[Event], bool], timeout_s: float = 15) -> Event:
        """The first event, seen already or to come, that matches."""
        for event in self.events:
            if matches(event):
                return event
        deadline = time.monotonic() + timeout_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                news = self._program.news.get(timeout=remaining_s)
                assert news is not None, f"the lab's program ended; last events: {self.events[-5:]}"
                if news["run"] != str(self.folder):
                    continue
                self.events.append(news)
                if matches(news):
                    return news
        raise AssertionError("no such event in time; seen:\n" + "\n".join(map(str, self.events)))

    def settled(self, uids: set[str], *, above: int = 0, timeout_s: float = 15) -> dict[str, Event]:
        """Waits until these ranks, and no others, step together in one epoch above the given; their events by uid."""
        deadline = time.monotonic() + timeout_s
        while True:
            epochs = {e["epoch"] for e in self.events if e["event"] == "stepping" and e["epoch"] > above}
            for epoch in sorted(epochs):
                found = {e["uid"]: e for e in self.events if e["event"] == "stepping" and e["epoch"] == epoch}
                if set(found) == uids and all(set(e["members"]) == uids for e in found.values()):
                    return found
            known = {id(e) for e in self.events}
            self.wait(lambda e: id(e) not in known, max(0.1, deadline - time.monotonic()))  # noqa: B023

    def start(self, rank: int, uid: str, *, is_joiner: bool = False, **options: Any) -> RankProcess:
        process = RankProcess(rank, uid, free_port(), free_port())
        self.ranks[uid] = process
        self._program.order(op="start", run=str(self.folder), **process.member(), is_joiner=is_joiner, **options)
        started = self.wait(lambda e: e["event"] == "started" and e["uid"] == uid)
        process.pid, process.guard_pid = started["pid"], started["guard_pid"]
        self.wait(lambda e: e["event"] == "up" and e["uid"] == uid)
        return process

    def form(self, count: int, **options: Any) -> list[RankProcess]:
        """That many ranks, in epoch 1 and stepping."""
        ranks = [self.start(rank, f"p{rank}", **options) for rank in range(count)]
        self.tell("form", {"epoch": 1, "members": [r.member() for r in ranks], "map_digest": "map-1"})
        self.settled({r.uid for r in ranks})
        return ranks

    def tell(self, name: str, content: Any) -> None:
        """An order to all ranks: a file that appears whole."""
        part = self.folder / f".{name}.part"
        part.write_text(json.dumps(content))
        part.rename(self.folder / f"{name}.json")

    def close(self) -> None:
        """Ends every process of this run that is left."""
        self._program.order(op="end", run=str(self.folder))
        self.wait(lambda e: e["event"] == "end")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# ---------------------------------------------------------------- the program


def say(event: str, /, run: str = "", **values: Any) -> None:
    run = run or os.environ.get("LAB_RUN", "")
    os.write(1, json.dumps({"event": event, "run": run, "at": time.time(), **values}).encode() + b"\n")


def program() -> None:
    import torch  # noqa: F401  # what forked processes need is imported here, and no thread is started

    import moe_runtime.host.guard_face
    import moe_runtime.membership.group
    import moe_runtime.membership.keeper  # noqa: F401

    children: dict[str, list[int]] = {}
    say("ready")
    for line in sys.stdin:
        order = json.loads(line)
        run = order["run"]
        if order["op"] == "end":
            for child in children.pop(run, []):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            say("end", run)
            continue
        guard_pid = fork(guard_main, order)
        pid = fork(rank_main, order)
        children.setdefault(run, []).extend((guard_pid, pid))
        say("started", run, uid=order["pod_uid"], pid=pid, guard_pid=guard_pid)


def fork(main: Callable[[dict[str, Any], Path], None], order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ["LAB_RUN"] = order["run"]
    try:
        signal.alarm(120)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        main(order, Path(order["run"]))
    except BaseException as error:
        say("crashed", uid=order["pod_uid"], error=f"{type(error).__name__}: {error}")
        raise
    finally:
        os._exit(0)


def guard_main(order: dict[str, Any], folder: Path) -> None:
    from moe_runtime.host.guard import Guard
    from moe_runtime.host.guard_face import GuardFace

    port = int(order["guard_address"].rpartition(":")[2])
    guard = Guard(pod_uid=order["pod_uid"], socket_path=folder / f"{order['pod_uid']}.sock", silence_s=SILENCE_S)
    face = GuardFace(guard, token=TOKEN, port=port, faults_enabled=True)
    guard.ended.wait()
    say("ended", uid=order["pod_uid"], reason=guard.reason)
    # Peers may still ask whether it is reaped.
    time.sleep(FAREWELL_S)
    face.close()
    guard.close()


def rank_main(order: dict[str, Any], folder: Path) -> None:
    from moe_runtime.errors import Fenced
    from moe_runtime.host.heartbeat import Heartbeat
    from moe_runtime.membership.deadlines import Deadlines
    from moe_runtime.membership.keeper import MembershipKeeper

    uid = order["pod_uid"]
    heartbeat = None
    while heartbeat is None:
        with contextlib.suppress(OSError):
            heartbeat = Heartbeat(folder / f"{uid}.sock", pod_uid=uid)
        time.sleep(0.01)
    keeper = MembershipKeeper(
        rank=order["rank"],
        pod_uid=uid,
        token=TOKEN,
        port=int(order["address"].rpartition(":")[2]),
        guard_address=order["guard_address"],
        deadlines=Deadlines(step_ms=STEP_MS, probe_ms=400, agree_ms=2000),
    )
    heartbeat.settle()
    say("up", uid=uid)
    try:
        Stepper(keeper, order, folder).run()
    except Fenced as error:
        say("fenced", uid=uid, why=str(error))
    heartbeat.close()
    keeper.close()


class Stepper:
    """The step loop in small: exchange, all-to-all, changes at a boundary, recovery."""

    def __init__(self, keeper: Any, order: dict[str, Any], folder: Path) -> None:
        self.keeper = keeper
        self.order = order
        self.folder = folder
        self.uid = order["pod_uid"]
        self.steps = 0

    def run(self) -> None:
        from moe_runtime.errors import GroupFault, MinorityStop
        from moe_runtime.membership.group import EpochGroup

        threading.Thread(target=self.hear_vouching, daemon=True).start()
        membership = self.enter()
        split: dict[str, float] = {}
        while membership is not None and self.uid in membership.pod_uids:
            group = None
            try:
                started = time.monotonic()
                group = EpochGroup.build(membership, rank=self.order["rank"], token=TOKEN, timeout_ms=STEP_MS)
                split["rebuild_ms"] = (time.monotonic() - started) * 1000
                membership = self.step_until_change(group, membership, split)
                continue
            except GroupFault as fault:
                split = {"detected_at": time.time()}
                say("fault", uid=self.uid, epoch=membership.epoch, why=str(fault)[:200])
            finally:
                if group is not None:
                    group.destroy()
            if self.order.get("dies_in_recovery"):
                os.kill(os.getpid(), signal.SIGKILL)
            started = time.monotonic()
            if self.order.get("gives_up") == membership.epoch:
                self.keeper.rejoin()
                membership = self.keeper.join(timeout_ms=20_000)
                continue
            while True:
                try:
                    membership = self.keeper.recover()
                    break
                except MinorityStop as stop:
                    say("minority", uid=self.uid, why=str(stop))
            split["agree_ms"] = (time.monotonic() - started) * 1000
        say("left", uid=self.uid, epoch=membership.epoch if membership else 0)

    def enter(self) -> Any:
        from moe_core.contract.membership import Membership
        from moe_runtime.errors import MinorityStop

        if self.order["is_joiner"]:
            joined = self.keeper.join(timeout_ms=30_000)
            if self.order.get("dies_on_entry"):
                os.kill(os.getpid(), signal.SIGKILL)
            return joined
        while not (self.folder / "form.json").exists():
            time.sleep(0.01)
        while True:
            try:
                return self.keeper.form(Membership.parse((self.folder / "form.json").read_text()))
            except MinorityStop as stop:
                say("unformed", uid=self.uid, why=str(stop))

    def step_until_change(self, group: Any, membership: Any, split: dict[str, float]) -> Any:
        """Steps in this epoch until a planned change; the next membership. Raises GroupFault."""
        from moe_core.contract.membership import Membership
        from moe_runtime.errors import GroupFault

        file = self.folder / f"change-{membership.epoch + 1}.json"
        is_told = False
        while True:
            self.keeper.check()
            wants = int(file.exists())
            rows = group.all_gather_ints([wants, self.steps])
            self.exchange_tokens(group)
            self.steps += 1
            if not is_told:
                say(
                    "stepping",
                    uid=self.uid,
                    epoch=membership.epoch,
                    members=list(membership.pod_uids),
                    map=membership.map_digest,
                    parts={**split, **footprint()},
                )
                is_told = True
            if all(row[0] for row in rows):
                if self.order.get("dies_in_change"):
                    os.kill(os.getpid(), signal.SIGKILL)
                return self.keeper.change(Membership.parse(file.read_text()))
            if membership.epoch in (self.order.get("gives_up"), *range(self.order.get("rebuilds", 0) + 1)):
                raise GroupFault("on purpose: everybody rebuilds")
            time.sleep(0.002)

    def exchange_tokens(self, group: Any) -> None:
        import torch

        sends = [position + 1 for position in range(group.size)]
        receives = [group.position + 1] * group.size
        rows = torch.full((sum(sends), 3), float(group.position))
        received = group.all_to_all(rows, sends, receives)
        wanted = torch.arange(group.size, dtype=torch.float32).repeat_interleave(group.position + 1)
        assert torch.equal(received[:, 0], wanted), f"wrong rows: {received[:, 0].tolist()}"

    def hear_vouching(self) -> None:
        file = self.folder / "vouch.json"
        while not file.exists():
            time.sleep(0.02)
        self.keeper.vouch(json.loads(file.read_text()))


def footprint() -> dict[str, int]:
    return {kind: len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd")}


if __name__ == "__main__":
    program()
