"""The safety net under the watches: the cache is compared with the server's own lists.

At the start, because nothing may be decided before everything is known: kopf begins to watch cluster-wide resources
before it knows its namespaces, so what it calls indexed can lack all pods. Later, now and then and after every relist:
a watch that had to start anew says what is there, not what has vanished meanwhile, and a cache fed by it alone would
keep ghosts. Only metadata are listed, and only uids are compared.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from moe_operator.cluster.kubernetes import KubeApi
from moe_operator.cluster.kubernetes_cache import Cache
from moe_operator.cluster.protocol import ClusterError
from moe_operator.watched import WATCHED, Watched

logger = logging.getLogger(__name__)

METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PAGE = "500"
SETTLE_S = 2.0
LOOK_S, LOOKS = 0.2, 10


class Resync:
    """`distrust` is called before keys are marked, for what no watch tells about."""

    def __init__(
        self, api: KubeApi, cache: Cache, *, namespaces: Sequence[str], every_s: float, distrust: Callable[[], None]
    ) -> None:
        self._api = api
        self._cache = cache
        self._namespaces = namespaces
        self._every_s = every_s
        self._distrust = distrust
        self._wanted = asyncio.Event()

    def soon(self) -> None:
        self._wanted.set()

    async def until_complete(self) -> None:
        """Wait until the cache knows every object that the server has listed."""
        for watched in WATCHED:
            while not await self._is_known(await self._listed_patiently(watched)):
                logger.info("%s are still arriving", watched.plural)  # or some were gone before the watch began

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
        for watched in WATCHED:
            # Seen before the list was asked for and not in it: gone. What comes later cannot be judged by this list.
            known = self._cache.uids(watched.plural)
            for uid in known - await self._listed(watched):
                logger.info("resync: one of %s, uid %s, has vanished unseen", watched.plural, uid)
                self._cache.drop(uid)
        self._distrust()
        self._cache.mark_all()

    async def _is_known(self, uids: set[str]) -> bool:
        for _ in range(LOOKS):
            if all(self._cache.knows(uid) for uid in uids):
                return True
            await asyncio.sleep(LOOK_S)
        return False

    async def _listed_patiently(self, watched: Watched) -> set[str]:
        while True:
            try:
                return await self._listed(watched)
            except ClusterError as error:
                logger.warning("waiting for the first lists: %s", error)
                await asyncio.sleep(SETTLE_S)

    async def _listed(self, watched: Watched) -> set[str]:
        uids: set[str] = set()
        selector = {"labelSelector": watched.labels} if watched.labels else {}
        for path in watched.all_paths(self._namespaces):
            token = ""
            while True:
                more = {"continue": token} if token else {}
                page = await self._api.get(path, accept=METADATA_ONLY, limit=PAGE, **selector, **more)
                uids |= {item["metadata"]["uid"] for item in page.get("items") or ()}
                token = page["metadata"].get("continue", "")
                if not token:
                    break
        return uids
