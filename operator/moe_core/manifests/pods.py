"""Pods: coordinator, ranks, gateways. Restricted PodSecurity, a read-only root and no API token for all of them.

Rank pods never restart in place: a dead rank is replaced by its next incarnation, so that two of one name never live.
Coordinator and gateways do: their state is soft.
"""

from collections.abc import Mapping
from typing import Any

from moe_core.contract import names
from moe_core.contract.names import (
    CONFIG_DIR,
    ROLE_COORDINATOR,
    ROLE_GATEWAY,
    ROLE_RANK,
    STATE_DIR,
    TOKEN_DIR,
    TOKEN_KEY,
)
from moe_core.contract.runtime_config import (
    ENV_CONFIG,
    ENV_NODE_NAME,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_POD_UID,
    ENV_RANK,
    ENV_REATTACH,
    ENV_ROLE,
    ENV_STATE_DIR,
    ENV_TOKEN_FILE,
)
from moe_core.facts import CreatePod
from moe_core.manifests.plan import Plan, merged

CONFIG_KEY = "config.json"
USER_ID = 10001

# A Ray head, or a gateway that is a Ray driver, was seen to take 0.6 to 0.75 GiB; ranks ask for what the user says.
HELPER_REQUEST = {"cpu": "100m", "memory": "768Mi"}


def create_pod(plan: Plan, role: str, *, index: int, incarnation: int, reattach: bool = False) -> CreatePod:
    """The action that creates one pod; ranks are gated. `reattach`: a coordinator among pods that run already."""
    manifest = _manifest(plan, role, index, incarnation, reattach=reattach)
    return CreatePod(
        name=manifest["metadata"]["name"],
        role=role,
        index=index,
        incarnation=incarnation,
        gated=role == ROLE_RANK,
        manifest=manifest,
    )


def _manifest(plan: Plan, role: str, index: int, incarnation: int, *, reattach: bool) -> dict[str, Any]:
    labels = {
        **names.owner_labels(plan.kind, plan.name),
        names.LABEL_ROLE: role,
        names.LABEL_INCARNATION: str(incarnation),
        "app.kubernetes.io/managed-by": "moerator",
        "app.kubernetes.io/instance": plan.name,
        "app.kubernetes.io/component": role,
    }
    if role == ROLE_RANK:
        labels[names.LABEL_RANK] = str(index)
    spec = _spec(plan, role, index)
    if reattach:
        spec["containers"][0]["env"].append({"name": ENV_REATTACH, "value": "1"})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": plan.pod(role, index, incarnation),
            "labels": merged(labels, plan.template.metadata.labels),
            "annotations": dict(sorted(plan.template.metadata.annotations.items())),
        },
        "spec": spec,
    }


def _spec(plan: Plan, role: str, index: int) -> dict[str, Any]:
    user = plan.template.spec
    spec: dict[str, Any] = {
        "restartPolicy": "Never" if role == ROLE_RANK else "Always",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 15,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(plan, role, index)],
        "volumes": _volumes(plan),
    }
    if role == ROLE_RANK:
        spec["schedulingGates"] = [{"name": names.SCHEDULING_GATE}]
    if user.node_selector:
        spec["nodeSelector"] = dict(sorted(user.node_selector.items()))
    if user.tolerations:
        spec["tolerations"] = [t.model_dump(by_alias=True, exclude_none=True) for t in user.tolerations]
    if user.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in user.image_pull_secrets]
    if user.priority_class_name:
        spec["priorityClassName"] = user.priority_class_name
    if user.runtime_class_name:
        spec["runtimeClassName"] = user.runtime_class_name
    if role == ROLE_GATEWAY:
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {
                    "matchLabels": {**names.owner_labels(plan.kind, plan.name), names.LABEL_ROLE: ROLE_GATEWAY}
                },
            }
        ]
    return spec


def _container(plan: Plan, role: str, index: int) -> dict[str, Any]:
    user = plan.template.spec
    container: dict[str, Any] = {
        "name": "moerator",
        "image": user.image or plan.default_image,
        "command": ["moe-pod"],
        "env": _env(plan, role, index),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _mounts(plan),
        "resources": _resources(plan, role),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if user.image_pull_policy:
        container["imagePullPolicy"] = user.image_pull_policy
    port = _port(plan, role)
    if port is not None:
        name, number, path = port
        container["ports"] = [{"name": name, "containerPort": number}]
        container["readinessProbe"] = {
            "httpGet": {"path": path, "port": number},
            "periodSeconds": 2,
            "timeoutSeconds": 2,
            "failureThreshold": 3,
        }
        # A process that hangs (SIGSTOP, a stuck disk) is restarted in place; a start may take minutes on busy cores.
        alive = {"httpGet": {"path": "/healthz", "port": number}, "periodSeconds": 5, "timeoutSeconds": 3}
        container["startupProbe"] = {**alive, "failureThreshold": 60}
        container["livenessProbe"] = {**alive, "failureThreshold": 3}
    return container


def _port(plan: Plan, role: str) -> tuple[str, int, str] | None:
    """Name, number and health path of the role's HTTP face. Ranks have none: the coordinator says who is active."""
    if role == ROLE_COORDINATOR:
        return "control", plan.config.coordinator_port, "/healthz"
    if role == ROLE_GATEWAY and plan.config.serving is not None:
        return "openai", plan.config.serving.gateway_port, "/health"
    return None


def _env(plan: Plan, role: str, index: int) -> list[dict[str, Any]]:
    def field(path: str) -> dict[str, Any]:
        return {"fieldRef": {"fieldPath": path}}

    ours: list[dict[str, Any]] = [
        {"name": ENV_ROLE, "value": role},
        {"name": ENV_POD_NAME, "valueFrom": field("metadata.name")},
        {"name": ENV_POD_UID, "valueFrom": field("metadata.uid")},
        {"name": ENV_POD_IP, "valueFrom": field("status.podIP")},
        {"name": ENV_CONFIG, "value": f"{CONFIG_DIR}/{CONFIG_KEY}"},
        {"name": ENV_TOKEN_FILE, "value": f"{TOKEN_DIR}/{TOKEN_KEY}"},
        {"name": ENV_STATE_DIR, "value": STATE_DIR},
    ]
    if role == ROLE_RANK:
        ours.append({"name": ENV_RANK, "value": str(index)})
        ours.append({"name": ENV_NODE_NAME, "valueFrom": field("spec.nodeName")})
    theirs = {entry.name: entry.value for entry in plan.template.spec.env}
    defaults = {"HOME": "/tmp"}
    if role == ROLE_RANK:
        # A rank computes on the processors it asks for; more threads than that would be throttled.
        millicores = plan.needs.request.get("cpu", 0)
        defaults["OMP_NUM_THREADS"] = str(max(1, millicores // 1000))
    return [*ours, *({"name": name, "value": value} for name, value in sorted({**defaults, **theirs}.items()))]


def _resources(plan: Plan, role: str) -> dict[str, Any]:
    if role != ROLE_RANK:
        return {"requests": dict(HELPER_REQUEST)}
    asked = plan.template.spec.resources
    parts: Mapping[str, Mapping[str, str]] = {"requests": asked.requests, "limits": asked.limits}
    return {name: dict(sorted(part.items())) for name, part in parts.items() if part}


def _volumes(plan: Plan) -> list[dict[str, Any]]:
    ours: list[dict[str, Any]] = [
        {"name": "moerator-config", "configMap": {"name": plan.child("config")}},
        {"name": "moerator-token", "secret": {"secretName": plan.child("token"), "defaultMode": 0o440}},
        {"name": "moerator-state", "emptyDir": {}},
        {"name": "moerator-tmp", "emptyDir": {}},
        {"name": "moerator-shm", "emptyDir": {"medium": "Memory"}},
    ]
    theirs = plan.template.spec.volumes
    return [*ours, *(volume.model_dump(mode="json", by_alias=True, exclude_none=True) for volume in theirs)]


def _mounts(plan: Plan) -> list[dict[str, Any]]:
    ours: list[dict[str, Any]] = [
        {"name": "moerator-config", "mountPath": CONFIG_DIR, "readOnly": True},
        {"name": "moerator-token", "mountPath": TOKEN_DIR, "readOnly": True},
        {"name": "moerator-state", "mountPath": STATE_DIR},
        {"name": "moerator-tmp", "mountPath": "/tmp"},
        {"name": "moerator-shm", "mountPath": "/dev/shm"},
    ]
    user = plan.template.spec.volume_mounts
    return [*ours, *(mount.model_dump(by_alias=True, exclude_none=True) for mount in user)]
