"""What a pod is told when it starts: rendered from a spec by the brain, read once by the pod's entry point.

The file is mounted from a ConfigMap (or lies in the local shell's run folder); the token comes from a Secret beside it.
What differs per pod comes from the environment (`PodEnv`), which a kubelet fills by the downward API.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from moe_core.contract.base import WireModel
from moe_core.contract.dispatch import Hierarchy, Overlap, Wire
from moe_core.contract.packing import Packing
from moe_core.contract.router import LocalityConfig, RouterConfig

# Environment of every pod's entry point (`moe-pod`), the same in a container and in the local shell.
ENV_ROLE = "MOERATOR_ROLE"  # coordinator | rank | gateway
ENV_RANK = "MOERATOR_RANK"  # rank id, for role=rank
ENV_POD_NAME = "MOERATOR_POD_NAME"
ENV_POD_UID = "MOERATOR_POD_UID"
ENV_POD_IP = "MOERATOR_POD_IP"  # 127.0.0.1 in the local shell
ENV_NODE_NAME = "MOERATOR_NODE_NAME"  # for role=rank: copies on the same node are preferred
ENV_CONFIG = "MOERATOR_CONFIG"  # path of the RuntimeConfig JSON
ENV_TOKEN_FILE = "MOERATOR_TOKEN_FILE"  # path of the bearer token of the control faces; Ray's token is derived from it
ENV_REATTACH = "MOERATOR_REATTACH"  # role=coordinator: "1" when it replaces one and pods of the group may live
ENV_STATE_DIR = "MOERATOR_STATE_DIR"  # scratch that outlives a container restart (Ray's embedded store)
# Local shell only:
ENV_RUN = "MOERATOR_RUN"  # the run folder, on every process of a run: for what pods share, and to sweep by
ENV_HEALTH_PORT = "MOERATOR_HEALTH_PORT"  # role=gateway: /healthz of its own, where several share the service's port
ENV_SHARED_RAY = "MOERATOR_SHARED_RAY"  # local shell: "1" when pods of ranks share one Ray node that already runs


class ModelShape(WireModel):
    """A model built from a config, not downloaded. Names are transformers' config attributes."""

    family: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    vocab_size: int
    max_position_embeddings: int


class ModelSource(WireModel):
    """Exactly one of a checkpoint folder and a shape."""

    path: str | None = None
    shape: ModelShape | None = None
    router_class: str | None = None
    """`module:Class` that a checkpoint's router may be of; a class is never imported on a file's word alone."""
    packing: Packing | None = None
    """How ranks keep their experts; None: as the checkpoint has them, which is float32 unless they are packed there."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.path is None) == (self.shape is None):
            raise ValueError("exactly one of path and shape must be given")
        return self


class TrainingConfig(WireModel):
    data: str
    """`stdlib` (source text of Python's own standard library) or a folder of text files."""
    sequence_length: int
    sequences_per_rank: int
    max_steps: int | None
    max_seconds: int | None
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    aux_loss_coefficient: float
    seed: int
    snapshot_every_steps: int
    output_path: str
    optimizer: Literal["AdamW", "Muon"] = "AdamW"
    matmul_precision: Literal["Highest", "Medium"] = "Highest"
    max_expert_gradient_norm: float | None = None
    """Of each logical expert of a layer; None: only the norm of all gradients together is bounded."""


class ServingConfig(WireModel):
    max_sequences: int
    """Sequences one rank decodes side by side."""
    max_context: int
    """Tokens of prompt plus completion that a sequence may hold."""
    served_name: str
    fallback: Literal["Generalist", "Drop", "Refuse"]
    gateway_port: int
    """Port of the OpenAI face; in the local shell gateways share it (SO_REUSEPORT)."""
    locality: LocalityConfig | None = None
    """Prefer near experts; None: route as the model was trained."""


class DispatchConfig(WireModel):
    """How tokens travel to their experts and back."""

    wire: Wire = "Float32"
    combine_wire: Wire = "Float32"
    hierarchy: Hierarchy = "Auto"
    overlap: Overlap = "OneBatch"
    group_ranks: int = Field(default=0, ge=0)
    """Rank r is in EP group r // group_ranks, and tokens stay in theirs; 0: all ranks are one."""


class TraceConfig(WireModel):
    """Every rank writes which experts its tokens chose into a file of its own (moe_core.contract.trace)."""

    folder: str
    every_steps: int = Field(ge=1)
    max_bytes: int = Field(ge=1)
    """Of one file; recording stops before it would be larger."""


class RuntimeConfig(WireModel):
    owner_kind: Literal["MoEJob", "MoEService"]
    namespace: str
    name: str
    uid: str
    mode: Literal["train", "serve"]
    model: ModelSource
    router: RouterConfig | None = None
    """Of a model that is trained; a checkpoint brings its own. None: the family's."""
    num_ranks: int = Field(ge=1)
    coordinator_host: str
    """Name or address of the coordinator's Service; 127.0.0.1 in the local shell."""
    coordinator_port: int
    ray_port: int
    faults_enabled: bool = False
    """Whether the fault face (drills) answers at all."""
    device: Literal["cpu", "cuda"] = "cpu"
    training: TrainingConfig | None = None
    serving: ServingConfig | None = None
    trace: TraceConfig | None = None
    dispatch: DispatchConfig = DispatchConfig()

    @model_validator(mode="after")
    def _mode_matches(self) -> Self:
        if (self.training is not None) != (self.mode == "train") or (self.serving is not None) != (
            self.mode == "serve"
        ):
            raise ValueError(f"mode {self.mode!r} needs its own section and no other")
        return self
