"""The resources that the operator watches, and where the API keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_core.contract.names import GROUP, LABEL_OWNER_KIND, VERSION


@dataclass(frozen=True, slots=True)
class Watched:
    """`labels` is a selector that the server filters by: what is only of interest when it is ours."""

    group: str
    version: str
    plural: str
    labels: str = ""
    is_namespaced: bool = True
    everywhere: bool = False
    """Of interest in namespaces that are not looked after, too (cluster/kubernetes_elsewhere.py watches those)."""

    def paths(self, namespaces: Sequence[str]) -> list[str]:
        """The collections that kopf watches; no namespaces means all of them.

        >>> Watched("", "v1", "pods").paths(["a", "b"])
        ['/api/v1/namespaces/a/pods', '/api/v1/namespaces/b/pods']
        """
        prefix = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        if not namespaces or not self.is_namespaced:
            return [f"{prefix}/{self.plural}"]
        return [f"{prefix}/namespaces/{namespace}/{self.plural}" for namespace in namespaces]

    def all_paths(self, namespaces: Sequence[str]) -> list[str]:
        """The collections that hold everything of interest."""
        return self.paths(() if self.everywhere else namespaces)


WATCHED = (
    Watched(GROUP, VERSION, "moejobs"),
    Watched(GROUP, VERSION, "moeservices"),
    Watched(GROUP, VERSION, "moedrills"),
    Watched(GROUP, VERSION, "expertmaps", LABEL_OWNER_KIND),
    Watched(GROUP, VERSION, "clustertopologies", is_namespaced=False),
    Watched("", "v1", "nodes", is_namespaced=False),
    Watched("", "v1", "pods", everywhere=True),  # what others have bound to a node is not free
    Watched("", "v1", "services", LABEL_OWNER_KIND),
    Watched("", "v1", "configmaps", LABEL_OWNER_KIND),
    Watched("networking.k8s.io", "v1", "networkpolicies", LABEL_OWNER_KIND),
)
