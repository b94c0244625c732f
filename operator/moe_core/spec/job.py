"""MoEJob: train a Mixture-of-Experts model and write a checkpoint."""

from typing import ClassVar, Literal

from pydantic import Field

from moe_core.contract.names import MANAGER
from moe_core.spec.base import Rule, SpecModel, unchangeable
from moe_core.spec.common import (
    TRACE_IS_WRITABLE,
    WHOLE_NODES,
    Decimal,
    FailurePolicy,
    ModelShapeSpec,
    Parallelism,
    PodTemplate,
    RoutingTrace,
    TopologyConstraint,
)
from moe_core.spec.dispatch import ONLY_PROBE_CHANGES, Dispatch
from moe_core.spec.router import RouterSpec


class JobModel(SpecModel):
    """The model that is trained."""

    shape: ModelShapeSpec = Field(description="Build the model from this shape.")
    router: RouterSpec | None = Field(default=None, description="How tokens are routed; by default as the family does.")


class TrainingData(SpecModel):
    """Exactly one source of text."""

    source: Literal["PythonStdlib"] | None = Field(
        default=None, description="Source text of Python's own standard library."
    )
    path: str | None = Field(
        default=None, min_length=1, max_length=1024, description="Folder of text files inside the pod."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.source) != has(self.path)",
            "exactly one of source and path must be given",
            lambda data: (data.source is None) != (data.path is None),
        ),
    )


class Training(SpecModel):
    """What is learned from, for how long and how."""

    data: TrainingData
    sequence_length: int = Field(default=128, ge=8, le=1048576, description="Tokens of one sequence.")
    sequences_per_rank: int = Field(default=8, ge=1, le=65536, description="Sequences that each rank reads in a step.")
    max_steps: int | None = Field(default=None, ge=1, le=100000000, description="Optimizer steps.")
    max_seconds: int | None = Field(
        default=None,
        ge=1,
        le=31536000,
        description="Training time; the learning rate follows whichever bound is nearer.",
    )
    optimizer: Literal["AdamW", "Muon"] = Field(
        default="AdamW",
        description="Muon orthogonalises the updates of weight matrices; embeddings, norms and routers stay on AdamW.",
    )
    learning_rate: Decimal = Field(
        default="3e-3",
        description="The highest: it rises over warmupSteps, and falls to 0 over the last 70 % of the run.",
    )
    warmup_steps: int = Field(
        default=20, ge=0, le=1000000, description="Steps over which the learning rate rises in a straight line."
    )
    weight_decay: Decimal = Field(
        default="0.1",
        description="Times the learning rate, the part that weights lose in a step; norms and biases lose none.",
    )
    aux_loss_coefficient: Decimal | None = Field(
        default=None,
        description="Of the load-balancing loss where the model's family routes; 0.01 by default. model.router has "
        "losses of its own.",
    )
    max_expert_gradient_norm: Decimal | None = Field(
        default=None,
        description="The gradient of each expert of a layer is scaled down to this norm. Without it only the norm of "
        "all gradients together is bounded.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2147483647,
        description="Of what weights and routers begin with, of routers' noise, and of the order of the text.",
    )
    matmul_precision: Literal["Highest", "Medium"] = Field(
        default="Highest",
        description="Medium lets the hardware multiply float32 matrices through bfloat16 where it can.",
    )
    snapshot_every_steps: int = Field(
        default=50, ge=1, le=1000000, description="A lost rank costs at most this many steps."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.maxSteps) || has(self.maxSeconds)",
            "give maxSteps, maxSeconds or both",
            lambda training: training.max_steps is not None or training.max_seconds is not None,
        ),
        Rule(
            "!has(self.maxExpertGradientNorm) || double(self.maxExpertGradientNorm) > 0.0",
            "maxExpertGradientNorm must be > 0",
            lambda training: training.max_expert_gradient_norm is None or float(training.max_expert_gradient_norm) > 0,
        ),
    )


class JobOutput(SpecModel):
    """Where the result goes."""

    path: str = Field(min_length=1, max_length=1024, description="Folder the safetensors checkpoint is written to.")


class MoEJobSpec(SpecModel):
    """Train a Mixture-of-Experts model with expert parallelism and write a checkpoint."""

    suspend: bool = Field(default=False, description="True removes the pods and keeps the object.")
    managed_by: str | None = Field(
        default=None,
        max_length=63,
        description=f"Another value than {MANAGER} leaves the object to that controller.",
    )
    model: JobModel
    training: Training
    output: JobOutput
    parallelism: Parallelism
    dispatch: Dispatch = Dispatch()
    topology_constraint: TopologyConstraint | None = None
    failure_policy: FailurePolicy = FailurePolicy()
    active_deadline_seconds: int | None = Field(
        default=None, ge=1, description="Seconds after which an unfinished job fails; by default it may take for ever."
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None, ge=0, description="Seconds after which a finished job is deleted; by default it stays."
    )
    drills: Literal["Allowed", "Forbidden"] = Field(
        default="Forbidden", description="Whether a MoEDrill may injure this object."
    )
    trace: RoutingTrace | None = Field(
        default=None, description="Record the routing of every rank; nothing is recorded without it."
    )
    template: PodTemplate = PodTemplate()

    rules: ClassVar[tuple[Rule, ...]] = (
        TRACE_IS_WRITABLE,
        WHOLE_NODES,
        ONLY_PROBE_CHANGES,
        Rule(
            "!has(self.model.router) || !has(self.training.auxLossCoefficient)",
            "training.auxLossCoefficient means nothing with model.router; give model.router.auxLossCoeff",
            lambda spec: spec.model.router is None or spec.training.aux_loss_coefficient is None,
        ),
        *(
            unchangeable(field, lever="create another MoEJob")
            for field in (
                "model",
                "training",
                "output",
                "parallelism",
                "topologyConstraint",
                "drills",
                "trace",
                "template",
            )
        ),
    )
