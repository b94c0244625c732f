"""Pods as processes: what a kubelet does for a bound pod, for one machine and without containers.

A pod's program runs below `local_init`, gets the environment and the volumes of its manifest, is probed as the manifest
says, is restarted in place where its restart policy asks for it (same uid, same folders), and ends with all it started.
"""

import asyncio
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_core.contract.runtime_config import ENV_POD_UID, ENV_RUN
from moe_operator.cluster import local_init
from moe_operator.cluster.local_container import CannotStart, ReadVolume, prepare
from moe_operator.cluster.local_ends import describe_exit, end_of, last_line, order_end, sweep
from moe_operator.cluster.local_pod import LocalPod
from moe_operator.cluster.local_probe import Probe, probe_of

OLD_LOGS = "logs"
"""Folder of the logs of pods that are gone, inside the run folder."""

FIRST_BACKOFF_S, LAST_BACKOFF_S, FORGIVEN_AFTER_S = 0.2, 10.0, 60.0
LIVENESS_GRACE_S = 1.0


class Kubelet:
    """Runs bound pods. `on_change` is told of every change, `on_gone` when a deleted pod has ended."""

    def __init__(
        self,
        program: Sequence[str],
        *,
        run_folder: Path,
        read_volume: ReadVolume,
        on_change: Callable[[LocalPod], None],
        on_gone: Callable[[LocalPod], None],
    ) -> None:
        self._program = tuple(program)
        self._run_folder = run_folder
        self._read_volume = read_volume
        self._on_change = on_change
        self._on_gone = on_gone
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        local_init.prctl(local_init.PR_SET_CHILD_SUBREAPER, 1)

    def start(self, pod: LocalPod) -> None:
        """Run a pod that was just bound."""
        if pod.uid not in self._tasks:
            task = asyncio.create_task(self._keep(pod), name=f"pod {pod.name}")
            task.add_done_callback(lambda _: self._gone(pod) if pod.deleting else None)
            self._tasks[pod.uid] = task

    def delete(self, pod: LocalPod, *, grace_s: float | None = None) -> None:
        """Begin to end a pod; `on_gone` follows. A second call can only shorten the grace."""
        pod.deleting = True
        process = self._processes.get(pod.uid)
        if process is not None:
            order_end(process, pod.grace_s if grace_s is None else grace_s)
        elif pod.uid in self._tasks:
            self._tasks[pod.uid].cancel()  # waiting to be restarted, or over already
        else:
            self._gone(pod)
            return
        self._on_change(pod)

    async def close(self) -> None:
        """Kill everything now."""
        tasks = list(self._tasks.values())
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        sweep(f"{ENV_RUN}={self._run_folder}")

    async def _keep(self, pod: LocalPod) -> None:
        backoff = FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            code = await self._run_once(pod)
            sweep(f"{ENV_POD_UID}={pod.uid}")  # its first process may have been killed, and then left something
            if pod.deleting:
                return
            pod.ready = False
            why = pod.trouble or (last_line(pod.folder / "log") if code else "")
            pod.message = describe_exit(code) + (f": {why}" if why else "")
            if pod.restarts_in_place == "Never" or (pod.restarts_in_place == "OnFailure" and code == 0):
                pod.phase = "Succeeded" if code == 0 else "Failed"
                self._on_change(pod)
                await asyncio.get_running_loop().create_future()  # nothing more happens until it is deleted
            pod.restarts += 1
            self._on_change(pod)
            if time.monotonic() - started > FORGIVEN_AFTER_S:
                backoff = FIRST_BACKOFF_S
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF_S)

    async def _run_once(self, pod: LocalPod) -> int:
        pod.trouble = ""
        try:
            process = await self._spawn(pod)
        except (CannotStart, OSError) as problem:
            pod.trouble = str(problem)
            return 128
        except (KeyError, TypeError, ValueError) as problem:  # a manifest that an API server would have refused
            pod.trouble = f"its manifest cannot be run: {problem!r}"
            return 128
        self._processes[pod.uid] = process
        pod.phase, pod.pid = "Running", process.pid
        if pod.deleting:
            order_end(process, 0)
        probing = asyncio.create_task(self._probe(pod, process), name=f"probe {pod.name}")
        self._on_change(pod)
        try:
            return await process.wait()
        finally:
            probing.cancel()
            if process.returncode is None and process.stdin is not None:
                process.stdin.close()  # ends the pod at once
                await end_of(process)
            del self._processes[pod.uid]
            pod.pid = None

    async def _spawn(self, pod: LocalPod) -> asyncio.subprocess.Process:
        argv, environment = prepare(pod, self._program, run_folder=self._run_folder, read_volume=self._read_volume)
        pod.folder.mkdir(parents=True, exist_ok=True)
        with (pod.folder / "log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", local_init.__file__),
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    async def _probe(self, pod: LocalPod, process: asyncio.subprocess.Process) -> None:
        readiness = probe_of(pod.manifest, "readinessProbe", port=pod.health_port)
        liveness = probe_of(pod.manifest, "livenessProbe", port=pod.health_port)
        if readiness is None:
            self._set_ready(pod, ready=True)
        async with asyncio.TaskGroup() as group:
            if readiness is not None:
                group.create_task(self._follow_readiness(pod, readiness))
            if liveness is not None:
                group.create_task(self._follow_liveness(pod, liveness, process))

    async def _follow_readiness(self, pod: LocalPod, probe: Probe) -> None:
        while True:
            self._set_ready(pod, ready=await probe.succeeds())
            await asyncio.sleep(probe.period_s if pod.ready else min(0.25, probe.period_s))

    async def _follow_liveness(self, pod: LocalPod, probe: Probe, process: asyncio.subprocess.Process) -> None:
        """Armed by the first success, as a startup probe would do."""
        while not await probe.succeeds():
            await asyncio.sleep(min(0.25, probe.period_s))
        failures = 0
        while failures < probe.failure_threshold:
            await asyncio.sleep(probe.period_s)
            failures = 0 if await probe.succeeds() else failures + 1
        pod.trouble = f"liveness probe failed {failures} times: {probe.url}"
        order_end(process, LIVENESS_GRACE_S)

    def _set_ready(self, pod: LocalPod, *, ready: bool) -> None:
        if pod.ready != ready:
            pod.ready = ready
            pod.message = "" if ready else pod.message
            self._on_change(pod)

    def _gone(self, pod: LocalPod) -> None:
        self._tasks.pop(pod.uid, None)
        if (pod.folder / "log").exists():  # what a pod said last is what a person looks for when it is gone
            (self._run_folder / OLD_LOGS).mkdir(exist_ok=True)
            (pod.folder / "log").replace(self._run_folder / OLD_LOGS / f"{pod.folder.name}.log")
        for folder in (pod.folder, pod.temp):
            shutil.rmtree(folder, ignore_errors=True)
        self._on_gone(pod)
