"""NetworkPolicies of one owner: who may open a connection to its pods. What they themselves may reach is left open.

    its own pods        every port of each other (peer faces, guards, Ray, the all-to-all)
    the operator        the coordinator's control port
    whoever scrapes     the ports that serve /metrics: the coordinator's and the gateways'
    clients             the gateways' port, from anywhere; nobody but these reaches a rank

Probes come from the kubelet of the pod's own node, which no policy stops. Without a network plugin that enforces
policies these objects do nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_core.contract import names
from moe_core.contract.names import ROLE_COORDINATOR, ROLE_GATEWAY
from moe_core.facts import NetworkFact
from moe_core.manifests.plan import Plan

API_VERSION = "networking.k8s.io/v1"
OPERATOR_LABELS = {"app.kubernetes.io/name": "moerator"}
"""On the operator's pods, as its chart makes them."""
NAMESPACE_NAME = "kubernetes.io/metadata.name"

Spec = Mapping[str, Any]


def network_policies(plan: Plan, network: NetworkFact) -> dict[str, Spec]:
    """Child name -> spec. They add up: what one allows no other takes back."""
    group = names.owner_labels(plan.kind, plan.name)
    scrapers = [{"namespaceSelector": {"matchLabels": {NAMESPACE_NAME: name}}} for name in network.metrics_namespaces]
    operator = {
        "namespaceSelector": {"matchLabels": {NAMESPACE_NAME: network.operator_namespace}},
        "podSelector": {"matchLabels": OPERATOR_LABELS},
    }
    policies = {
        "network": _policy(group, [{"podSelector": {"matchLabels": group}}]),
        "network-coordinator": _policy(
            {**group, names.LABEL_ROLE: ROLE_COORDINATOR}, [operator, *scrapers], port=plan.config.coordinator_port
        ),
    }
    if plan.config.serving is not None:
        gateways = {**group, names.LABEL_ROLE: ROLE_GATEWAY}
        policies["network-gateway"] = _policy(gateways, [], port=plan.config.serving.gateway_port)
    return policies


def _policy(pods: Mapping[str, str], sources: Sequence[Mapping[str, Any]], *, port: int | None = None) -> Spec:
    """Pods with these labels take connections from `sources` (none: from anywhere) to `port` (None: to all)."""
    rule: dict[str, Any] = {"from": list(sources)} if sources else {}
    if port is not None:
        rule["ports"] = [{"protocol": "TCP", "port": port}]
    return {"podSelector": {"matchLabels": dict(pods)}, "policyTypes": ["Ingress"], "ingress": [rule]}
