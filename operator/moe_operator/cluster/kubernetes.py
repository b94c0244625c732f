"""The API server over `kubernetes.aio`, spoken in plain JSON: the only module that imports the client.

No models: objects stay mappings, parsed once where they enter (observe.py). Every request has a time-out, every refusal
becomes one of the errors of protocol.py, and every change passes the fence at the last moment before it is sent.
"""

import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from moe_operator.cluster.protocol import ClusterError, Conflict, Refused, Unavailable
from moe_operator.errors import NoCluster

logger = logging.getLogger(__name__)

Object = dict[str, Any]

JSON = "application/json"
APPLY_PATCH = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"

USER_AGENT = "moerator"


class NotFound(Conflict):
    """There is no such object (404): for a change, a conflict with what was seen."""


class NotLeader(Unavailable):
    """This process may not change anything now; nothing was sent."""


async def load_configuration() -> client.Configuration:
    """$KUBECONFIG if set, else the pod's service account, else ~/.kube/config.

    Raises:
        NoCluster: none of them is there or readable.
    """
    configuration = client.Configuration()
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ
    try:
        if in_pod:
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(client_configuration=configuration, persist_config=False)
    except (config.ConfigException, OSError) as error:
        raise NoCluster(f"cannot connect to Kubernetes: {error}; set KUBECONFIG or run in a pod") from error
    return configuration


class KubeApi:
    """One API server as one user.

    `remaining_s` is asked right before each change: for how long this process may still send changes, 0 for not at all.
    Paths are the API's own, such as `/api/v1/namespaces/default/pods`.
    """

    def __init__(
        self,
        configuration: client.Configuration,
        *,
        request_timeout_s: float,
        remaining_s: Callable[[], float] = lambda: float("inf"),
    ) -> None:
        configuration.retries = None  # a retry of the client's own would go around the fence
        self._configuration = configuration
        self._client = client.ApiClient(configuration)
        self._timeout_s = request_timeout_s
        self._remaining_s = remaining_s

    @property
    def url(self) -> str:
        return str(self._configuration.host)

    async def close(self) -> None:
        await self._client.close()

    async def open_session(self, trace: aiohttp.TraceConfig) -> aiohttp.ClientSession:
        """A session with the same credentials for kopf's watches, as they are now: kopf asks again after a 401."""
        headers = {"User-Agent": USER_AGENT}
        token = await self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        if token:
            headers["Authorization"] = token if " " in token else f"Bearer {token}"
        elif self._configuration.username:
            headers["Authorization"] = self._configuration.get_basic_auth_token()
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._client.rest_client.ssl_context),
            headers=headers,
            trace_configs=[trace],
            trust_env=True,
            read_bufsize=2**21,
        )

    async def get(self, path: str, *, accept: str = JSON, **params: str) -> Object:
        return await self._request("GET", path, params=params, accept=accept)

    async def find(self, path: str) -> Object | None:
        """As `get`, None where there is no such object."""
        try:
            return await self.get(path)
        except NotFound:
            return None

    async def watch(
        self, session: aiohttp.ClientSession, path: str, *, timeout_s: int, **params: str
    ) -> AsyncIterator[Object]:
        """Events of one watch, bookmarks among them, until the server ends it after `timeout_s`."""
        query = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_s), **params}
        limits = aiohttp.ClientTimeout(total=timeout_s + 10, sock_connect=self._timeout_s)
        async with session.get(self.url + path, params=query, timeout=limits) as answer:
            if answer.status >= 400:
                raise _error("WATCH", path, answer.status, answer.headers, await answer.read())
            async for line in answer.content:
                yield json.loads(line)

    async def create(self, path: str, body: Mapping[str, Any], *, fenced: bool = True, **params: str) -> Object:
        return await self._request("POST", path, body, params=params, fenced=fenced)

    async def replace(self, path: str, body: Mapping[str, Any], *, fenced: bool = True) -> Object:
        return await self._request("PUT", path, body, fenced=fenced)

    async def patch(self, path: str, body: object, content_type: str, **params: str) -> Object:
        return await self._request("PATCH", path, body, params=params, content_type=content_type)

    async def delete(self, path: str, options: Mapping[str, Any]) -> Object:
        return await self._request("DELETE", path, options)

    async def _request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        params: Mapping[str, str] | None = None,
        content_type: str = JSON,
        accept: str = JSON,
        fenced: bool = True,
    ) -> Object:
        query = dict(params or {})
        if method != "GET":
            query["timeout"] = f"{max(1, int(self._timeout_s))}s"  # the server gives up too, not only we
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": USER_AGENT}
        try:
            request = await self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            timeout_s = self._timeout_s
            if method != "GET" and fenced:
                timeout_s = min(timeout_s, self._remaining_s())
                if timeout_s <= 0:
                    raise NotLeader(f"{method} {path}: not sent, the lease is not held")
            answer = await self._client.call_api(*request, _request_timeout=aiohttp.ClientTimeout(total=timeout_s))
            text = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"{method} {path}: {error!r}") from error
        if answer.status >= 400:
            raise _error(method, path, answer.status, answer.headers, text)
        decoded: Object = json.loads(text)
        return decoded


def _error(method: str, path: str, status: int, headers: Mapping[str, str], text: bytes) -> ClusterError:
    try:
        said = str(json.loads(text).get("message", ""))
    except (ValueError, AttributeError):
        said = text[:200].decode(errors="replace")
    message = f"{method} {path}: {status} {said}"
    if status == 404:
        return NotFound(message)
    if status in (409, 410):
        return Conflict(message)
    if status in (401, 408, 429) or status >= 500:
        return Unavailable(message, retry_after=_seconds(headers.get("Retry-After")))
    return Refused(message, code=status, said=said)


def _seconds(retry_after: str | None) -> float | None:
    """The header as a number of seconds; its other form, a date, is not used by API servers."""
    try:
        return max(float(retry_after), 0.0) if retry_after else None
    except ValueError:
        return None
