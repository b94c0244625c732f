"""Good documents and broken ones, used twice: against `moerator validate` and against a real API server.

A case changes one good document. `words` must stand in the message that a person reads, in both places.
"""

import copy
from dataclasses import dataclass
from typing import Any

JOB: dict[str, Any] = {
    "apiVersion": "moerator.dev/v1alpha1",
    "kind": "MoEJob",
    "metadata": {"name": "tiny"},
    "spec": {
        "model": {
            "shape": {
                "family": "qwen3_moe",
                "hiddenSize": 64,
                "numHiddenLayers": 4,
                "numAttentionHeads": 4,
                "numKeyValueHeads": 2,
                "headDim": 16,
                "numExperts": 16,
                "numExpertsPerTok": 2,
                "moeIntermediateSize": 64,
            }
        },
        "training": {"data": {"source": "PythonStdlib"}, "maxSteps": 10},
        "output": {"path": "/models/tiny"},
        "parallelism": {"expert": 4},
    },
}
SERVICE: dict[str, Any] = {
    "apiVersion": "moerator.dev/v1alpha1",
    "kind": "MoEService",
    "metadata": {"name": "tiny"},
    "spec": {
        "model": {"path": "/models/tiny"},
        "parallelism": {"expert": 4},
        "experts": {"redundantPerRank": 2},
        "template": {"spec": {"resources": {"requests": {"cpu": 2, "memory": "2Gi", "nvidia.com/gpu": 1}}}},
    },
}
TOPOLOGY: dict[str, Any] = {
    "apiVersion": "moerator.dev/v1alpha1",
    "kind": "ClusterTopology",
    "metadata": {"name": "racks"},
    "spec": {
        "levels": [
            {"name": "zone", "nodeLabel": "topology.kubernetes.io/zone"},
            {"name": "host", "nodeLabel": "kubernetes.io/hostname"},
        ]
    },
}
DRILL: dict[str, Any] = {
    "apiVersion": "moerator.dev/v1alpha1",
    "kind": "MoEDrill",
    "metadata": {"name": "lose-a-rank"},
    "spec": {"target": {"kind": "MoEService", "name": "tiny", "rank": 1}, "fault": {"type": "KillRank"}},
}
MAP: dict[str, Any] = {
    "apiVersion": "moerator.dev/v1alpha1",
    "kind": "ExpertMap",
    "metadata": {"name": "tiny-svc-map"},
    "spec": {
        "generation": 1,
        "digest": "0123456789abcdef",
        "numLogicalExperts": 2,
        "slotsOfRank": [1, 1],
        "layers": [{"logicalOfSlot": [0, 1]}],
    },
}
GOOD = {"MoEJob": JOB, "MoEService": SERVICE, "ClusterTopology": TOPOLOGY, "MoEDrill": DRILL, "ExpertMap": MAP}

REMOVED = object()


@dataclass(frozen=True)
class Broken:
    """`path` in the good document of `kind` is set to `value`, or removed."""

    kind: str
    path: str
    value: Any
    words: tuple[str, ...]

    @property
    def id(self) -> str:
        shown = "removed" if self.value is REMOVED else str(self.value)[:60]
        return f"{self.kind}:{self.path}={shown}"

    def document(self) -> dict[str, Any]:
        document = copy.deepcopy(GOOD[self.kind])
        *parents, last = self.path.split(".")
        node: Any = document
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        key = int(last) if isinstance(node, list) else last
        if self.value is REMOVED:
            del node[key]
        else:
            node[key] = self.value
        return document


SHAPE = "spec.model.shape"
ROUTER = "spec.model.router"
COEFFICIENT_TWICE = {
    **JOB["spec"],
    "model": {**JOB["spec"]["model"], "router": {"type": "TopK"}},
    "training": {**JOB["spec"]["training"], "auxLossCoefficient": "0.01"},
}
TEMPLATE = "spec.template.spec"
READ_ONLY_TRACE = {
    "model": {"path": "/models/tiny"},
    "parallelism": {"expert": 4},
    "trace": {"path": "/models/traces"},
    "template": {
        "spec": {
            "volumes": [{"name": "a", "emptyDir": {}}],
            "volumeMounts": [{"name": "a", "mountPath": "/models", "readOnly": True}],
        }
    },
}
BROKEN: tuple[Broken, ...] = (
    Broken("MoEJob", "spec.model", REMOVED, ("model",)),
    Broken("MoEJob", "spec.model", {}, ("shape",)),
    Broken("MoEJob", "spec.model.shap", {}, ("shap",)),
    Broken("MoEJob", f"{SHAPE}.family", 7, ("family", "string")),
    Broken("MoEJob", f"{SHAPE}.family", "", ("family",)),
    Broken("MoEJob", f"{SHAPE}.hiddenSize", 4, ("hiddenSize", "8")),
    Broken("MoEJob", f"{SHAPE}.hiddenSize", "64", ("hiddenSize", "integer")),
    Broken("MoEJob", f"{SHAPE}.hiddenSize", 64.5, ("hiddenSize", "integer")),
    Broken("MoEJob", f"{SHAPE}.numExperts", 1, ("numExperts", "2")),
    Broken("MoEJob", f"{SHAPE}.numExpertsPerTok", 17, ("numExpertsPerTok must not exceed numExperts",)),
    Broken("MoEJob", f"{SHAPE}.numKeyValueHeads", 3, ("numAttentionHeads must be a multiple of numKeyValueHeads",)),
    Broken("MoEJob", f"{SHAPE}.vocabSize", 100, ("vocabSize", "256")),
    Broken("MoEJob", f"{SHAPE}.num_experts", 16, ("num_experts",)),
    Broken("MoEJob", "spec.training", REMOVED, ("training",)),
    Broken("MoEJob", "spec.training.data", {}, ("exactly one of source and path",)),
    Broken("MoEJob", "spec.training.data.path", "/data", ("exactly one of source and path",)),
    Broken("MoEJob", "spec.training.data.source", "Wikipedia", ("PythonStdlib",)),
    Broken("MoEJob", "spec.training.maxSteps", REMOVED, ("give maxSteps, maxSeconds or both",)),
    Broken("MoEJob", "spec.training.maxSteps", 0, ("maxSteps", "1")),
    Broken("MoEJob", "spec.training.maxSteps", -5, ("maxSteps", "1")),
    Broken("MoEJob", "spec.training.learningRate", 0.003, ("learningRate", "string")),
    Broken("MoEJob", "spec.training.learningRate", "fast", ("learningRate",)),
    Broken("MoEJob", "spec.training.learningRate", "-3e-3", ("learningRate",)),
    Broken("MoEJob", "spec.training.learnRate", "3e-3", ("learnRate",)),
    Broken("MoEJob", "spec.training.sequenceLength", 4, ("sequenceLength", "8")),
    Broken("MoEJob", "spec.training.maxExpertGradientNorm", "0", ("maxExpertGradientNorm must be > 0",)),
    Broken("MoEJob", ROUTER, {}, ("type",)),
    Broken("MoEJob", ROUTER, {"type": "Random"}, ("type", "ExpertChoice")),
    Broken("MoEJob", ROUTER, {"type": "TopK", "top_p": "0.5"}, ("top_p",)),
    Broken("MoEJob", ROUTER, {"type": "TopP", "topP": 0.5}, ("topP", "string")),
    Broken("MoEJob", ROUTER, {"type": "TopP", "topP": "1.5"}, ("topP must be > 0 and <= 1",)),
    Broken("MoEJob", ROUTER, {"type": "TopP", "maxK": 0}, ("maxK", "1")),
    Broken("MoEJob", ROUTER, {"type": "TopK", "topP": "0.5"}, ("topP is used by type TopP only",)),
    Broken("MoEJob", ROUTER, {"type": "SoftMoE", "enableExpertBias": True}, ("enableExpertBias is used by type TopK",)),
    Broken("MoEJob", ROUTER, {"type": "TopK", "biasUpdateRate": "0.1"}, ("needs enableExpertBias true",)),
    Broken("MoEJob", ROUTER, {"type": "TopK", "overflow": "Drop"}, ("overflow needs expertCapacityFactor",)),
    Broken("MoEJob", ROUTER, {"type": "TopK", "groupTopk": 2}, ("groupTopk needs numGroups or groupBy Device",)),
    Broken("MoEJob", ROUTER, {"type": "Custom"}, ("type Custom needs classPath",)),
    Broken("MoEJob", ROUTER, {"type": "Custom", "classPath": "a b"}, ("classPath",)),
    Broken(
        *("MoEJob", ROUTER, {"type": "TopK", "scoreFunction": "Sigmoid", "preSoftmax": True}),
        ("preSoftmax means nothing with scoreFunction Sigmoid",),
    ),
    Broken(
        *("MoEJob", ROUTER, {"type": "TopK", "expertCapacityFactor": "1", "classCapacityPercents": [50, 40]}),
        ("classCapacityPercents must sum to 100",),
    ),
    Broken("MoEJob", ROUTER, {"type": "Heuristic", "heuristic": "Class"}, ("heuristic Class needs classFirstIds",)),
    Broken(
        *("MoEJob", ROUTER, {"type": "Heuristic", "heuristic": "Class", "classFirstIds": [9, 5]}),
        ("classFirstIds must ascend",),
    ),
    Broken("MoEJob", "spec", COEFFICIENT_TWICE, ("give model.router.auxLossCoeff",)),
    Broken("MoEJob", "spec.output", REMOVED, ("output",)),
    Broken("MoEJob", "spec.output.path", "", ("path",)),
    Broken("MoEJob", "spec.parallelism", REMOVED, ("parallelism",)),
    Broken("MoEJob", "spec.parallelism.expert", 0, ("expert", "1")),
    Broken("MoEJob", "spec.parallelism.expert", 1025, ("expert", "1024")),
    Broken("MoEJob", "spec.parallelism.tensor", 2, ("tensor",)),
    Broken("MoEJob", "spec.suspend", "maybe", ("suspend", "boolean")),
    Broken("MoEJob", "spec.failurePolicy", {"maxRestarts": -1}, ("maxRestarts", "0")),
    Broken("MoEJob", "spec.activeDeadlineSeconds", 0, ("activeDeadlineSeconds", "1")),
    Broken("MoEJob", "spec.ttlSecondsAfterFinished", -1, ("ttlSecondsAfterFinished", "0")),
    Broken("MoEJob", "spec.drills", "Sometimes", ("drills", "Allowed")),
    Broken("MoEJob", "spec", REMOVED, ("spec",)),
    Broken("MoEJob", "metadata.name", "t" * 41, ("metadata.name", "40")),
    Broken("MoEJob", "metadata.name", "Tiny_Job", ("name",)),
    Broken("MoEService", "spec.model.path", REMOVED, ("path",)),
    Broken("MoEService", "spec.model.numExperts", 16, ("give numExperts and numMoeLayers together",)),
    Broken("MoEService", "spec.experts.minCopies", 0, ("minCopies", "1")),
    Broken("MoEService", "spec.experts.minCopies", 5, ("experts.minCopies must not exceed parallelism.expert",)),
    Broken("MoEService", "spec.experts.policy", "linear", ("policy", "Linear")),
    Broken("MoEService", "spec.experts.policy", "DeepSeek", ("policy", "Linear")),
    Broken("MoEService", "spec.experts.redundantPerRank", -1, ("redundantPerRank", "0")),
    Broken("MoEService", "spec.experts.fallback", "Ignore", ("fallback", "Generalist")),
    Broken("MoEService", "spec.model.routerClassPath", "mine.Router", ("routerClassPath",)),
    Broken("MoEService", "spec.experts.locality", {"bias": "0"}, ("bias must be > 0",)),
    Broken("MoEService", "spec.experts.locality", {"bias": 1}, ("bias", "string")),
    Broken("MoEService", "spec.experts.locality", {"budgetPercent": 101}, ("budgetPercent", "100")),
    Broken("MoEService", "spec.serving", {"maxContext": 8}, ("maxContext", "16")),
    Broken("MoEService", "spec.gateway", {"port": 70000}, ("port", "65535")),
    Broken("MoEService", "spec.gateway", {"replicas": 0}, ("replicas", "1")),
    Broken("MoEService", "spec.topologyConstraint", {"topologyName": "racks"}, ("pack",)),
    Broken("MoEService", "spec.topologyConstraint", {"topologyName": "racks", "pack": {}}, ("required, preferred",)),
    Broken(
        "MoEService", "spec.topologyConstraint", {"topologyName": "A B", "pack": {"required": "rack"}}, ("topologyN",)
    ),
    Broken(
        *("MoEService", "spec.topologyConstraint", {"topologyName": "racks", "pack": {"ranksPerNode": 0}}),
        ("ranksPerNode", "1"),
    ),
    Broken(
        *("MoEService", "spec.topologyConstraint", {"topologyName": "racks", "pack": {"ranksPerNode": 3}}),
        ("parallelism.expert must be a multiple of topologyConstraint.pack.ranksPerNode",),
    ),
    Broken(
        *("MoEJob", "spec.topologyConstraint", {"topologyName": "racks", "pack": {"ranksPerNode": 3}}),
        ("parallelism.expert must be a multiple of topologyConstraint.pack.ranksPerNode",),
    ),
    Broken("MoEService", "spec.spares", {"perDomain": -1}, ("perDomain", "0")),
    Broken("MoEService", "spec.spares", {"perRack": 1}, ("perRack",)),
    Broken("MoEService", "spec.template.spec.resources.requests.cpu", "two", ("cpu",)),
    Broken("MoEService", "spec.template.spec.resources.requests.memory", 1.5, ("memory",)),
    Broken("MoEService", "spec.template.spec.schedulingGates", [{"name": "x"}], ("schedulingGates",)),
    Broken("MoEService", "spec.template.spec.tolerations", [{"effect": "Never"}], ("effect",)),
    Broken("MoEService", "spec.template.spec.env", [{"value": "x"}], ("name",)),
    Broken("MoEService", f"{TEMPLATE}.env", [{"name": "MOERATOR_RANK", "value": "9"}], ("env", "MOERATOR_")),
    Broken("MoEService", f"{TEMPLATE}.env", [{"name": "A"}, {"name": "A"}], ("env must have distinct names",)),
    Broken("MoEService", f"{TEMPLATE}.volumes", [{}], ("volumes", "name")),
    Broken("MoEService", f"{TEMPLATE}.volumes", [{"name": "a"}], ("exactly one of", "persistentVolumeClaim")),
    Broken("MoEService", f"{TEMPLATE}.volumes", [{"name": ["a"], "emptyDir": {}}], ("name",)),
    Broken("MoEService", f"{TEMPLATE}.volumes", [{"name": "a", "hostPath": 5}], ("hostPath",)),
    Broken("MoEService", f"{TEMPLATE}.volumes", [{"name": "a", "persistentVolumeClam": {}}], ("persistentVolumeClam",)),
    Broken("MoEService", f"{TEMPLATE}.volumes", [{"name": "a", "emptyDir": {}, "nfs": {}}], ("exactly one of",)),
    Broken("MoEService", f"{TEMPLATE}.volumes", [{"name": "moerator-tmp", "emptyDir": {}}], ("moerator-",)),
    Broken(
        "MoEService", f"{TEMPLATE}.volumes", [{"name": "a", "emptyDir": {}}] * 2, ("volumes must have distinct names",)
    ),
    Broken("MoEService", f"{TEMPLATE}.volumeMounts", [{"name": "no", "mountPath": "/no"}], ("name volumes of this",)),
    Broken(
        "MoEService",
        TEMPLATE,
        {"volumes": [{"name": "a", "emptyDir": {}}], "volumeMounts": [{"name": "a", "mountPath": "/tmp"}]},
        ("distinct paths", "/tmp"),
    ),
    Broken("MoEService", "spec.experts.redundant_per_rank", 3, ("redundant_per_rank",)),
    Broken("MoEService", "spec.model", {"path": "/m", "num_experts": 16, "num_moe_layers": 4}, ("num_experts",)),
    Broken("MoEService", "metadata.name", "a.b", ("metadata.name",)),
    Broken("MoEService", "metadata.name", "1abc", ("metadata.name",)),
    Broken("MoEService", "metadata.name", "a\n", ("name",)),
    Broken("MoEService", "metadata.name", "", ("name",)),
    Broken("MoEService", "metadata.labls", {"a": "b"}, ("labls",)),
    Broken("MoEService", "metadata.labels", 5, ("labels",)),
    Broken("MoEService", "metadata.labels", {"a": 5}, ("labels",)),
    Broken("MoEService", "metadata.labels", {"a b": "c"}, ("labels",)),
    Broken("MoEService", "metadata.labels", {"a": "b c"}, ("labels",)),
    Broken("MoEService", "metadata.annotations", {"a": 5}, ("annotations",)),
    Broken("MoEService", "metadata.ownerReferences", 5, ("ownerReferences",)),
    Broken("MoEService", "metadata.ownerReferences", [5], ("ownerReferences",)),
    Broken("MoEService", "metadata.ownerReferences", [{"kind": "A"}], ("ownerReferences",)),
    Broken("MoEService", "spec.gatway", {"port": 1}, ("gatway",)),
    Broken("MoEJob", "spec.dispatch", {"wire": "FP8"}, ("wire", "Float8")),
    Broken("MoEService", "spec.dispatch", {"combine_wire": "Int8"}, ("combine_wire",)),
    Broken("MoEService", "spec.dispatch", {"hierarchy": "Tree"}, ("hierarchy", "ByNode")),
    Broken("MoEJob", "spec.parallelism", {"expert": 4, "data": 0}, ("data", "1")),
    Broken("MoEService", "spec.parallelism", {"expert": 64, "data": 17}, ("expert times data must not exceed 1024",)),
    Broken("MoEJob", "spec.dispatch", {"overlap": True}, ("overlap",)),
    Broken("MoEJob", "spec.dispatch", {"probe": -1}, ("probe", "0")),
    Broken("MoEService", "spec.trace", {}, ("path",)),
    Broken("MoEService", "spec.trace", {"path": "/t", "everySteps": 0}, ("everySteps", "1")),
    Broken("MoEJob", "spec.trace", {"path": "/t", "maxMegabytes": 0}, ("maxMegabytes", "1")),
    Broken("MoEJob", "spec.trace", {"path": "/t", "every_steps": 2}, ("every_steps",)),
    Broken("MoEService", "spec", READ_ONLY_TRACE, ("trace.path must not lie in a mount that is readOnly",)),
    Broken("ClusterTopology", "spec.levels", [], ("levels",)),
    Broken("ClusterTopology", "spec.levels.1.name", "zone", ("levels must have distinct names",)),
    Broken(
        "ClusterTopology",
        "spec.levels.0.nodeLabel",
        "kubernetes.io/hostname",
        ("levels must have distinct node labels",),
    ),
    Broken("ClusterTopology", "spec.levels.0.name", "Zone!", ("name",)),
    Broken("MoEDrill", "spec.target", REMOVED, ("target",)),
    Broken("MoEDrill", "spec.target.rank", -1, ("rank", "0")),
    Broken("MoEDrill", "spec.target.kind", "Deployment", ("MoEService",)),
    Broken("MoEDrill", "spec.fault.type", "Explode", ("KillRank",)),
    Broken("MoEDrill", "spec.slo", {"restoredWithinSeconds": 0}, ("restoredWithinSeconds", "1")),
    Broken("ExpertMap", "spec.slotsOfRank", REMOVED, ("slotsOfRank",)),
    Broken("ExpertMap", "spec.layers.0.logicalOfSlot", ["0"], ("logicalOfSlot", "integer")),
    Broken("ExpertMap", "spec.layers.0.shareOfSlot", [1, -1], ("shareOfSlot", "0")),
)
