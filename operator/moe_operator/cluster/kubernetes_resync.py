"""The safety net under the watches: now and then, and after every relist, the cache is compared with the server.

A watch that had to start anew says what is there, not what has vanished meanwhile; a cache fed by it alone would keep
ghosts. Only metadata are listed, and only uids are compared.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from moe_operator.cluster.kubernetes import KubeApi
from moe_operator.cluster.kubernetes_cache import Cache
from moe_operator.cluster.protocol import ClusterError

logger = logging.getLogger(__name__)

METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PAGE = "500"
SETTLE_S = 2.0


class Resync:
    """`paths`: plural -> path of the collection over all namespaces. `distrust` is called before keys are marked."""

    def __init__(
        self,
        api: KubeApi,
        cache: Cache,
        paths: Mapping[str, str],
        *,
        namespaces: Sequence[str],
        every_s: float,
        distrust: Callable[[], None],
    ) -> None:
        self._api = api
        self._distrust = distrust
        self._cache = cache
        self._paths = paths
        self._namespaces = namespaces
        self._every_s = every_s
        self._wanted = asyncio.Event()

    def soon(self) -> None:
        self._wanted.set()

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._every_s):
                    await self._wanted.wait()
            except TimeoutError:
                pass  # the time has come without a relist
            await asyncio.sleep(SETTLE_S)  # several resources are listed anew together
            self._wanted.clear()
            try:
                await self.once()
            except ClusterError as error:
                logger.warning("resync: %s", error)
                self._wanted.set()

    async def once(self) -> None:
        """Drop what the server does not have any more, and mark every key."""
        for plural, path in self._paths.items():
            # Seen before the list was asked for and not in it: gone. What comes later cannot be judged by this list.
            known = self._cache.uids(plural)
            for uid in known - await self._listed(plural, path):
                logger.info("resync: a %s of uid %s has vanished unseen", plural, uid)
                self._cache.drop(uid)
        self._distrust()
        self._cache.mark_all()

    async def _listed(self, plural: str, path: str) -> set[str]:
        uids: set[str] = set()
        for each in self._collections(plural, path):
            token = ""
            while True:
                more = {"continue": token} if token else {}
                page = await self._api.get(each, accept=METADATA_ONLY, limit=PAGE, **more)
                uids |= {item["metadata"]["uid"] for item in page.get("items") or ()}
                token = page["metadata"].get("continue", "")
                if not token:
                    break
        return uids

    def _collections(self, plural: str, path: str) -> list[str]:
        if not self._namespaces or plural in ("nodes", "clustertopologies"):
            return [path]
        prefix, _, _ = path.rpartition("/")
        return [f"{prefix}/namespaces/{namespace}/{plural}" for namespace in self._namespaces]
