"""Every name, label and key that operator and pods share, each made in exactly one place."""

GROUP = "moerator.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
FIELD_MANAGER = "moerator"
MANAGER = f"{GROUP}/operator"
"""spec.managedBy of an object that is ours."""

LABEL_OWNER_KIND = f"{GROUP}/owner-kind"
LABEL_OWNER_NAME = f"{GROUP}/owner-name"
LABEL_ROLE = f"{GROUP}/role"
LABEL_RANK = f"{GROUP}/rank"
LABEL_INCARNATION = f"{GROUP}/incarnation"
ANNOTATION_SPEC_DIGEST = f"{GROUP}/spec-digest"
SCHEDULING_GATE = f"{GROUP}/gang"

ROLE_COORDINATOR = "coordinator"
ROLE_RANK = "rank"
ROLE_GATEWAY = "gateway"
ROLE_NODE = "node"
"""A bare Ray node that pods of one machine share (local shell)."""

COORDINATOR_PORT = 7310
GATEWAY_PORT = 8000
RAY_PORT = 6379

CONFIG_DIR = "/etc/moerator/config"
TOKEN_DIR = "/etc/moerator/token"
STATE_DIR = "/var/lib/moerator"
OWN_MOUNTS = (CONFIG_DIR, TOKEN_DIR, STATE_DIR, "/tmp", "/dev/shm")
"""Where every pod has a volume of ours: its root is read-only."""
OWN_VOLUMES = "moerator-"
"""How the names of these volumes begin."""
TOKEN_KEY = "token"
"""Key of the bearer token in its Secret, and so the name of its file."""
OWN_ENV = "MOERATOR_"
"""How the names of our environment variables begin."""

_SHORT_KIND = {"MoEJob": "job", "MoEService": "svc"}


def pod_name(kind: str, owner: str, role: str, *, index: int, incarnation: int) -> str:
    """Name of one pod. A replacement has a new incarnation, so a pod stuck Terminating never blocks its successor.

    >>> pod_name("MoEService", "tiny", "rank", index=2, incarnation=1)
    'tiny-svc-rank-2-1'
    """
    return f"{owner}-{_SHORT_KIND[kind]}-{role}-{index}-{incarnation}"


def index_of_pod(name: str) -> int:
    """The index in such a name; 0 for any other name.

    >>> index_of_pod("tiny-svc-gateway-1-3"), index_of_pod("web")
    (1, 0)
    """
    parts = name.rsplit("-", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else 0


def child_name(kind: str, owner: str, what: str) -> str:
    """Name of an owned object that is not a pod: `coordinator` and `gateway` Services, `config`, `token`, `map`.

    >>> child_name("MoEJob", "tiny", "config")
    'tiny-job-config'
    """
    return f"{owner}-{_SHORT_KIND[kind]}-{what}"


def owner_labels(kind: str, owner: str) -> dict[str, str]:
    return {LABEL_OWNER_KIND: kind, LABEL_OWNER_NAME: owner}


def rank_actor_name(pod_uid: str) -> str:
    """Name of the detached Ray actor of a rank, one per incarnation."""
    return f"rank-{pod_uid}"


def ray_namespace(namespace: str, kind: str, owner: str) -> str:
    return f"{namespace}.{_SHORT_KIND[kind]}.{owner}"
