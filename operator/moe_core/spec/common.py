"""Parts that MoEJob and MoEService share."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from moe_core.contract.names import OWN_ENV, OWN_MOUNTS, OWN_VOLUMES
from moe_core.spec.base import Rule, SpecModel

DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[
    str,
    Field(
        pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$",
        max_length=32,
        json_schema_extra={"x-kubernetes-int-or-string": True},
    ),
    BeforeValidator(lambda given: str(given) if isinstance(given, int) and not isinstance(given, bool) else given),
]
"""A Kubernetes quantity; a bare whole number is taken as well, as everywhere in Kubernetes."""
LabelValue = Annotated[str, Field(pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$", max_length=63)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Decimal = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$", max_length=32)]


Source = dict[str, Any]
SOURCES = (
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "fc", "hostPath", "image", "iscsi", "nfs"),
    *("persistentVolumeClaim", "projected", "secret"),
)
"""What a volume may come from, by wire name; those that Kubernetes has given up are left out."""


MOST_RANKS = 1024


class Parallelism(SpecModel):
    """Degrees of parallelism. Dense layers are data-parallel over all ranks."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"self.expert * self.data <= {MOST_RANKS}",
            f"expert times data must not exceed {MOST_RANKS} ranks",
            lambda parallelism: parallelism.ranks <= MOST_RANKS,
        ),
    )

    expert: int = Field(
        ge=1, le=MOST_RANKS, description="EP degree: the number of ranks that share one full set of experts."
    )
    data: int = Field(
        default=1,
        ge=1,
        le=64,
        description="EP groups side by side, each of `expert` neighbouring ranks with all experts. A token leaves its "
        "group only for an expert without a live copy there.",
    )

    @property
    def ranks(self) -> int:
        return self.expert * self.data

    @property
    def group_ranks(self) -> int:
        """Of each of several EP groups; 0 where all ranks are one."""
        return self.expert if self.data > 1 else 0


class Pack(SpecModel):
    """Levels, by name, that the gang must or should lie inside, and how many of its ranks share a node."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.required) || has(self.preferred) || has(self.ranksPerNode)",
            "give at least one of required, preferred, ranksPerNode",
            lambda pack: pack != Pack(),
        ),
    )

    required: str | None = Field(
        default=None, min_length=1, max_length=63, description="All ranks inside one domain of this level."
    )
    preferred: str | None = Field(
        default=None, min_length=1, max_length=63, description="As few domains of this level as possible."
    )
    ranks_per_node: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Exactly so many ranks on each node of a new gang. Ranks that come later join nodes with fewer, "
        "rather than move one that lives.",
    )


class TopologyConstraint(SpecModel):
    """Where in the cluster's network the gang lies."""

    topology_name: DnsLabel = Field(description="Name of the ClusterTopology whose levels are meant.")
    pack: Pack = Field(description="How close together.")


WHOLE_NODES = Rule(
    "!has(self.topologyConstraint) || !has(self.topologyConstraint.pack.ranksPerNode) || "
    "self.parallelism.expert * self.parallelism.data % self.topologyConstraint.pack.ranksPerNode == 0",
    "parallelism.expert must be a multiple of topologyConstraint.pack.ranksPerNode, or expert times data",
    lambda spec: (
        spec.topology_constraint is None
        or spec.parallelism.ranks % (spec.topology_constraint.pack.ranks_per_node or 1) == 0
    ),
)
"""Of the spec of a job and of a service."""


GROUPS_STAY = Rule(
    "(self.parallelism.data == 1) == (oldSelf.parallelism.data == 1) && "
    "(self.parallelism.data == 1 || self.parallelism.expert == oldSelf.parallelism.expert)",
    "parallelism.expert of several EP groups cannot be changed, nor parallelism.data to or from 1; "
    "create another MoEService",
    keeps=lambda spec: spec.parallelism.group_ranks,
)
"""Of the spec of a service: with groups of another size every rank would be in another group."""


class FailurePolicy(SpecModel):
    """When failures end the object."""

    max_restarts: int = Field(
        default=100, ge=0, le=10000, description="Rank pods that may be replaced before the object fails."
    )


class EnvVar(SpecModel):
    name: str = Field(min_length=1, max_length=253)
    value: str = Field(default="", max_length=32768)


class VolumeMount(SpecModel):
    name: DnsLabel
    mount_path: str = Field(min_length=1, max_length=1024)
    read_only: bool = False
    sub_path: str | None = Field(default=None, max_length=1024)


class Volume(SpecModel):
    """A Kubernetes volume; its source is given to the pod as it is written here."""

    name: DnsLabel
    config_map: Source | None = None
    csi: Source | None = None
    downward_api: Source | None = Field(default=None, alias="downwardAPI")
    empty_dir: Source | None = None
    ephemeral: Source | None = None
    fc: Source | None = None
    host_path: Source | None = None
    image: Source | None = None
    iscsi: Source | None = None
    nfs: Source | None = None
    persistent_volume_claim: Source | None = None
    projected: Source | None = None
    secret: Source | None = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"[{', '.join(f'has(self.{source})' for source in SOURCES)}].filter(given, given).size() == 1",
            f"a volume has exactly one of {', '.join(SOURCES)}",
            lambda volume: sum(value is not None for name, value in volume if name != "name") == 1,
        ),
    )


class Resources(SpecModel):
    requests: dict[str, Quantity] = Field(
        default_factory=dict, max_length=64, description="Per rank; GPUs as an extended resource."
    )
    limits: dict[str, Quantity] = Field(default_factory=dict, max_length=64)


class Toleration(SpecModel):
    key: str | None = Field(default=None, max_length=317)
    operator: str | None = Field(default=None, pattern="^(Exists|Equal)$")
    value: LabelValue | None = None
    effect: str | None = Field(default=None, pattern="^(NoSchedule|PreferNoSchedule|NoExecute)$")
    toleration_seconds: int | None = Field(default=None, ge=0)


class ObjectMeta(SpecModel):
    labels: dict[str, LabelValue] = Field(default_factory=dict, max_length=64)
    annotations: dict[str, Annotated[str, Field(max_length=32768)]] = Field(default_factory=dict, max_length=64)


class PodSpec(SpecModel):
    """The part of a pod that is the user's; scheduling gates, names, ports and probes are moerator's."""

    image: str = Field(
        default="", max_length=1024, description="Image of the runtime; empty takes the operator's default."
    )
    image_pull_policy: str | None = Field(default=None, pattern="^(Always|IfNotPresent|Never)$")
    image_pull_secrets: tuple[DnsLabel, ...] = Field(default=(), max_length=64)
    resources: Resources = Resources()
    env: tuple[EnvVar, ...] = Field(default=(), max_length=64)
    volume_mounts: tuple[VolumeMount, ...] = Field(default=(), max_length=64)
    volumes: tuple[Volume, ...] = Field(default=(), max_length=64, description="Kubernetes volumes, as in a pod.")
    node_selector: dict[str, LabelValue] = Field(default_factory=dict, max_length=64)
    tolerations: tuple[Toleration, ...] = Field(default=(), max_length=64)
    priority_class_name: ObjectName | None = None
    runtime_class_name: ObjectName | None = None

    rules: ClassVar[tuple[Rule, ...]] = (  # has(): the API server checks the default {} before its own defaults
        Rule(
            f"!has(self.env) || self.env.all(a, !a.name.startsWith('{OWN_ENV}') && "
            "self.env.exists_one(b, b.name == a.name))",
            f"env must have distinct names, none of which starts with {OWN_ENV}",
            lambda pod: _distinct([e.name for e in pod.env], not_starting=OWN_ENV),
        ),
        Rule(
            f"!has(self.volumes) || self.volumes.all(a, !a.name.startsWith('{OWN_VOLUMES}') && "
            "self.volumes.exists_one(b, b.name == a.name))",
            f"volumes must have distinct names, none of which starts with {OWN_VOLUMES}",
            lambda pod: _distinct([v.name for v in pod.volumes], not_starting=OWN_VOLUMES),
        ),
        Rule(
            "!has(self.volumeMounts) || self.volumeMounts.all(m, has(self.volumes) && "
            "self.volumes.exists(v, v.name == m.name))",
            "volumeMounts must name volumes of this template",
            lambda pod: {mount.name for mount in pod.volume_mounts} <= {volume.name for volume in pod.volumes},
        ),
        Rule(
            "!has(self.volumeMounts) || self.volumeMounts.all(a, "
            f"!(a.mountPath in [{', '.join(map(repr, OWN_MOUNTS))}]) && "
            "self.volumeMounts.exists_one(b, b.mountPath == a.mountPath))",
            f"volumeMounts must have distinct paths, other than moerator's own {', '.join(OWN_MOUNTS)}",
            lambda pod: _distinct([m.mount_path for m in pod.volume_mounts], none_of=OWN_MOUNTS),
        ),
    )


def _distinct(names: Sequence[str], *, not_starting: str = "\n", none_of: Sequence[str] = ()) -> bool:
    taken = any(name.startswith(not_starting) or name in none_of for name in names)
    return not taken and len(set(names)) == len(names)


class PodTemplate(SpecModel):
    """What of the pods is the user's."""

    metadata: ObjectMeta = ObjectMeta()
    spec: PodSpec = PodSpec()


class RoutingTrace(SpecModel):
    """Record which experts the ranks' tokens choose, in lines that `moerator trace` and `moerator plan --load` read."""

    path: str = Field(
        min_length=1, max_length=1024, description="Folder inside the pods; each rank's pod writes a file of its own."
    )
    every_steps: int = Field(
        default=1,
        ge=1,
        le=1000000,
        description="Record one step of so many; each costs a copy of its choices to the host.",
    )
    max_megabytes: int = Field(
        default=256,
        ge=1,
        le=1048576,
        description="Of one pod's file (10^6 bytes); recording stops before it is larger.",
    )


def trace_can_be_written(spec: Any) -> bool:
    """`spec` has a trace and a template. A path under no mount is not judged: the local shell mounts nothing."""
    if spec.trace is None:
        return True
    holding = [m for m in spec.template.spec.volume_mounts if f"{spec.trace.path}/".startswith(f"{m.mount_path}/")]
    return not holding or any(not mount.read_only for mount in holding)


_HOLDS_TRACE = "(self.trace.path + '/').startsWith(m.mountPath + '/')"
_MOUNTS = "self.template.spec.volumeMounts"
TRACE_IS_WRITABLE = Rule(
    "!has(self.trace) || !has(self.template) || !has(self.template.spec) || "
    f"!has({_MOUNTS}) || {_MOUNTS}.all(m, !{_HOLDS_TRACE}) || "
    f"{_MOUNTS}.exists(m, {_HOLDS_TRACE} && !(has(m.readOnly) && m.readOnly))",
    "trace.path must not lie in a mount that is readOnly",
    trace_can_be_written,
)
"""Of MoEJob and MoEService."""


class ModelShapeSpec(SpecModel):
    """A model built from a config instead of a checkpoint."""

    family: str = Field(description="Model type of transformers, e.g. qwen3_moe.", min_length=1, max_length=63)
    hidden_size: int = Field(ge=8, le=65536, description="Width D of a token between layers.")
    num_hidden_layers: int = Field(ge=1, le=512, description="Layers, dense ones among them.")
    num_attention_heads: int = Field(ge=1, le=1024, description="Query heads.")
    num_key_value_heads: int = Field(
        ge=1, le=1024, description="Heads of keys and values; query heads are a multiple of them."
    )
    head_dim: int = Field(ge=2, le=1024, description="Width of one head.")
    num_experts: int = Field(ge=2, le=4096, description="Routed experts E of a layer.")
    num_experts_per_tok: int = Field(ge=1, le=256, description="Experts K that a token goes to.")
    moe_intermediate_size: int = Field(ge=1, le=262144, description="Width F inside one expert.")
    vocab_size: int = Field(default=256, ge=256, le=1048576, description="Token ids; 256 is bytes.")
    max_position_embeddings: int = Field(
        default=2048, ge=16, le=16777216, description="Tokens of the longest sequence."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.numExpertsPerTok <= self.numExperts",
            "numExpertsPerTok must not exceed numExperts",
            lambda shape: shape.num_experts_per_tok <= shape.num_experts,
        ),
        Rule(
            "self.numAttentionHeads % self.numKeyValueHeads == 0",
            "numAttentionHeads must be a multiple of numKeyValueHeads",
            lambda shape: shape.num_attention_heads % shape.num_key_value_heads == 0,
        ),
    )
