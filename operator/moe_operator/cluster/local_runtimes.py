"""The coordinators of all owners of a local shell, as this process talks to them: their ports, tokens and clients."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from moe_core.contract.names import TOKEN_KEY
from moe_operator.cluster.local_machine import Ports
from moe_operator.cluster.local_store import Manifest, ObjectStore
from moe_operator.runtime_client import RuntimeClient


class Runtimes:
    """By the owner's uid; `mark` is called with the owner when its coordinator has news."""

    def __init__(self, store: ObjectStore, ports: Ports, *, mark: Callable[[Manifest], None]) -> None:
        self._store = store
        self._ports = ports
        self._mark = mark
        self._ports_of: dict[str, dict[str, int]] = {}
        self._clients: dict[str, RuntimeClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def ports_of(self, owner: Manifest) -> dict[str, int]:
        """Loopback ports by use: coordinator, ray and, of a service, gateway; the same for good."""
        uid = owner["metadata"]["uid"]
        if uid not in self._ports_of:
            wanted = owner["spec"].get("gateway", {}).get("port") if owner["kind"] == "MoEService" else None
            ports = {use: self._ports.take() for use in ("coordinator", "ray")}
            if owner["kind"] == "MoEService":
                ports["gateway"] = self._ports.take(wanted if isinstance(wanted, int) else None)
            self._ports_of[uid] = ports
        return self._ports_of[uid]

    def of(self, uid: str) -> RuntimeClient | None:
        """None before the owner has had a pod."""
        return self._clients.get(uid)

    def follow(self, owner: Manifest) -> None:
        """Listen to the owner's coordinator from now on, whether or not it is there yet."""
        uid = owner["metadata"]["uid"]
        if uid in self._clients:
            return
        self._clients[uid] = RuntimeClient(
            f"http://127.0.0.1:{self.ports_of(owner)['coordinator']}",
            token=lambda: self._token(uid),
            on_change=lambda: self._mark(owner),
        )
        self._clients[uid].start()

    def forget(self, uid: str) -> None:
        client = self._clients.pop(uid, None)
        if client is not None:
            task = asyncio.create_task(client.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def ends(self) -> list[Awaitable[Any]]:
        """What has to be awaited when the shell closes; nobody is listened to after that."""
        for uid in list(self._clients):
            self.forget(uid)
        return list(self._closing)

    def _token(self, uid: str) -> str | None:
        for child in self._store.children(uid):
            if child["kind"] == "Secret":
                return str(child["stringData"][TOKEN_KEY])
        return None
