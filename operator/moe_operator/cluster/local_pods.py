"""Pods as processes: what a kubelet does for a bound pod, for one machine and without containers.

A pod's program runs below `local_init`, gets the environment and the volumes of its manifest, is probed as the manifest
says, is restarted in place where its restart policy asks for it (same uid, same folders), and ends with all it started.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_core.contract.names import LABEL_INCARNATION, LABEL_RANK, LABEL_ROLE, OWN_ENV, index_of_pod
from moe_core.contract.runtime_config import ENV_HEALTH_PORT, ENV_RUN, ENV_STATE_DIR
from moe_core.facts import PodFact
from moe_core.outcome import MoeratorError
from moe_operator.cluster import local_init
from moe_operator.cluster.local_probe import Probe, probe_of

OLD_LOGS = "logs"
"""Folder of the logs of pods that are gone, inside the run folder."""

FIRST_BACKOFF_S, LAST_BACKOFF_S, FORGIVEN_AFTER_S = 0.2, 10.0, 60.0
DEFAULT_GRACE_S = 30.0
LIVENESS_GRACE_S = 1.0
END_WITHIN_S = 5.0
"""For a pod's first process to take everything with it; it needs milliseconds, unless it is stopped itself."""

ReadVolume = Callable[["LocalPod", str, str], Mapping[str, str] | None]
"""(pod, kind, name) -> the files of a ConfigMap or a Secret, None when there is no such object."""


class CannotStart(MoeratorError):
    """The manifest asks for something that one machine without containers does not have."""


@dataclass(slots=True)
class LocalPod:
    """One pod: its manifest and what became of it."""

    manifest: dict[str, Any]
    folder: Path
    temp: Path
    """What the pod sees as /tmp; a short path, because Ray puts sockets below it (AF_UNIX: 107 bytes)."""
    created_at: float
    gated: bool
    node: str | None = None
    phase: Literal["Pending", "Running", "Succeeded", "Failed"] = "Pending"
    ready: bool = False
    deleting: bool = False
    message: str = ""
    """How it last ended, until it is ready again."""
    trouble: str = ""
    """What is known of the present end besides its code."""
    restarts: int = 0
    pid: int | None = None
    health_port: int | None = None
    extra_env: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.manifest["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.manifest["metadata"]["uid"])

    @property
    def role(self) -> str:
        return str(self.manifest["metadata"]["labels"][LABEL_ROLE])

    @property
    def restarts_in_place(self) -> str:
        return str(self.manifest["spec"].get("restartPolicy", "Always"))

    @property
    def grace_s(self) -> float:
        return float(self.manifest["spec"].get("terminationGracePeriodSeconds", DEFAULT_GRACE_S))

    def fact(self) -> PodFact:
        labels = self.manifest["metadata"]["labels"]
        return PodFact(
            name=self.name,
            uid=self.uid,
            role=self.role,
            index=int(labels[LABEL_RANK]) if LABEL_RANK in labels else index_of_pod(self.name),
            incarnation=int(labels.get(LABEL_INCARNATION, 0)),
            phase=self.phase,
            ready=self.ready,
            gated=self.gated,
            node=self.node,
            deleting=self.deleting,
            created_at=self.created_at,
            message=self.message,
        )


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
        self.sweep()

    def sweep(self) -> None:
        """Kill and reap processes of this run that their pods' first processes left behind (they were killed)."""
        known = {process.pid for process in self._processes.values() if process.returncode is None}
        sweep(self._run_folder, spare=known)

    async def _keep(self, pod: LocalPod) -> None:
        backoff = FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            code = await self._run_once(pod)
            self.sweep()
            if pod.deleting:
                return
            pod.ready = False
            why = pod.trouble or (_last_line(pod.folder / "log") if code else "")
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
                await _end_of(process)
            del self._processes[pod.uid]
            pod.pid = None

    async def _spawn(self, pod: LocalPod) -> asyncio.subprocess.Process:
        argv, environment = self._prepare(pod)
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

    def _prepare(self, pod: LocalPod) -> tuple[list[str], dict[str, str]]:
        spec = pod.manifest["spec"]
        container = spec["containers"][0]
        pod.temp.mkdir(parents=True, exist_ok=True)
        paths: dict[str, Path] = {volume["name"]: self._volume(pod, volume) for volume in spec.get("volumes", ())}
        mounts: dict[str, Path] = {}
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in paths:
                raise CannotStart(f"volumeMount {mount['name']!r} names no volume")
            mounts[mount["mountPath"].rstrip("/")] = paths[mount["name"]] / mount.get("subPath", "")
        mounts["/tmp"] = pod.temp
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN_ENV)}
        environment |= {"PYTHONUNBUFFERED": "1", "TMPDIR": str(pod.temp), ENV_RUN: str(self._run_folder)}
        for entry in container.get("env", ()):
            value = _field(pod, entry) if "valueFrom" in entry else entry.get("value", "")
            value = re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), value)
            environment[entry["name"]] = _local_path(value, mounts)
        environment |= pod.extra_env
        environment.setdefault(ENV_STATE_DIR, str(pod.folder))
        if pod.health_port is not None:
            environment[ENV_HEALTH_PORT] = str(pod.health_port)
        return [*self._program, *container.get("args", ())], environment

    def _volume(self, pod: LocalPod, volume: Mapping[str, Any]) -> Path:
        folder: Path = pod.folder / volume["name"]
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        if "emptyDir" in volume:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        for kind, source, name in (("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName")):
            if source in volume:
                files = self._read_volume(pod, kind, volume[source][name])
                if files is None:
                    raise CannotStart(f"volume {volume['name']!r}: there is no {kind}/{volume[source][name]}")
                items = {item["key"]: item["path"] for item in volume[source].get("items", ())}
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                for key, text in files.items():
                    if not items or key in items:
                        _write_private(folder / items.get(key, key), text)
                return folder
        kinds = sorted(set(volume) - {"name"})
        raise CannotStart(
            f"volume {volume['name']!r} is {kinds}: one machine has configMap, secret, emptyDir, hostPath"
        )


def order_end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Ask the pod's program to end; `local_init` kills what is left after `grace_s`, and is killed if it does not."""
    if process.stdin is not None and not process.stdin.is_closing():
        process.stdin.write(f"terminate {grace_s:g}\n".encode())
    asyncio.get_running_loop().call_later(grace_s + END_WITHIN_S, _kill, process)


async def _end_of(process: asyncio.subprocess.Process) -> None:
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


def sweep(run_folder: Path, *, spare: set[int]) -> None:
    """SIGKILL processes below this one that carry the mark of `run_folder`, but `spare` and what is below those."""
    mark = f"{ENV_RUN}={run_folder}".encode()
    kept = set(spare)
    for pid in spare:
        kept.update(local_init.descendants(pid))
    for pid in local_init.descendants(os.getpid()):
        if pid in kept:
            continue
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _last_line(log: Path) -> str:
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


def _field(pod: LocalPod, entry: Mapping[str, Any]) -> str:
    fields = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "metadata.uid": pod.uid,
        "status.podIP": "127.0.0.1",
        "spec.nodeName": pod.node or "",
    }
    path = entry["valueFrom"].get("fieldRef", {}).get("fieldPath", "")
    if path not in fields:
        raise CannotStart(f"env {entry['name']!r}: {json.dumps(entry['valueFrom'])} is not known on one machine")
    return fields[path]


def _local_path(value: str, mounts: Mapping[str, Path]) -> str:
    """A path inside the container as the path it stands for here; the deepest mount wins."""
    for mount_path in sorted(mounts, key=len, reverse=True):
        if value == mount_path or value.startswith(mount_path + "/"):
            return str(mounts[mount_path]) + value[len(mount_path) :]
    return value


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
