"""The Kubernetes API as plain JSON over aiohttp: what tests look at and what the node simulator speaks.

Not a client library: no models, no retries, a refusal is raised with the server's own words. A thousand pods decoded
into the client's model classes would keep a test machine busier than the control plane itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

Object = dict[str, Any]
MERGE, STRATEGIC, APPLY, JSON_PATCH = (
    f"application/{kind}"
    for kind in ("merge-patch+json", "strategic-merge-patch+json", "apply-patch+yaml", "json-patch+json")
)


class ApiError(Exception):
    """The API server refused. `status` is the HTTP code, `reason` such as `Conflict`, `message` its sentence."""

    def __init__(self, status: int, answer: Object) -> None:
        self.status = status
        self.reason = str(answer.get("reason", ""))
        self.message = str(answer.get("message", ""))
        super().__init__(f"{status} {self.reason}: {self.message}")


class Api:
    """An open connection pool to one API server as one user; use with `async with`.

    Paths are the API's own, such as `/api/v1/namespaces/default/pods`.
    """

    def __init__(self, url: str, token: str, ca_file: Path) -> None:
        self.url = url
        self._token = token
        self._tls = ssl.create_default_context(cafile=str(ca_file))
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._token}"},
            connector=aiohttp.TCPConnector(ssl=self._tls, limit=32),
            timeout=aiohttp.ClientTimeout(total=30),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            await asyncio.sleep(0.01)  # aborted connections give their sockets back at the next turns of the loop

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        """One request, its decoded answer.

        Raises:
            ApiError: the server answered with a refusal.
            aiohttp.ClientError, TimeoutError: it did not answer.
        """
        assert self._session is not None, "use the Api inside `async with`"
        data = None if body is None else json.dumps(body)
        async with self._session.request(
            method, self.url + path, data=data, params=params, headers={"Content-Type": content_type}
        ) as answer:
            text = await answer.text()
            decoded: Object = json.loads(text) if text.startswith("{") else {"message": text}
            if answer.status >= 400:
                raise ApiError(answer.status, decoded)
            return decoded

    async def get(self, path: str, **params: str) -> Object:
        return await self.request("GET", path, params=params)

    async def find(self, path: str) -> Object | None:
        """As `get`, but None where there is no such object."""
        try:
            return await self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def create(self, path: str, body: Object) -> Object:
        return await self.request("POST", path, body)

    async def patch(self, path: str, body: object, kind: str = MERGE, **params: str) -> Object:
        return await self.request("PATCH", path, body, content_type=kind, params=params)

    async def apply(self, path: str, body: Object, *, manager: str = "test") -> Object:
        """Server-side apply of the object at `path` (its own path, not its collection's)."""
        return await self.patch(path, body, APPLY, fieldManager=manager, force="true")

    async def delete(self, path: str, *, uid: str | None = None, grace_s: int | None = None) -> Object:
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        return await self.request("DELETE", path, options)

    async def follow(self, path: str, **params: str) -> AsyncIterator[tuple[str, Object]]:
        """Every object of a collection and each change to it, for ever: `ADDED`, `MODIFIED`, `DELETED`.

        Lists again after an expired watch or a lost server, and then also reports what vanished meanwhile.
        """
        known: dict[str, Object] = {}
        while True:
            try:
                listing = await self.get(path, **params)
                now = {item["metadata"]["uid"]: item for item in listing["items"]}
                for uid in known.keys() - now.keys():
                    yield "DELETED", known[uid]
                for item in now.values():
                    yield "ADDED", item
                known = now
                async for kind, item in self._watch(path, listing["metadata"]["resourceVersion"], params):
                    if kind == "DELETED":
                        known.pop(item["metadata"]["uid"], None)
                    else:
                        known[item["metadata"]["uid"]] = item
                    yield kind, item
            except (aiohttp.ClientError, TimeoutError, ApiError):
                await asyncio.sleep(0.2)  # restarting or overloaded: nothing better to do than ask again

    async def _watch(self, path: str, version: str, params: Mapping[str, str]) -> AsyncIterator[tuple[str, Object]]:
        assert self._session is not None, "use the Api inside `async with`"
        query = {**params, "watch": "true", "resourceVersion": version, "timeoutSeconds": "300"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with self._session.get(self.url + path, params=query, timeout=timeout) as answer:
            if answer.status >= 400:
                raise ApiError(answer.status, {"message": await answer.text()})
            rest = b""
            with cut_off(answer):
                async for chunk in answer.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in filter(None, lines):
                        event = json.loads(line)
                        if event["type"] == "ERROR":  # usually 410 Gone: the version is too old, list again
                            return
                        yield event["type"], event["object"]


@contextlib.contextmanager
def cut_off(answer: aiohttp.ClientResponse) -> Iterator[None]:
    """Cut an endless answer's connection when the block is left.

    A polite TLS goodbye needs an answer of its own, from a server that may be stopped or dead.
    """
    try:
        yield
    finally:
        if answer.connection is not None and answer.connection.transport is not None:
            answer.connection.transport.abort()
