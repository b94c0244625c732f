"""What the operator is told when it starts: environment variables only, so that a chart can set every one of them.

MOERATOR_NAMESPACES            comma-separated; empty serves the whole cluster
MOERATOR_OPERATOR_NAMESPACE    where the Lease lies; a pod's own namespace by default
MOERATOR_LEASE_NAME            one Lease, one acting operator
MOERATOR_LEADER_ELECTION       off for a single process on a developer's machine
MOERATOR_LEASE_DURATION_S      a Lease unchanged for that long may be taken over
MOERATOR_REQUEST_TIMEOUT_S     of one request to the API server
MOERATOR_WATCH_TIMEOUT_S       a watch is asked for anew after that long
MOERATOR_RESYNC_S              how often everything is compared with a list, as a safety net
MOERATOR_HTTP_BIND             host:port of /healthz, /readyz and /metrics
MOERATOR_COORDINATOR_URL       template with {service}, {namespace} and {port}
MOERATOR_RUNTIME_IMAGE         image of pods whose template names none
MOERATOR_NETWORK_POLICY        on: NetworkPolicies close each group's pods; the operator must be a pod of its namespace
MOERATOR_METRICS_NAMESPACES    comma-separated; whose pods may scrape coordinators then
MOERATOR_LOG_LEVEL, MOERATOR_LOG_FORMAT   DEBUG..ERROR, text or json
"""

import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from moe_operator.errors import BadSettings

_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def new_identity() -> str:
    """Names one process, not one pod: a restarted container must not take itself for the holder before it."""
    return f"{socket.gethostname()}_{secrets.token_hex(4)}"


def _own_namespace() -> str:
    return _POD_NAMESPACE.read_text().strip() if _POD_NAMESPACE.exists() else "default"


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """Times in seconds. elector.py says how the lease, its renewal and the request time-out hang together."""

    namespaces: tuple[str, ...] = ()
    identity: str = field(default_factory=new_identity)
    leader_election: bool = True
    lease_namespace: str = "default"
    lease_name: str = "moerator-operator"
    lease_duration_s: float = 15.0
    request_timeout_s: float = 5.0
    watch_timeout_s: int = 60
    resync_s: float = 300.0
    http_host: str = "0.0.0.0"
    http_port: int = 8080
    coordinator_url: str = "http://{service}.{namespace}.svc:{port}"
    runtime_image: str = "moerator-runtime:latest"
    network_policy: bool = False
    metrics_namespaces: tuple[str, ...] = ()
    log_level: str = "INFO"
    log_format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        if self.renew_deadline_s <= self.retry_s:
            raise BadSettings(
                f"MOERATOR_LEASE_DURATION_S={self.lease_duration_s:g} leaves no time to renew: "
                f"it must exceed the request time-out ({self.request_timeout_s:g}) by more than a fifth of itself"
            )

    @property
    def renew_deadline_s(self) -> float:
        """How long after its last renewal a leader may still send a change."""
        return self.lease_duration_s - self.request_timeout_s

    @property
    def retry_s(self) -> float:
        """Pause between two looks at the Lease."""
        return self.lease_duration_s / 7.5

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Raises BadSettings naming the variable and its value."""
        env = _Environment(os.environ if environ is None else environ)
        default = cls(identity="default")
        host, port = env.host_port("HTTP_BIND", default.http_host, default.http_port)
        return cls(
            namespaces=env.names("NAMESPACES"),
            leader_election=env.switch("LEADER_ELECTION", default.leader_election),
            lease_namespace=env.text("OPERATOR_NAMESPACE", _own_namespace()),
            lease_name=env.text("LEASE_NAME", default.lease_name),
            lease_duration_s=env.seconds("LEASE_DURATION_S", default.lease_duration_s),
            request_timeout_s=env.seconds("REQUEST_TIMEOUT_S", default.request_timeout_s),
            watch_timeout_s=max(1, round(env.seconds("WATCH_TIMEOUT_S", default.watch_timeout_s))),
            resync_s=env.seconds("RESYNC_S", default.resync_s),
            http_host=host,
            http_port=port,
            coordinator_url=env.text("COORDINATOR_URL", default.coordinator_url),
            runtime_image=env.text("RUNTIME_IMAGE", default.runtime_image),
            network_policy=env.switch("NETWORK_POLICY", default.network_policy),
            metrics_namespaces=env.names("METRICS_NAMESPACES"),
            log_level=env.choice("LOG_LEVEL", default.log_level, ("DEBUG", "INFO", "WARNING", "ERROR")),
            log_format="json" if env.choice("LOG_FORMAT", "text", ("text", "json")) == "json" else "text",
        )


class _Environment:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, name: str, default: str) -> str:
        return self._environ.get(f"MOERATOR_{name}") or default

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.text(name, "").split(",") if part.strip())

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise BadSettings(f"MOERATOR_{name} must be one of {', '.join(allowed)} (got {value!r})")
        return value

    def switch(self, name: str, default: bool) -> bool:
        return self.choice(name, "on" if default else "off", ("on", "off")) == "on"

    def seconds(self, name: str, default: float) -> float:
        text = self.text(name, f"{default:g}")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if value <= 0:
            raise BadSettings(f"MOERATOR_{name} must be a positive number of seconds (got {text!r})")
        return value

    def host_port(self, name: str, host: str, port: int) -> tuple[str, int]:
        text = self.text(name, f"{host}:{port}")
        given_host, _, given_port = text.rpartition(":")
        if not given_port.isdigit() or int(given_port) > 65535:
            raise BadSettings(f"MOERATOR_{name} must be host:port (got {text!r})")
        return given_host, int(given_port)
