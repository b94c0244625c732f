"""What a pod's manifest asks for, had without a container: its volumes as folders, its environment with paths of this
machine, its command line.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_core.contract.names import OWN_ENV
from moe_core.contract.runtime_config import ENV_HEALTH_PORT, ENV_POD_UID, ENV_RUN, ENV_STATE_DIR
from moe_core.outcome import MoeratorError
from moe_operator.cluster.local_pod import LocalPod

ReadVolume = Callable[[LocalPod, str, str], Mapping[str, str] | None]
"""(pod, kind, name) -> the files of a ConfigMap or a Secret, None when there is no such object."""


class CannotStart(MoeratorError):
    """The manifest asks for something that one machine without containers does not have."""


def prepare(
    pod: LocalPod, program: Sequence[str], *, run_folder: Path, read_volume: ReadVolume
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a pod, its volumes written. Raises CannotStart, OSError, and KeyError, TypeError
    or ValueError for a manifest that an API server would have refused."""
    spec = pod.manifest["spec"]
    container = spec["containers"][0]
    pod.temp.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {volume["name"]: _volume(pod, volume, read_volume) for volume in spec.get("volumes", ())}
    mounts: dict[str, Path] = {}
    for mount in container.get("volumeMounts", ()):
        if mount["name"] not in paths:
            raise CannotStart(f"volumeMount {mount['name']!r} names no volume")
        mounts[mount["mountPath"].rstrip("/")] = paths[mount["name"]] / mount.get("subPath", "")
    mounts["/tmp"] = pod.temp
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN_ENV)}
    environment |= {"PYTHONUNBUFFERED": "1", "TMPDIR": str(pod.temp)}
    environment |= {ENV_RUN: str(run_folder), ENV_POD_UID: pod.uid}
    for entry in container.get("env", ()):
        value = _field(pod, entry) if "valueFrom" in entry else entry.get("value", "")
        value = re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), value)
        environment[entry["name"]] = _local_path(value, mounts)
    environment |= pod.extra_env
    environment.setdefault(ENV_STATE_DIR, str(pod.folder))
    if pod.health_port is not None:
        environment[ENV_HEALTH_PORT] = str(pod.health_port)
    return [*program, *container.get("args", ())], environment


def _volume(pod: LocalPod, volume: Mapping[str, Any], read_volume: ReadVolume) -> Path:
    folder: Path = pod.folder / volume["name"]
    if "hostPath" in volume:
        return Path(volume["hostPath"]["path"])
    if "emptyDir" in volume:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for kind, source, name in (("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName")):
        if source in volume:
            files = read_volume(pod, kind, volume[source][name])
            if files is None:
                raise CannotStart(f"volume {volume['name']!r}: there is no {kind}/{volume[source][name]}")
            items = {item["key"]: item["path"] for item in volume[source].get("items", ())}
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for key, text in files.items():
                if not items or key in items:
                    _write_private(folder / items.get(key, key), text)
            return folder
    kinds = sorted(set(volume) - {"name"})
    raise CannotStart(f"volume {volume['name']!r} is {kinds}: one machine has configMap, secret, emptyDir, hostPath")


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
