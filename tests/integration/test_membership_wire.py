"""The wire and the guard between real processes: deadlines hold, tokens count, and who is fenced is gone."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_runtime.host.guard import Guard
from moe_runtime.host.guard_face import GuardFace
from moe_runtime.membership.wire import BrokenCall, Json, LineServer, RefusedCall, SilentCall, ask, ask_many

pytestmark = [pytest.mark.integration, pytest.mark.timeout(30)]
TOKEN = "wire-token"
RANK = """
import sys, time
from pathlib import Path
from moe_runtime.host.heartbeat import Heartbeat
heart = Heartbeat(Path(sys.argv[1]), pod_uid="p0")
if "loading" not in sys.argv:
    heart.settle()
    time.sleep(0.6)
print("beating", flush=True)
time.sleep(60)
"""


@pytest.fixture
def server() -> Iterator[LineServer]:
    made = LineServer(lambda request: {"said": request["say"]}, token=TOKEN)
    yield made
    made.close()


@pytest.fixture
def frozen_address() -> Iterator[str]:
    """An address whose kernel takes connections and whose process never answers, as behind a stopped rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    made = Guard(pod_uid="p0", socket_path=tmp_path / "g.sock", silence_s=1.0, loading_silence_s=2.5)
    yield made
    made.close()


@pytest.fixture
def face(guard: Guard) -> Iterator[GuardFace]:
    made = GuardFace(guard, token=TOKEN, faults_enabled=True)
    yield made
    made.close()


@pytest.fixture
def rank(guard: Guard) -> Iterator[subprocess.Popen[str]]:
    with started(guard) as process:
        yield process


@contextlib.contextmanager
def started(guard: Guard, *words: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", RANK, str(guard.socket_path), *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "beating\n"
        until(lambda: guard.state != "absent")
        yield process
        process.kill()


def until(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


def tell(face: GuardFace, **request: str) -> Json:
    return ask(face.address, {"to": "p0", **request}, token=TOKEN, timeout_ms=6000)


def test_a_question_is_answered(server: LineServer) -> None:
    assert ask(server.address, {"say": "ä"}, token=TOKEN, timeout_ms=1000) == {"said": "ä"}


def test_a_wrong_token_is_refused(server: LineServer) -> None:
    with pytest.raises(BrokenCall, match="unauthorized"):
        ask(server.address, {"say": "x"}, token="guess", timeout_ms=1000)


def test_a_frozen_peer_costs_the_deadline_and_the_living_answer_beside_it(
    server: LineServer, frozen_address: str
) -> None:
    started = time.monotonic()
    calls = {name: (address, {"say": "x"}) for name, address in (("frozen", frozen_address), ("well", server.address))}
    results = ask_many(calls, token=TOKEN, timeout_ms=300)
    assert 0.28 < time.monotonic() - started < 0.6
    assert isinstance(results["frozen"], SilentCall)
    assert results["well"] == {"said": "x"}


def test_an_address_without_a_process_is_refused_at_once() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(RefusedCall):
        ask(address, {}, token=TOKEN, timeout_ms=5000)
    assert time.monotonic() - started < 1.0


def test_garbage_does_not_stop_the_server(server: LineServer) -> None:
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=2) as sock:
        sock.sendall(b"\xff\x00 not json\n")
        assert b"error" in sock.recv(1000)
    assert ask(server.address, {"say": "still"}, token=TOKEN, timeout_ms=1000) == {"said": "still"}


def test_a_fence_answers_reaped_once_the_process_is_gone(
    guard: Guard, face: GuardFace, rank: "subprocess.Popen[str]"
) -> None:
    assert tell(face, op="fence", reason="a test")["state"] == "reaped"
    assert rank.wait(timeout=1) == -signal.SIGKILL
    assert guard.ended.is_set()


def test_a_stopped_rank_is_fenced_for_its_silence(guard: Guard, rank: "subprocess.Popen[str]") -> None:
    guard.inject("hang")
    assert guard.ended.wait(5)
    assert "silent for" in guard.reason
    assert rank.wait(timeout=1) == -signal.SIGKILL


def test_a_rank_that_still_loads_may_be_silent_for_longer_but_not_for_good(guard: Guard) -> None:
    with started(guard, "loading") as loading:
        guard.inject("hang")
        assert not guard.ended.wait(1.7)
        assert guard.ended.wait(5)
        assert "while it was loading" in guard.reason
        assert loading.wait(timeout=1) == -signal.SIGKILL


def test_time_in_which_the_guard_did_not_run_either_is_no_silence(guard: Guard, rank: "subprocess.Popen[str]") -> None:
    rank.send_signal(signal.SIGSTOP)
    with guard._lock:  # holds the watching thread, as a machine that stands still would
        time.sleep(1.5)
    rank.send_signal(signal.SIGCONT)
    assert not guard.ended.wait(0.5)
    assert guard.state == "alive"


def test_a_beating_rank_is_left_alone(guard: Guard, face: GuardFace, rank: "subprocess.Popen[str]") -> None:
    assert not guard.ended.wait(1.6)
    assert tell(face, op="status")["pid"] == rank.pid


def test_a_rank_ends_itself_when_its_guard_is_gone(guard: Guard, rank: "subprocess.Popen[str]") -> None:
    guard.close()
    assert rank.wait(timeout=5) == 70


def test_a_rank_that_comes_after_its_fence_is_ended_at_once(guard: Guard) -> None:
    assert guard.fence("too late") == "absent"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    late = subprocess.Popen([sys.executable, "-c", RANK, str(guard.socket_path)], env=environment)
    assert late.wait(timeout=10) == -signal.SIGKILL


def test_faults_are_forbidden_unless_enabled(guard: Guard) -> None:
    face = GuardFace(guard, token=TOKEN)
    try:
        with pytest.raises(BrokenCall, match="forbidden"):
            tell(face, op="fault", fault="kill")
    finally:
        face.close()


def test_a_guard_answers_only_for_its_own_pod(face: GuardFace) -> None:
    with pytest.raises(BrokenCall, match="this guards p0"):
        ask(face.address, {"op": "fence", "to": "p1"}, token=TOKEN, timeout_ms=1000)


def test_guards_import_neither_torch_nor_ray() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys, moe_runtime.gateway.pod, moe_runtime.rank.pod; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
