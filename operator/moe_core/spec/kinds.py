"""The five kinds: what the API server calls them, what their columns show, which model holds their spec."""

from dataclasses import dataclass
from typing import Literal

from moe_core.spec.base import SpecModel
from moe_core.spec.job import MoEJobSpec
from moe_core.spec.others import ClusterTopologySpec, ExpertMapSpec, MoEDrillSpec
from moe_core.spec.service import MoEServiceSpec

MAX_NAME = 40
"""Pods are named after their owner; their names must stay valid host names."""
NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""Services are named after their owner, and a Service's name is a DNS label that begins with a letter."""


@dataclass(frozen=True, slots=True)
class Column:
    """A printer column; `wide` ones show only under `-o wide`."""

    name: str
    path: str
    type: Literal["string", "integer", "date"] = "string"
    wide: bool = False


def _condition(name: str, type_: str) -> Column:
    return Column(name, f'.status.conditions[?(@.type=="{type_}")].status')


def _reason(type_: str) -> Column:
    return Column("Reason", f'.status.conditions[?(@.type=="{type_}")].message', wide=True)


AGE = Column("Age", ".metadata.creationTimestamp", "date")


@dataclass(frozen=True, slots=True)
class ResourceKind:
    kind: str
    plural: str
    short_name: str
    model: type[SpecModel]
    columns: tuple[Column, ...]
    namespaced: bool = True
    max_name: int = 63
    scale_path: str | None = None
    """Field of the spec that `kubectl scale` sets."""

    @property
    def singular(self) -> str:
        return self.kind.lower()


KINDS: tuple[ResourceKind, ...] = (
    ResourceKind(
        "MoEJob",
        "moejobs",
        "moej",
        MoEJobSpec,
        (
            Column("Ranks", ".status.ranks.desired", "integer"),
            Column("Active", ".status.ranks.active", "integer"),
            Column("Step", ".status.training.step", "integer"),
            _condition("Complete", "Complete"),
            AGE,
            Column("Restarts", ".status.restarts", "integer", wide=True),
            Column("Epoch", ".status.epoch", "integer", wide=True),
            _reason("Ready"),
        ),
        max_name=MAX_NAME,
    ),
    ResourceKind(
        "MoEService",
        "moeservices",
        "moesvc",
        MoEServiceSpec,
        (
            Column("Ranks", ".status.ranks.desired", "integer"),
            Column("Active", ".status.ranks.active", "integer"),
            _condition("Ready", "Ready"),
            _condition("Coverage", "ExpertCoverage"),
            AGE,
            Column("Restarts", ".status.restarts", "integer", wide=True),
            Column("Epoch", ".status.epoch", "integer", wide=True),
            _reason("Ready"),
        ),
        max_name=MAX_NAME,
        scale_path=".spec.parallelism.expert",
    ),
    ResourceKind(
        "ExpertMap",
        "expertmaps",
        "emap",
        ExpertMapSpec,
        (
            Column("Generation", ".spec.generation", "integer"),
            Column("Digest", ".spec.digest"),
            Column("Applied", ".status.appliedDigest"),
            Column("Coverage%", ".status.coveragePercent", "integer"),
            AGE,
            Column("Experts", ".spec.numLogicalExperts", "integer", wide=True),
            Column("Epoch", ".status.epoch", "integer", wide=True),
            Column("Balance%", ".status.balancednessPercent", "integer", wide=True),
            Column("Policy", ".spec.policy", wide=True),
        ),
    ),
    ResourceKind(
        "ClusterTopology",
        "clustertopologies",
        "ctopo",
        ClusterTopologySpec,
        (Column("Levels", ".spec.levels[*].name"), AGE),
        namespaced=False,
    ),
    ResourceKind(
        "MoEDrill",
        "moedrills",
        "drill",
        MoEDrillSpec,
        (
            Column("Target", ".spec.target.name"),
            Column("Fault", ".spec.fault.type"),
            Column("Verdict", ".status.verdict"),
            AGE,
            Column("Detected", ".status.detectedSeconds", wide=True),
            Column("Restored", ".status.restoredSeconds", wide=True),
        ),
    ),
)

KIND_OF_NAME = {kind.kind: kind for kind in KINDS}
