"""The Kubernetes shell, put together: connection, cache, verbs, elector, reconcile, health.

Made by main.py inside kopf's startup and ended in its cleanup. A part that ends by itself ends the process.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

from moe_core.contract.names import GROUP, VERSION
from moe_operator.cluster.kubernetes import KubeApi, load_configuration
from moe_operator.cluster.kubernetes_cache import Cache
from moe_operator.cluster.kubernetes_elsewhere import Elsewhere
from moe_operator.cluster.kubernetes_lease import KubernetesLease
from moe_operator.cluster.kubernetes_resync import Resync
from moe_operator.cluster.kubernetes_verbs import KubernetesCluster
from moe_operator.cluster.protocol import ClusterError
from moe_operator.elector import Elector
from moe_operator.errors import EXIT_BROKEN, EXIT_LEASE_LOST, end_process
from moe_operator.liveness import HealthServer, LoopLag, WatchTrace
from moe_operator.metrics import Metrics
from moe_operator.observe import KINDS
from moe_operator.reconcile import Reconciler
from moe_operator.settings import OperatorSettings
from moe_operator.watched import WATCHED

logger = logging.getLogger(__name__)

START_LIMIT_S = 300.0
LOOP_LAG_LIMIT_S = 10.0
CRD_LOOK_S = 2.0
REQUESTS_AT_ONCE = 8
CALM_S = 5.0
"""A status is one write to etcd: a hundred busy objects make twenty a second."""


class Shell:
    """Everything that lives as long as the process; kopf's handlers reach it as `memo.shell`."""

    def __init__(self, settings: OperatorSettings, api: KubeApi, lease_api: KubeApi) -> None:
        """`lease_api` has connections of its own: a renewal never queues behind other requests."""
        self.settings = settings
        self.api = api
        self._lease_api = lease_api
        self.metrics = Metrics()
        self.cluster = KubernetesCluster(api, settings, clock=time.time)
        self.resync = Resync(
            api,
            self.cache,
            namespaces=settings.namespaces,
            every_s=settings.resync_s,
            distrust=self.cluster.distrust,
        )
        self.trace = WatchTrace(
            {
                path
                for watched in WATCHED
                for path in (*watched.paths(settings.namespaces), *watched.all_paths(settings.namespaces))
            },
            stalled_after_s=2.5 * settings.watch_timeout_s + 5,
            start_s=START_LIMIT_S,
            on_list=self.resync.soon,
        )
        self._elsewhere = Elsewhere(
            api,
            self.cache,
            namespaces=settings.namespaces,
            timeout_s=settings.watch_timeout_s,
            trace=self.trace.config,
            on_relist=self.resync.soon,
        )
        self._lag = LoopLag(limit_s=LOOP_LAG_LIMIT_S)
        self._health = HealthServer(
            settings.http_host, settings.http_port, alive=self._problems, ready=self._unready, metrics=self._exposition
        )
        self.elector = Elector(
            KubernetesLease(lease_api, namespace=settings.lease_namespace, name=settings.lease_name),
            identity=settings.identity,
            duration_s=settings.lease_duration_s,
            renew_deadline_s=settings.renew_deadline_s,
            retry_s=settings.retry_s,
            hold_off_s=settings.request_timeout_s,
            on_lost=lambda why: end_process(EXIT_LEASE_LOST, why),
        )
        self._reconciler = Reconciler(
            self.cluster,
            metrics=self.metrics,
            clock=time.time,
            may_apply=lambda: not self._is_closing and self.remaining_s() > 0,
            at_once=REQUESTS_AT_ONCE,
            calm_s=CALM_S,
        )
        self._complete = False
        self._is_closing = False
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def connect(cls, settings: OperatorSettings) -> "Shell":
        """Raises NoCluster when there is nothing to connect to."""
        shells: list[Shell] = []
        api = KubeApi(
            await load_configuration(),
            request_timeout_s=settings.request_timeout_s,
            remaining_s=lambda: shells[0].remaining_s() if shells else 0.0,
        )
        lease_api = KubeApi(await load_configuration(), request_timeout_s=settings.request_timeout_s)
        shells.append(cls(settings, api, lease_api))
        return shells[0]

    @property
    def cache(self) -> Cache:
        return self.cluster.cache

    def remaining_s(self) -> float:
        """For how long this process may still send changes."""
        return self.elector.remaining_s() if self.settings.leader_election else float("inf")

    async def start(self) -> None:
        """Answer probes, wait until our resources are served, then begin. So does a standby: it just may not apply."""
        await self._health.start()
        self._begin("loop lag", self._lag.run())
        await self._wait_for_resources()
        if self.settings.namespaces:
            self._begin("pods elsewhere", self._elsewhere.run())
        if self.settings.leader_election:
            self._begin("elector", self.elector.run())
        self._begin("reconcile", self._reconcile())
        self._begin("resync", self.resync.run())

    async def close(self) -> None:
        """In order: a request that is cut off may still take effect after somebody else has the lease."""
        self._is_closing = True
        await self._reconciler.at_rest(within_s=self.settings.request_timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.elector.release()
        await self.cluster.close()
        await self._health.close()
        await self.api.close()
        await self._lease_api.close()

    async def _reconcile(self) -> None:
        await self.resync.until_complete()
        self._complete = True
        await self._reconciler.run()

    async def _wait_for_resources(self) -> None:
        """kopf never watches what is not there when it starts (scanning is off), so start once it is."""
        wanted = {"moejobs", "moeservices", "moedrills", "expertmaps", "clustertopologies"}
        while True:
            try:
                served = await self.api.find(f"/apis/{GROUP}/{VERSION}")
            except ClusterError as error:
                logger.warning("%s", error)
            else:
                missing = wanted - {resource["name"] for resource in (served or {}).get("resources", ())}
                if not missing:
                    return
                logger.warning("not served yet: %s; are the CRDs installed?", ", ".join(sorted(missing)))
            await asyncio.sleep(CRD_LOOK_S)

    def _begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_end_if_it_failed)
        self._tasks.append(task)

    def _problems(self) -> list[str]:
        ended = [f"{task.get_name()} has ended" for task in self._tasks if task.done()]
        return ended + self.trace.problems() + self._lag.problems()

    def _unready(self) -> list[str]:
        is_ready = self._complete and self.trace.is_started()
        return self._problems() or ([] if is_ready else ["not everything is listed and watched yet"])

    def _exposition(self) -> bytes:
        for kind in KINDS:
            self.metrics.resources.labels(kind).set(self.cache.count(kind))
        self.metrics.is_leader.set(self.remaining_s() > 0)
        return self.metrics.exposition()


def _end_if_it_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("%s failed", task.get_name(), exc_info=error)
        end_process(EXIT_BROKEN, f"{task.get_name()} failed: {error!r}")
