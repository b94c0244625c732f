"""Pods of namespaces that this operator does not look after, for one thing only: what they take from the nodes.

kopf watches either the whole cluster or some namespaces, and that for every resource alike. An operator of some
namespaces that saw only their pods would take a node that others have filled for an empty one, and pin ranks to it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

import aiohttp

from moe_operator.cluster.kubernetes import KubeApi
from moe_operator.cluster.kubernetes_cache import Cache
from moe_operator.cluster.protocol import ClusterError

logger = logging.getLogger(__name__)

PODS = "/api/v1/pods"
PAGE = "500"
PAUSE_S = 1.0


class Elsewhere:
    """`trace` makes what liveness listens by; `on_relist` is called for what has vanished between two lists."""

    def __init__(
        self,
        api: KubeApi,
        cache: Cache,
        *,
        namespaces: Sequence[str],
        timeout_s: int,
        trace: Callable[[], aiohttp.TraceConfig],
        on_relist: Callable[[], None],
    ) -> None:
        self._api = api
        self._cache = cache
        self._selector = ",".join(f"metadata.namespace!={namespace}" for namespace in namespaces)
        self._timeout_s = timeout_s
        self._trace = trace
        self._on_relist = on_relist
        self._is_first = True

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except (ClusterError, aiohttp.ClientError, TimeoutError, ValueError) as error:
                logger.warning("pods of other namespaces: %r", error)
            await asyncio.sleep(PAUSE_S)

    async def _follow(self) -> None:
        """List, then watch until the server wants a new list or the connection breaks."""
        version = await self._list()
        if not self._is_first:
            self._on_relist()
        self._is_first = False
        async with await self._api.open_session(self._trace()) as session:
            while True:
                events = self._api.watch(
                    session, PODS, timeout_s=self._timeout_s, resourceVersion=version, fieldSelector=self._selector
                )
                async for event in events:
                    obj = event["object"]
                    if event["type"] == "ERROR":
                        logger.info("pods of other namespaces are listed anew: %s", obj.get("message"))
                        return
                    version = obj["metadata"]["resourceVersion"]
                    if event["type"] == "DELETED":
                        self._cache.drop(obj["metadata"]["uid"])
                    elif event["type"] != "BOOKMARK":
                        self._cache.put("pods", obj)

    async def _list(self) -> str:
        """Into the cache, page by page; the version to watch from."""
        token = ""
        while True:
            more = {"continue": token} if token else {}
            page = await self._api.get(PODS, limit=PAGE, fieldSelector=self._selector, **more)
            for obj in page.get("items") or ():
                self._cache.put("pods", {"kind": "Pod", **obj})
            token = page["metadata"].get("continue", "")
            if not token:
                return str(page["metadata"]["resourceVersion"])
