"""ClusterTopology, MoEDrill and the ExpertMap object."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moe_core.contract.expert_map import MAX_SHARE
from moe_core.spec.base import Rule, SpecModel
from moe_core.spec.common import DnsLabel


class TopologyLevel(SpecModel):
    name: DnsLabel = Field(description="Name that topologyConstraint.pack uses, such as rack.")
    node_label: str = Field(min_length=1, max_length=317, description="Node label whose value names the domain.")


class ClusterTopologySpec(SpecModel):
    """The levels of a cluster's network, broad to narrow, as node labels."""

    levels: tuple[TopologyLevel, ...] = Field(min_length=1, max_length=16, description="Broad to narrow.")

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.levels.all(a, self.levels.exists_one(b, b.name == a.name))",
            "levels must have distinct names",
            lambda spec: len({level.name for level in spec.levels}) == len(spec.levels),
        ),
        Rule(
            "self.levels.all(a, self.levels.exists_one(b, b.nodeLabel == a.nodeLabel))",
            "levels must have distinct node labels",
            lambda spec: len({level.node_label for level in spec.levels}) == len(spec.levels),
        ),
    )


class DrillTarget(SpecModel):
    """Whose rank is injured; it must allow drills."""

    kind: Literal["MoEJob", "MoEService"] = Field(description="What kind of object the rank belongs to.")
    name: DnsLabel = Field(description="Its name, in the drill's namespace.")
    rank: int = Field(ge=0, le=1023, description="The rank that is injured.")


class DrillFault(SpecModel):
    """How it is injured."""

    type: Literal["KillRank", "HangRank"] = Field(description="KillRank: SIGKILL. HangRank: SIGSTOP.")


class DrillSlo(SpecModel):
    """What the recovery is held against."""

    max_requests_failed: int = Field(default=0, ge=0, description="Requests that may fail while it lasts.")
    restored_within_seconds: int = Field(
        default=120, ge=1, le=86400, description="Until the rank's replacement is active."
    )


class MoEDrillSpec(SpecModel):
    """One failure drill: injure one rank and hold the recovery against a bound."""

    target: DrillTarget
    fault: DrillFault
    slo: DrillSlo = DrillSlo()

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("self == oldSelf", "a drill cannot be changed; create another MoEDrill", keeps=lambda spec: spec),
    )


class MapLayer(SpecModel):
    logical_of_slot: tuple[int, ...] = Field(
        max_length=16384, description="Logical expert in each global slot of this layer; -1 is empty."
    )
    share_of_slot: tuple[Annotated[int, Field(ge=0, le=MAX_SHARE)], ...] | None = Field(
        default=None,
        max_length=16384,
        description="Copies of one expert divide its tokens in proportion to these; evenly where they are left out.",
    )


class ExpertMapSpec(SpecModel):
    """The assignment in force, logical experts to slots; written by the operator only."""

    generation: int = Field(ge=0, description="Grows with every map of the group.")
    digest: str = Field(max_length=128, description="Of the whole map, all its slices.")
    num_logical_experts: int = Field(ge=1, description="Routed experts of a layer.")
    slots_of_rank: tuple[int, ...] = Field(max_length=1024, description="Expert slots of each rank, per layer.")
    first_layer: int = Field(default=0, ge=0, description="Large maps are sliced by layer; this slice starts here.")
    layers: tuple[MapLayer, ...] = Field(max_length=512, description="MoE layers in order.")
    policy: str = Field(default="", max_length=63, description="What made the map.")
