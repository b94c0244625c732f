"""kopf's part: which resources are watched, and that what arrives goes into the cache. No policy and no answer.

An index function sees every object before any event handler runs at all, so the first event handler call means that
all caches are complete; nothing is decided before. Index functions store nothing in kopf: their indices would keep
whole documents.
"""

from dataclasses import dataclass
from typing import Any, cast

import kopf

from moe_core.contract.names import GROUP, LABEL_OWNER_KIND, VERSION
from moe_operator.shell import Shell


@dataclass(frozen=True, slots=True)
class Watched:
    """A resource that is watched; `labels` is a selector that the server filters by."""

    group: str
    version: str
    plural: str
    labels: str = ""


WATCHED = (
    Watched(GROUP, VERSION, "moejobs"),
    Watched(GROUP, VERSION, "moeservices"),
    Watched(GROUP, VERSION, "moedrills"),
    Watched(GROUP, VERSION, "expertmaps", LABEL_OWNER_KIND),
    Watched(GROUP, VERSION, "clustertopologies"),
    Watched("", "v1", "nodes"),
    Watched("", "v1", "pods"),  # all of them: what others have bound to a node is not free
    Watched("", "v1", "services", LABEL_OWNER_KIND),
    Watched("", "v1", "configmaps", LABEL_OWNER_KIND),
)


def register() -> None:
    """Tell kopf's default registry what to watch."""
    for watched in WATCHED:
        group, version, plural = watched.group, watched.version, watched.plural
        kopf.index(group=group, version=version, plural=plural, id=f"index-{plural}", param=plural)(_keep)
        kopf.on.event(group=group, version=version, plural=plural, id=f"event-{plural}")(_see)


def collections() -> dict[str, str]:
    """Plural -> path of the collection over all namespaces."""
    return {w.plural: f"/apis/{w.group}/{w.version}/{w.plural}" if w.group else f"/api/v1/{w.plural}" for w in WATCHED}


def select(settings: kopf.OperatorSettings) -> None:
    """Have the server filter by label what is only of interest when it is ours."""
    for watched in WATCHED:
        if watched.labels:
            selector = (
                (watched.group, watched.version, watched.plural) if watched.group else (watched.version, watched.plural)
            )
            settings.watching.label_selectors[selector] = watched.labels


async def _keep(body: kopf.Body, memo: Any, param: Any = None, **_: Any) -> None:
    cast(Shell, memo.shell).cache.put(param, body)


async def _see(type: str, body: kopf.Body, memo: Any, **_: Any) -> None:
    shell = cast(Shell, memo.shell)
    if type == "DELETED":
        shell.cache.drop(body["metadata"]["uid"])
    shell.note_complete()
