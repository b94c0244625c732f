"""One pod of the local shell: its manifest and what became of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_core.contract.names import LABEL_INCARNATION, LABEL_RANK, LABEL_ROLE, index_of_pod
from moe_core.facts import PodFact

DEFAULT_GRACE_S = 30.0


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
