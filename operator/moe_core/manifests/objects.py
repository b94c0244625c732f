"""Owned objects that are not pods: ConfigMap, Services, policies, and the ExpertMap in slices that fit into etcd."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from moe_core.contract import names
from moe_core.contract.base import digest_of
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.names import ROLE_COORDINATOR, ROLE_GATEWAY
from moe_core.facts import ApplyObject
from moe_core.manifests import network
from moe_core.manifests.map_slices import slices_of
from moe_core.manifests.plan import Plan
from moe_core.manifests.pods import CONFIG_KEY

Owner = tuple[str, str]
"""(kind, name)."""


def wanted_objects(plan: Plan, expert_map: ExpertMap) -> list[ApplyObject]:
    """Everything but pods and the token, in the order of creation: what pods mount comes first."""
    return [
        _config_map(plan),
        _coordinator_service(plan),
        *([_gateway_service(plan)] if plan.num_gateways else []),
        *_network_policies(plan),
        *_expert_maps(plan, expert_map),
    ]


def _apply(owner: Owner, kind: str, what: str, body: Mapping[str, Any], *, api_version: str = "v1") -> ApplyObject:
    digest = digest_of(json.dumps(body, sort_keys=True))
    name = names.child_name(*owner, what)
    labels = {**names.owner_labels(*owner), "app.kubernetes.io/managed-by": "moerator"}
    metadata = {"name": name, "labels": labels, "annotations": {names.ANNOTATION_SPEC_DIGEST: digest}}
    manifest = {"apiVersion": api_version, "kind": kind, "metadata": metadata, **body}
    return ApplyObject(kind=kind, name=name, digest=digest, manifest=manifest)


def _config_map(plan: Plan) -> ApplyObject:
    return _apply((plan.kind, plan.name), "ConfigMap", "config", {"data": {CONFIG_KEY: plan.config.canonical()}})


def _selector(plan: Plan, role: str) -> dict[str, str]:
    return {**names.owner_labels(plan.kind, plan.name), names.LABEL_ROLE: role}


def _coordinator_service(plan: Plan) -> ApplyObject:
    """A stable address over replacements of the coordinator's pod; ranks must reach it before it is ready."""
    ports = [
        {"name": "control", "port": plan.config.coordinator_port, "targetPort": plan.config.coordinator_port},
        {"name": "ray", "port": plan.config.ray_port, "targetPort": plan.config.ray_port},
    ]
    spec = {
        "type": "ClusterIP",
        "selector": _selector(plan, ROLE_COORDINATOR),
        "ports": [{"protocol": "TCP", **port} for port in ports],
        "publishNotReadyAddresses": True,
    }
    return _apply((plan.kind, plan.name), "Service", "coordinator", {"spec": spec})


def _gateway_service(plan: Plan) -> ApplyObject:
    assert plan.config.serving is not None, f"{plan.kind} {plan.name} has gateways and serves nothing"
    port = plan.config.serving.gateway_port
    spec = {
        "type": "ClusterIP",
        "selector": _selector(plan, ROLE_GATEWAY),
        "ports": [{"name": "openai", "protocol": "TCP", "port": port, "targetPort": port}],
    }
    return _apply((plan.kind, plan.name), "Service", "gateway", {"spec": spec})


def _network_policies(plan: Plan) -> list[ApplyObject]:
    """None where the operator does not know where it runs itself: a policy would shut it out."""
    if plan.network is None:
        return []
    return [
        _apply((plan.kind, plan.name), "NetworkPolicy", what, {"spec": spec}, api_version=network.API_VERSION)
        for what, spec in network.network_policies(plan, plan.network).items()
    ]


def _expert_maps(plan: Plan, expert_map: ExpertMap) -> Sequence[ApplyObject]:
    return _rendered((plan.kind, plan.name), "Linear" if plan.rebalance is None else "Balanced", expert_map)


@lru_cache(maxsize=16)
def _rendered(owner: Owner, policy: str, expert_map: ExpertMap) -> Sequence[ApplyObject]:
    """One object, or slices of whole layers; the first is named `map`, the others `map-<first layer>`.

    A memo of a pure function: rendering a big map takes a tenth of a second, and decide asks for it every time.
    """
    return tuple(
        _apply(
            owner,
            "ExpertMap",
            f"map-{part.first_layer}" if part.first_layer else "map",
            {"spec": part.model_dump(mode="json", by_alias=True, exclude_none=True)},
            api_version=names.API_VERSION,
        )
        for part in slices_of(expert_map, policy=policy)
    )
