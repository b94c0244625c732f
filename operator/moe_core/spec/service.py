"""MoEService: serve a checkpoint behind the OpenAI API."""

from typing import ClassVar, Literal

from pydantic import Field

from moe_core.contract.names import MANAGER
from moe_core.contract.router import CLASS_PATH
from moe_core.spec.base import Rule, SpecModel, unchangeable
from moe_core.spec.common import (
    GROUPS_STAY,
    TRACE_IS_WRITABLE,
    WHOLE_NODES,
    Decimal,
    FailurePolicy,
    Parallelism,
    PodTemplate,
    RoutingTrace,
    TopologyConstraint,
)
from moe_core.spec.dispatch import ONLY_PROBE_CHANGES, Dispatch
from moe_core.spec.packing import ExpertPacking


class ServiceModel(SpecModel):
    """The checkpoint that is served."""

    path: str = Field(min_length=1, max_length=1024, description="Folder of a safetensors checkpoint inside the pod.")
    served_name: str | None = Field(
        default=None, min_length=1, max_length=253, description="Name in the OpenAI API; the object's name by default."
    )
    router_class_path: str | None = Field(
        default=None,
        pattern=CLASS_PATH,
        max_length=256,
        description="`module:Class` of the router that the checkpoint was trained with, where that was a class of your "
        "own: no class is imported because a file names it.",
    )
    expert_packing: ExpertPacking | None = Field(
        default=None,
        description="Pack experts while the checkpoint is loaded. Without it they are kept as the checkpoint has them: "
        "packed (`moerator convert quantise`), or else in Float32.",
    )
    num_experts: int | None = Field(
        default=None,
        ge=2,
        le=4096,
        description="Logical experts per layer, where the operator cannot read the checkpoint.",
    )
    num_moe_layers: int | None = Field(
        default=None, ge=1, le=512, description="MoE layers, where the operator cannot read the checkpoint."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.numExperts) == has(self.numMoeLayers)",
            "give numExperts and numMoeLayers together, or neither",
            lambda model: (model.num_experts is None) == (model.num_moe_layers is None),
        ),
    )


class Rebalance(SpecModel):
    """When a new expert map is worth its moves (policy Balanced)."""

    window_seconds: int = Field(
        default=60, ge=5, le=86400, description="Tokens are counted over so long; then the map is looked at again."
    )
    horizon_seconds: int = Field(
        default=600, ge=5, le=604800, description="How long a counted load is believed to last: moves must pay in it."
    )
    max_moved_percent: int = Field(
        default=10, ge=0, le=100, description="Slots, in percent of all, whose expert one new map may send for."
    )


class Locality(SpecModel):
    """Prefer experts that are near a token's rank. Answers then depend a little on where a request is served, and one
    that is replayed on another rank may go on otherwise. For checkpoints whose routing is a top-k; others are refused.
    """

    bias: Decimal = Field(
        default="1", description="How much score an expert loses per unit of distance (1: another node), at most."
    )
    budget_percent: int = Field(
        default=5,
        ge=0,
        le=100,
        description="Part of its chosen experts' probability that a token may give up for nearer ones.",
    )
    by: Literal["Pick", "Domain"] = Field(
        default="Pick",
        description="What counts: Pick, the distance of each of a token's experts; Domain, each domain that a token "
        "crosses to, once for all its experts there, as dispatch by node does (bias is then per domain).",
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "double(self.bias) > 0.0 && double(self.bias) <= 1000000.0",
            "bias must be > 0 and <= 1e+06",
            lambda locality: 0 < float(locality.bias) <= 1e6,
        ),
    )


class Experts(SpecModel):
    """Copies of experts, where they lie and what answers for lost ones."""

    redundant_per_rank: int = Field(
        default=0, ge=0, le=4096, description="Slots per rank and layer beyond an even share."
    )
    min_copies: int = Field(default=1, ge=1, le=64, description="Live copies every logical expert must have by plan.")
    policy: Literal["Balanced", "Linear"] = Field(
        default="Balanced",
        description="How experts are assigned to slots: Balanced follows the counted load, with few moves; "
        "Linear is in order over the ranks, whatever the load.",
    )
    rebalance: Rebalance = Rebalance()
    fallback: Literal["Generalist", "Drop", "Refuse"] = Field(
        default="Generalist",
        description="What answers for an expert without a live copy; Refuse fails the request instead.",
    )
    locality: Locality | None = Field(
        default=None, description="Without it tokens are routed as the model was trained."
    )


class Serving(SpecModel):
    """What one rank takes on."""

    max_sequences: int = Field(default=8, ge=1, le=4096, description="Sequences one rank decodes side by side.")
    max_context: int = Field(
        default=512, ge=16, le=16777216, description="Tokens of prompt and completion of one sequence."
    )


class Gateway(SpecModel):
    """The pods that clients speak to."""

    replicas: int = Field(default=2, ge=1, le=64, description="Gateway pods.")
    port: int = Field(default=8000, ge=1, le=65535, description="Where they and their Service answer.")


class Spares(SpecModel):
    """Room that is left for the replacement of ranks."""

    per_domain: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Places for one rank each that must be left, when ranks are placed, in every domain that takes "
        "one: domains of the narrowest level that topologyConstraint names, without one the cluster. A lost rank finds "
        "room there, beside the others. Nothing holds these places against other pods.",
    )


class MoEServiceSpec(SpecModel):
    """Serve a Mixture-of-Experts checkpoint over ranks, behind the OpenAI API."""

    suspend: bool = Field(default=False, description="True removes the pods and keeps the object.")
    managed_by: str | None = Field(
        default=None,
        max_length=63,
        description=f"Another value than {MANAGER} leaves the object to that controller.",
    )
    model: ServiceModel
    parallelism: Parallelism
    experts: Experts = Experts()
    serving: Serving = Serving()
    gateway: Gateway = Gateway()
    dispatch: Dispatch = Dispatch()
    topology_constraint: TopologyConstraint | None = None
    spares: Spares = Spares()
    failure_policy: FailurePolicy = FailurePolicy()
    drills: Literal["Allowed", "Forbidden"] = Field(
        default="Forbidden", description="Whether a MoEDrill may injure this object."
    )
    trace: RoutingTrace | None = Field(
        default=None, description="Record the routing of every rank; nothing is recorded without it."
    )
    template: PodTemplate = PodTemplate()

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.experts.minCopies <= self.parallelism.expert * self.parallelism.data",
            "experts.minCopies must not exceed parallelism.expert (times data): copies live on distinct ranks",
            lambda spec: spec.experts.min_copies <= spec.parallelism.ranks,
        ),
        WHOLE_NODES,
        ONLY_PROBE_CHANGES,
        GROUPS_STAY,
        *(
            unchangeable(field, lever="create another MoEService")
            for field in ("model", "serving", "topologyConstraint", "drills", "trace", "template")
        ),
        TRACE_IS_WRITABLE,
        Rule(
            "self.experts.fallback == oldSelf.experts.fallback",
            "experts.fallback cannot be changed",
            keeps=lambda spec: spec.experts.fallback,
        ),
        Rule(
            "has(self.experts.locality) == has(oldSelf.experts.locality) && "
            "(!has(self.experts.locality) || self.experts.locality == oldSelf.experts.locality)",
            "experts.locality cannot be changed; create another MoEService",
            keeps=lambda spec: spec.experts.locality,
        ),
        Rule(
            "self.gateway.port == oldSelf.gateway.port",
            "gateway.port cannot be changed",
            keeps=lambda spec: spec.gateway.port,
        ),
    )
