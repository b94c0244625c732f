"""The operator as a user runs it."""

from __future__ import annotations

import contextlib
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.controlplane.process import Process, free_port
from cluster.controlplane.start import ControlPlane

REPOSITORY = Path(__file__).resolve().parents[2]
MOERATOR = Path(sys.executable).with_name("moerator")


class Operator:
    """One operator process, limited to some namespaces, with its health face on loopback."""

    def __init__(
        self,
        cluster: ControlPlane,
        namespaces: Sequence[str],
        *,
        kubeconfig: Path | None = None,
        name: str = "operator",
        command: Sequence[str | Path] = (MOERATOR, "operator"),
        **environment: str,
    ) -> None:
        self.port = free_port()
        values = {
            "PYTHONPATH": REPOSITORY / "operator",
            "KUBECONFIG": kubeconfig or cluster.kubeconfig,
            "MOERATOR_NAMESPACES": ",".join(namespaces),
            "MOERATOR_OPERATOR_NAMESPACE": namespaces[0] if namespaces else "default",
            "MOERATOR_HTTP_BIND": f"127.0.0.1:{self.port}",
            **environment,
        }
        settings = [f"{key}={value}" for key, value in values.items()]
        log = cluster.directory / f"{name}-{self.port}.log"
        self.process = Process(name, ["/usr/bin/env", *settings, *command], log)

    def start(self, *, timeout_s: float = 40.0) -> Operator:
        self.process.start()
        self.process.wait_ready(lambda: self.get("/readyz")[0] == 200, timeout_s=timeout_s)
        return self

    def get(self, path: str) -> tuple[int, str]:
        """Status and text; (0, why) when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()
        except OSError as error:
            return 0, str(error)

    @property
    def is_leader(self) -> bool:
        return "moerator_leader 1.0" in self.get("/metrics")[1]

    def log(self) -> str:
        return self.process.log.read_text()


@contextlib.contextmanager
def operator(cluster: ControlPlane, *namespaces: str, **options: Any) -> Iterator[Operator]:
    """A ready operator for as long as the block lasts; on a failure the end of its log is shown."""
    running = Operator(cluster, namespaces, **options)
    try:
        yield running.start()
    except BaseException:
        print(running.process.log_tail(40))  # pytest shows it with the failure
        raise
    finally:
        running.process.kill()
