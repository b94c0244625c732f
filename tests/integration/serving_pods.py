"""Pods as processes for the serving tests: the real entry point, on loopback, in folders of the test's own.

No shell and no operator here: a test starts each pod, kills it as it likes, and `close` ends whatever is left.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import (
    DispatchConfig,
    ModelSource,
    RuntimeConfig,
    ServingConfig,
    TraceConfig,
    TrainingConfig,
)
from moe_runtime.host import processes
from tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS

T = TypeVar("T")
TOKEN = "a-token-for-tests-only-0123456789"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, look: Callable[[], T | None], *, within_s: float) -> T:
    """The first thing `look` gives that is neither None nor False; fails loudly after `within_s`."""
    deadline = time.monotonic() + within_s
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.05)


def is_over(pid: int) -> bool:
    """Whether a process has closed its files, which its last thread does: its memory goes earlier, its entry later."""
    try:
        threads = [task.name for task in Path(f"/proc/{pid}/task").iterdir()]
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return threads == [str(pid)] and state in "ZX"


def spread_map(num_ranks: int, *, copies: int = 2, generation: int = 1) -> ExpertMap:
    """Every expert `copies` times, on neighbouring ranks."""
    share = NUM_EXPERTS // num_ranks
    row: list[int] = []
    for rank in range(num_ranks):
        for copy in range(copies):
            first = (rank + copy) % num_ranks * share
            row += range(first, first + share)
    return ExpertMap(
        generation=generation,
        num_logical_experts=NUM_EXPERTS,
        slots_of_rank=(share * copies,) * num_ranks,
        logical_of_slot=(tuple(row),) * NUM_LAYERS,
    )


@dataclass(slots=True)
class Pod:
    name: str
    process: "subprocess.Popen[bytes]"
    folder: Path
    pod_uid: str

    @property
    def log(self) -> str:
        return (self.folder / "pod.log").read_text(errors="replace")

    def below(self) -> list[int]:
        return list(processes.descendants(self.process.pid))

    @property
    def rank_pid(self) -> int:
        """The rank's own process, from the line its creator writes."""
        return int(self.log.split("runs as pid ")[1].split()[0])

    def kill_whole(self) -> None:
        """SIGKILL for the pod's first process and everything below it, at once."""
        for pid in [self.process.pid, *self.below()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


def in_force(generation: int, state: RuntimeState) -> bool:
    """Whether this wish is followed and every expert has a live copy."""
    return state.wish_generation == generation and state.coverage is not None and state.coverage.is_full


@dataclass(slots=True)
class Pods:
    """One object's pods. Use as a context manager."""

    folder: Path
    num_ranks: int = 2
    source: ModelSource | None = None
    training: TrainingConfig | None = None
    trace: TraceConfig | None = None
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    max_sequences: int = 8
    faults_enabled: bool = True
    shared_ray: bool = True
    """False: every pod has a Ray node of its own, as in a cluster."""
    pods: dict[str, Pod] = field(default_factory=dict)
    config: RuntimeConfig = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        assert self.source is not None
        self.config = RuntimeConfig(
            owner_kind="MoEJob" if self.training else "MoEService",
            namespace="default",
            name="tiny",
            uid=f"uid-{os.getpid()}-{time.time_ns()}",
            mode="train" if self.training else "serve",
            model=self.source,
            num_ranks=self.num_ranks,
            coordinator_host="127.0.0.1",
            coordinator_port=free_port(),
            ray_port=free_port(),
            faults_enabled=self.faults_enabled,
            training=self.training,
            trace=self.trace,
            dispatch=self.dispatch,
            serving=None
            if self.training
            else ServingConfig(
                max_sequences=self.max_sequences,
                max_context=1024,
                served_name="tiny",
                fallback="Drop",
                gateway_port=free_port(),
            ),
        )
        (self.folder / "config.json").write_text(self.config.canonical())
        (self.folder / "token").write_text(TOKEN)

    def __enter__(self) -> "Pods":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, role: str, name: str, *, rank: int | None = None, reattach: bool = False) -> Pod:
        """Start a pod, or start it again on the folder it had. `reattach`: a coordinator that replaces a lost one."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MOERATOR_", "RAY_"))}
        env |= {
            "MOERATOR_ROLE": role,
            "MOERATOR_POD_NAME": name,
            "MOERATOR_POD_UID": (pod_uid := f"{name}-{time.time_ns()}"),
            "MOERATOR_POD_IP": "127.0.0.1",
            "MOERATOR_CONFIG": str(self.folder / "config.json"),
            "MOERATOR_TOKEN_FILE": str(self.folder / "token"),
            "MOERATOR_STATE_DIR": str(folder),
            "MOERATOR_SHARED_RAY": "1" if self.shared_ray else "0",
            "PYTHONUNBUFFERED": "1",
        }
        if rank is not None:
            env["MOERATOR_RANK"] = str(rank)
        if reattach:
            env["MOERATOR_REATTACH"] = "1"
        with (folder / "pod.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "moe_runtime.pod"], env=env, stdout=log, stderr=subprocess.STDOUT
            )
        pod = Pod(name, process, folder, pod_uid)
        self.pods[name] = pod
        return pod

    def start_all(self, *, gateways: int = 1) -> None:
        self.start("coordinator", "coordinator")
        if self.shared_ray:
            self.start("node", "node")
        for rank in range(self.num_ranks):
            self.start("rank", f"rank-{rank}", rank=rank)
        for i in range(gateways):
            self.start("gateway", f"gateway-{i}")

    def close(self) -> None:
        """End everything, however the test went. Fails if something outlived its pod."""
        below = [pid for pod in self.pods.values() for pid in pod.below()]
        for pod in self.pods.values():
            with contextlib.suppress(ProcessLookupError):
                pod.process.send_signal(signal.SIGCONT)
                pod.process.terminate()
        for pod in self.pods.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                pod.process.wait(12)
            pod.kill_whole()
        deadline = time.monotonic() + 10
        while left := [pid for pid in below if _is_running(pid)]:
            if time.monotonic() > deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"outlived their pods: {[_command(pid) for pid in left]}")
            time.sleep(0.1)

    # -- the coordinator --

    def call(self, method: str, path: str, body: str | None = None, *, token: str = TOKEN) -> tuple[int, bytes]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.config.coordinator_port}{path}",
            data=body.encode() if body is not None else None,
            method=method,
            headers={"Authorization": f"Bearer {token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=15) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def put_wish(self, wish: RuntimeWish) -> None:
        def put() -> bool:
            try:
                return self.call("PUT", "/v1/wish", wish.canonical())[0] == 204
            except OSError:
                return False

        until("the coordinator takes the wish", put, within_s=30)

    def state(self) -> RuntimeState | None:
        try:
            status, body = self.call("GET", "/v1/state")
        except OSError:
            return None
        return RuntimeState.parse(body) if status == 200 else None

    def wait_state(self, what: str, look: Callable[[RuntimeState], bool], *, within_s: float) -> RuntimeState:
        def current() -> RuntimeState | None:
            state = self.state()
            return state if state is not None and look(state) else None

        try:
            return until(what, current, within_s=within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; state {self.state()}; {self.logs()}") from error

    def logs(self) -> str:
        return "\n".join(f"--- {pod.name}\n{pod.log[-1500:]}" for pod in self.pods.values())

    # -- the gateway --

    @property
    def base_url(self) -> str:
        assert self.config.serving is not None
        return f"http://127.0.0.1:{self.config.serving.gateway_port}"

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=3) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def complete(self, prompt: str, *, max_tokens: int = 32, timeout: float = 60, **more: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
        request = urllib.request.Request(
            f"{self.base_url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer: dict[str, Any] = json.loads(response.read())
            return answer

    def stream(self, prompt: str, *, max_tokens: int, timeout: float = 60, **more: Any) -> Iterator[dict[str, Any]]:
        """Chunks of a streamed completion."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True, **more}
        request = urllib.request.Request(
            f"{self.base_url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])


def _is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid} {Path(f'/proc/{pid}/cmdline').read_text().replace(chr(0), ' ')[:100]}"
    return str(pid)
