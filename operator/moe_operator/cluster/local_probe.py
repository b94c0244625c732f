"""Readiness and liveness probes of local pods, read from the manifest as a kubelet reads them."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Probe:
    """GET `path` on the loopback port, or only a connection when `path` is None.

    `any_status`: every answer is a success, because only a process that lives can give one.
    """

    port: int
    path: str | None
    period_s: float
    timeout_s: float
    failure_threshold: int
    any_status: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}" if self.path else f"tcp://127.0.0.1:{self.port}"

    async def succeeds(self) -> bool:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._ask()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return False

    async def _ask(self) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            if self.path is None:
                return True
            writer.write(f"GET {self.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            status = (await reader.readline()).split()
            if len(status) < 2 or not status[1].isdigit():
                return False
            return self.any_status or 200 <= int(status[1]) < 400
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def probe_of(manifest: Mapping[str, Any], field: str, *, port: int | None) -> Probe | None:
    """The probe `field` of the pod's container, None when it has none. `port` replaces the manifest's.

    A container that can be asked whether it is ready, but names no liveness probe, must at least answer that question:
    on one machine nobody else would notice a stopped process.
    """
    container = manifest["spec"]["containers"][0]
    ports = {entry.get("name", ""): int(entry["containerPort"]) for entry in container.get("ports", ())}
    given = container.get(field) or (container.get("readinessProbe") if field == "livenessProbe" else None)
    action = given and (given.get("httpGet") or given.get("tcpSocket"))
    if not given or not action:
        return None  # exec and grpc probes: our manifests have none
    named = action["port"]
    return Probe(
        port=port or (ports[named] if named in ports else int(named)),
        path=action.get("path", "/") if "httpGet" in given else None,
        period_s=float(given.get("periodSeconds", 10)),
        timeout_s=float(given.get("timeoutSeconds", 1)),
        failure_threshold=int(given.get("failureThreshold", 3)),
        any_status=field not in container,
    )
