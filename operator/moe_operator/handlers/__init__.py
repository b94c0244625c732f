"""kopf's part: what is watched goes into the cache. No policy, no answer, no annotation, no finalizer.

Index functions see an object first, and store nothing in kopf: its indices would keep whole documents.
"""

from typing import Any, cast

import kopf

from moe_operator.shell import Shell
from moe_operator.watched import WATCHED


def register() -> None:
    """Tell kopf's default registry what to watch."""
    for watched in WATCHED:
        group, version, plural = watched.group, watched.version, watched.plural
        kopf.index(group=group, version=version, plural=plural, id=f"index-{plural}", param=plural)(_keep)
        kopf.on.event(group=group, version=version, plural=plural, id=f"event-{plural}")(_see)


def select(settings: kopf.OperatorSettings) -> None:
    """Have the server filter by label what is only of interest when it is ours."""
    for watched in WATCHED:
        if watched.labels:
            names = (watched.version, watched.plural)
            selector = (watched.group, *names) if watched.group else names
            settings.watching.label_selectors[selector] = watched.labels


async def _keep(body: kopf.Body, memo: Any, param: Any = None, **_: Any) -> None:
    cast(Shell, memo.shell).cache.put(param, body)


async def _see(type: str, body: kopf.Body, memo: Any, **_: Any) -> None:
    if type == "DELETED":
        cast(Shell, memo.shell).cache.drop(body["metadata"]["uid"])
