"""ClusterTopology, MoEDrill and the ExpertMap object."""

from typing import ClassVar, Literal

from pydantic import Field

from moe_core.spec.base import SpecModel
from moe_core.spec.common import DnsLabel


class TopologyLevel(SpecModel):
    name: DnsLabel = Field(description="Name that topologyConstraint.pack uses, such as rack.")
    node_label: str = Field(min_length=1, max_length=317, description="Node label whose value names the domain.")


class ClusterTopologySpec(SpecModel):
    levels: tuple[TopologyLevel, ...] = Field(min_length=1, max_length=16, description="Broad to narrow.")


class DrillTarget(SpecModel):
    kind: Literal["MoEJob", "MoEService"]
    name: DnsLabel
    rank: int = Field(ge=0, le=1023, description="The rank that is injured.")


class DrillFault(SpecModel):
    type: Literal["KillRank", "HangRank"] = Field(description="KillRank: SIGKILL. HangRank: SIGSTOP.")


class DrillSlo(SpecModel):
    max_requests_failed: int = Field(default=0, ge=0)
    restored_within_seconds: int = Field(default=120, ge=1, le=86400)


class MoEDrillSpec(SpecModel):
    target: DrillTarget
    fault: DrillFault
    slo: DrillSlo = DrillSlo()

    cel_rules: ClassVar[tuple[tuple[str, str], ...]] = (
        ("self == oldSelf", "a drill cannot be changed; create another MoEDrill"),
    )


class MapLayer(SpecModel):
    logical_of_slot: tuple[int, ...] = Field(
        description="Logical expert in each global slot of this layer; -1 is empty."
    )


class ExpertMapSpec(SpecModel):
    """Written by the operator only."""

    generation: int = Field(ge=0)
    digest: str
    num_logical_experts: int = Field(ge=1)
    slots_of_rank: tuple[int, ...]
    first_layer: int = Field(default=0, ge=0, description="Large maps are sliced by layer; this slice starts here.")
    layers: tuple[MapLayer, ...] = Field(max_length=512)
    policy: str = ""
    predicted_balancedness_percent: int | None = Field(default=None, ge=0, le=100)
