"""Where the API keeps the kinds that the operator changes, and whose an object is."""

from moe_core.contract.names import API_VERSION
from moe_core.facts import Wish
from moe_operator.observe import Object, owner_of

_RESOURCES: dict[str, tuple[str, str]] = {
    "Pod": ("v1", "pods"),
    "ConfigMap": ("v1", "configmaps"),
    "Service": ("v1", "services"),
    "Secret": ("v1", "secrets"),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies"),
    "MoEJob": (API_VERSION, "moejobs"),
    "MoEService": (API_VERSION, "moeservices"),
    "MoEDrill": (API_VERSION, "moedrills"),
    "ExpertMap": (API_VERSION, "expertmaps"),
}


def path_of(kind: str, namespace: str, name: str = "") -> str:
    """The API's path of an object, or of its collection when no name is given.

    >>> path_of("MoEJob", "team-a", "tiny")
    '/apis/moerator.dev/v1alpha1/namespaces/team-a/moejobs/tiny'
    """
    api_version, plural = _RESOURCES[kind]
    prefix = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    return f"{prefix}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


def plural_of(kind: str) -> str:
    return _RESOURCES[kind][1]


def api_version_of(kind: str) -> str:
    return _RESOURCES[kind][0]


def is_owned(obj: Object, wish: Wish) -> bool:
    """Whether this very wish (its uid, not only its name) controls the object."""
    owner = owner_of(obj)
    return owner is not None and owner.uid == wish.uid
