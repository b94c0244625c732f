"""Where the API keeps the kinds that the operator changes, and whose an object is."""

from moe_core.contract.names import GROUP, VERSION
from moe_core.facts import Wish
from moe_operator.observe import Object, owner_of

_RESOURCES: dict[str, tuple[str, str]] = {
    "Pod": ("", "pods"),
    "ConfigMap": ("", "configmaps"),
    "Service": ("", "services"),
    "Secret": ("", "secrets"),
    "MoEJob": (GROUP, "moejobs"),
    "MoEService": (GROUP, "moeservices"),
    "MoEDrill": (GROUP, "moedrills"),
    "ExpertMap": (GROUP, "expertmaps"),
}


def path_of(kind: str, namespace: str, name: str = "") -> str:
    """The API's path of an object, or of its collection when no name is given.

    >>> path_of("MoEJob", "team-a", "tiny")
    '/apis/moerator.dev/v1alpha1/namespaces/team-a/moejobs/tiny'
    """
    group, plural = _RESOURCES[kind]
    prefix = f"/apis/{group}/{VERSION}" if group else "/api/v1"
    return f"{prefix}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


def plural_of(kind: str) -> str:
    return _RESOURCES[kind][1]


def api_version_of(kind: str) -> str:
    group, _ = _RESOURCES[kind]
    return f"{group}/{VERSION}" if group else "v1"


def is_owned(obj: Object, wish: Wish) -> bool:
    """Whether this very wish (its uid, not only its name) controls the object."""
    owner = owner_of(obj)
    return owner is not None and owner.uid == wish.uid
