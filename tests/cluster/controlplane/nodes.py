"""Nodes without machines: Ready, and pods on them become Running because a status says so.

Everything else is Kubernetes' own (scheduler, node lifecycle, garbage collection), so that a test sees what an operator
would see on a real cluster, and can ask for what clusters do at the worst moment: a silent node, a pod stuck
Terminating, a pod that fails.

    with kubelets(cluster, [Node("n0", {"rack": "r0"}, {"nvidia.com/gpu": "8"})]) as nodes:
        ...
        nodes.fail_pod("default", "rank-3")

They live on a thread of their own: a test that blocks its event loop must not make nodes NotReady.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import aiohttp

from cluster.controlplane.api import Api, ApiError, Object
from cluster.controlplane.background import in_background
from cluster.controlplane.kubelet import Kubelets, Node
from cluster.controlplane.start import ADMIN, ControlPlane

__all__ = ["KubeletControls", "Node", "kubelets"]
T = TypeVar("T")


class KubeletControls:
    """What a test may ask of the simulated kubelets, from any thread; each call returns once it was carried out."""

    def __init__(self, core: Kubelets, loop: asyncio.AbstractEventLoop, *, has_node_controller: bool) -> None:
        self._core = core
        self._loop = loop
        self._has_node_controller = has_node_controller

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def add_node(self, node: Node) -> None:
        """The node joins; pods can be scheduled on it once this returns."""
        self._do(self.add(node))

    async def add(self, node: Node) -> None:
        """As `add_node`, for the simulator's own loop."""
        await self._core.add_node(node)
        if self._has_node_controller:
            await self._core.until_schedulable(node.name)

    def delete_node(self, name: str) -> None:
        """The Node object is deleted; its kubelet is gone with it."""
        self._do(self._core.delete_node(name))

    def silence_node(self, name: str) -> None:
        """The node loses power: NotReady after the grace period, its pods stay Terminating when deleted."""
        self._do(self._core.silence_node(name))

    def wake_node(self, name: str) -> None:
        self._do(self._core.wake_node(name))

    def set_node_ready(self, name: str, is_ready: bool) -> None:
        """The kubelet reports Ready or NotReady at once, alive either way."""
        self._do(self._core.set_node_ready(name, is_ready))

    def fail_pod(self, namespace: str, name: str, *, exit_code: int = 137, reason: str = "Error") -> None:
        """Its containers end; the pod becomes Failed (`reason="Evicted"` for what node pressure does)."""
        self._replan(namespace, name, phase="Failed", exit_code=exit_code, reason=reason)

    def complete_pod(self, namespace: str, name: str) -> None:
        self._replan(namespace, name, phase="Succeeded", exit_code=0, reason="Completed")

    def set_pod_ready(self, namespace: str, name: str, is_ready: bool) -> None:
        """Its readiness probe starts to fail, or to pass again."""
        self._replan(namespace, name, is_ready=is_ready)

    def hang_deletion(self, namespace: str, name: str, hangs: bool = True) -> None:
        """Once deleted, the pod stays Terminating until this is called again with False."""
        self._replan(namespace, name, hangs_on_delete=hangs)

    def hold_pending(self, namespace: str, name: str, is_held: bool = True) -> None:
        """Bound, but its containers do not start (an image that does not come). May be asked before the pod exists."""
        self._replan(namespace, name, is_held_pending=is_held)

    def _replan(self, namespace: str, name: str, **changes: object) -> None:
        self._do(self._core.replan((namespace, name), **changes))


@contextlib.contextmanager
def kubelets(
    cluster: ControlPlane,
    nodes: Sequence[Node] = (),
    *,
    heartbeat_s: float = 2.0,
    pod_ip: Callable[[Object], str] | None = None,
) -> Iterator[KubeletControls]:
    """Simulate these nodes while the block lasts; the Node objects are deleted at its end.

    Args:
        heartbeat_s: at most a third of `Settings.node_monitor_grace_s`.
        pod_ip: the address that a pod gets; made up when not given.
    """

    @contextlib.asynccontextmanager
    async def live() -> AsyncIterator[KubeletControls]:
        async with Api(cluster.url, cluster.tokens[ADMIN], cluster.ca_file) as api:
            core = Kubelets(api, heartbeat_s=heartbeat_s, pod_ip=pod_ip)
            running = asyncio.create_task(core.run())
            try:
                has_controller = "kube-controller-manager" in cluster.processes
                controls = KubeletControls(core, asyncio.get_running_loop(), has_node_controller=has_controller)
                await asyncio.gather(*(controls.add(node) for node in nodes))
                yield controls
            finally:
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running
                for name in core.node_names:
                    with contextlib.suppress(ApiError, aiohttp.ClientError, TimeoutError):
                        await api.delete(f"/api/v1/nodes/{name}")

    with in_background(live, name="kubelets") as controls:
        yield controls
