"""The coordinators of all owners, as this process talks to them: clients, their tokens, and when to stop listening."""

import base64
from collections.abc import Callable

from moe_core.contract.names import COORDINATOR_PORT, ROLE_COORDINATOR, TOKEN_KEY, child_name
from moe_core.facts import ObjectFact, Wish
from moe_operator.cluster.kubernetes import KubeApi
from moe_operator.cluster.kubernetes_cache import Cache
from moe_operator.cluster.kubernetes_paths import is_owned, path_of
from moe_operator.cluster.protocol import Key
from moe_operator.observe import Object
from moe_operator.runtime_client import RuntimeClient

CALM_S = 5.0


class Runtimes:
    """`url` is a template with {service}, {namespace} and {port}; `mark` is called when a coordinator has news."""

    def __init__(self, api: KubeApi, cache: Cache, *, url: str, mark: Callable[[Key], None]) -> None:
        self._api = api
        self._cache = cache
        self._url = url
        self._mark = mark
        self._clients: dict[str, RuntimeClient] = {}
        self._tokens: dict[str, str] = {}
        self._checked: set[str] = set()
        self._looked_at: set[str] = set()

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        self._clients.clear()

    def of(self, wish: Wish) -> RuntimeClient:
        """The client of this owner's coordinator, whether or not one exists."""
        if wish.uid not in self._clients:
            key = Key(wish.kind, wish.namespace, wish.name)
            service = child_name(wish.kind, wish.name, ROLE_COORDINATOR)
            url = self._url.format(service=service, namespace=wish.namespace, port=COORDINATOR_PORT)
            self._clients[wish.uid] = RuntimeClient(
                url, token=lambda: self._tokens.get(wish.uid), on_change=lambda: self._mark(key), calm_s=CALM_S
            )
        return self._clients[wish.uid]

    async def follow(self, wish: Wish) -> RuntimeClient | None:
        """Poll the coordinator as long as it has a pod that runs; None while it has none."""
        if wish.kind == "MoEDrill":
            return None
        is_first_look = wish.uid not in self._looked_at
        self._looked_at.add(wish.uid)
        pods = self._cache.pods(wish.uid)
        if not any(pod.role == ROLE_COORDINATOR and pod.phase == "Running" for pod in pods):
            if (idle := self._clients.pop(wish.uid, None)) is not None:
                await idle.close()
            return None
        await self.secret(wish)
        client = self.of(wish)
        client.start()
        if is_first_look and wish.status.get("epoch"):  # a group has formed before this process looked
            await client.first_answer()
        return client

    async def secret(self, wish: Wish) -> tuple[ObjectFact, ...]:
        """The token's Secret, read by name and seldom: watching Secrets would need a right to all of them."""
        if wish.kind == "MoEDrill":
            return ()
        name = child_name(wish.kind, wish.name, "token")
        if wish.uid not in self._checked:
            secret = await self._api.find(path_of("Secret", wish.namespace, name))
            if secret is None or not is_owned(secret, wish):
                self._tokens.pop(wish.uid, None)
                return ()
            self.learn_token(wish, secret)
        return (ObjectFact("Secret", name, ""),)

    def learn_token(self, wish: Wish, secret: Object) -> None:
        self._tokens[wish.uid] = base64.b64decode(secret["data"][TOKEN_KEY]).decode()
        self._checked.add(wish.uid)

    def distrust(self) -> None:
        """Read anew, when it is next asked for, what no watch tells about."""
        self._checked.clear()

    async def forget(self, uid: str) -> None:
        """This owner is gone."""
        self._tokens.pop(uid, None)
        self._checked.discard(uid)
        self._looked_at.discard(uid)
        if (client := self._clients.pop(uid, None)) is not None:
            await client.close()
