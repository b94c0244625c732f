"""The door of a running local shell for other commands of the same user: a socket in its private run folder.

POST   /v1/apply                            a file's text -> 200 names applied; 422 with its problems
DELETE /v1/objects/{kind}/{namespace}/{name}               -> 200; 404 when there is none

Looking needs no door: objects are mirrored as files.
"""

import http.client
import json
import socket
from pathlib import Path

from aiohttp import web

from moe_core.facts import Kind
from moe_core.outcome import InvalidSpec, MoeratorError
from moe_core.spec.load import read_documents
from moe_operator.cluster.local import RESOURCE_KINDS, LocalCluster
from moe_operator.cluster.local_runs import FACE_SOCKET
from moe_operator.cluster.protocol import Key

KIND_OF: dict[str, Kind] = {kind: kind for kind in RESOURCE_KINDS}


class LocalFace:
    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=16 * 2**20)
        app.router.add_post("/v1/apply", self._apply)
        app.router.add_delete("/v1/objects/{kind}/{namespace}/{name}", self._delete)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._cluster.folder / FACE_SOCKET)).start()

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _apply(self, request: web.Request) -> web.Response:
        try:
            documents = read_documents(await request.text())
            return web.json_response([str(self._cluster.apply(document.raw)) for document in documents])
        except InvalidSpec as invalid:
            return web.json_response([str(problem) for problem in invalid.problems], status=422)

    async def _delete(self, request: web.Request) -> web.Response:
        kind = KIND_OF.get(request.match_info["kind"])
        if kind is None:
            return web.json_response(f"no such kind: {request.match_info['kind']}", status=404)
        key = Key(kind, request.match_info["namespace"], request.match_info["name"])
        if not self._cluster.delete(key):
            return web.json_response(f"{key} does not exist", status=404)
        return web.json_response(str(key))


class FaceRefused(MoeratorError):
    """The running shell said no; the text is its answer."""


def ask(run: Path, method: str, path: str, body: str = "") -> list[str] | str:
    """One request to the shell of `run`. Raises FaceRefused with what it said, or why it cannot be reached."""
    connection = http.client.HTTPConnection("localhost", timeout=30)
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(run / FACE_SOCKET))
        connection.request(method, path, body=body.encode())
        answer = connection.getresponse()
        said: list[str] | str = json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FaceRefused(f"the run in {run} does not answer: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise FaceRefused(said if isinstance(said, str) else "\n".join(said))
    return said
