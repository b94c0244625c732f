"""What tests apply: jobs, services and drills that are small and valid."""

from __future__ import annotations

from cluster.controlplane.api import Object

GPU = "nvidia.com/gpu"
SHAPE = {
    **{"family": "qwen3_moe", "hiddenSize": 64, "numHiddenLayers": 4, "numAttentionHeads": 4, "numKeyValueHeads": 2},
    **{"headDim": 16, "numExperts": 16, "numExpertsPerTok": 2, "moeIntermediateSize": 64},
}


def job(name: str = "tiny", *, ranks: int = 4, **spec: object) -> Object:
    return {
        "apiVersion": "moerator.dev/v1alpha1",
        "kind": "MoEJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"shape": SHAPE},
            "training": {"data": {"source": "PythonStdlib"}, "maxSteps": 100},
            "output": {"path": "/out"},
            "parallelism": {"expert": ranks},
            "template": one_gpu(),
            **spec,
        },
    }


def service(name: str = "chat", *, ranks: int = 4, **spec: object) -> Object:
    return {
        "apiVersion": "moerator.dev/v1alpha1",
        "kind": "MoEService",
        "metadata": {"name": name},
        "spec": {
            "model": {"path": "/model", "numExperts": 16, "numMoeLayers": 4},
            "parallelism": {"expert": ranks},
            "experts": {"redundantPerRank": 4},
            "gateway": {"replicas": 1},
            "template": one_gpu(),
            **spec,
        },
    }


def drill(name: str, *, target: str, rank: int) -> Object:
    return {
        "apiVersion": "moerator.dev/v1alpha1",
        "kind": "MoEDrill",
        "metadata": {"name": name},
        "spec": {"target": {"kind": "MoEService", "name": target, "rank": rank}, "fault": {"type": "KillRank"}},
    }


def one_gpu() -> Object:
    return {"spec": {"resources": {"requests": {"cpu": "1", "memory": "1Gi", GPU: "1"}, "limits": {GPU: "1"}}}}


def path_of(kind: str, namespace: str, name: str = "") -> str:
    group = "/api/v1" if kind in ("pods", "configmaps", "services", "secrets") else "/apis/moerator.dev/v1alpha1"
    return f"{group}/namespaces/{namespace}/{kind}" + (f"/{name}" if name else "")
