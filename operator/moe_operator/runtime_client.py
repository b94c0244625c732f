"""The operator's side of the coordinator's HTTP face, one per owner, the same for both shells.

A long poll keeps `state` fresh and calls `on_change`; while the coordinator is away `state` is None.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable

import aiohttp

from moe_core.contract.exchange import FaultRequest, RuntimeState, RuntimeWish, TrainingProgress
from moe_core.outcome import InvalidInput
from moe_operator.cluster.protocol import ClusterError, Conflict, Refused, Unavailable

logger = logging.getLogger(__name__)

POLL_S = 5.0
POLL_GRACE_S = 3.0  # a coordinator that hangs is away after both together
AWAY_AFTER_S = 3.0
FIRST_ANSWER_S = 15.0
RETRY_S = 0.3


class RuntimeClient:
    """Talks to the coordinator at `url` (http://host:port). `token` is asked for anew at each connection attempt.

    `on_change` is called at once when something may have to be done, and every `calm_s` seconds at most where only
    counters have moved: ranks report several times a second, and each call leads to a status that is written.
    """

    def __init__(
        self, url: str, *, token: Callable[[], str | None], on_change: Callable[[], None], calm_s: float = 1.0
    ) -> None:
        self._url = url
        self._token = token
        self._on_change = on_change
        self._calm_s = calm_s
        self._is_closed = False
        self._told_at = -float("inf")
        self._telling: asyncio.TimerHandle | None = None
        self._state: RuntimeState | None = None
        self._put_generation: int | None = None
        self._session: aiohttp.ClientSession | None = None
        self._poll: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()

    @property
    def state(self) -> RuntimeState | None:
        return self._state

    @property
    def put_generation(self) -> int | None:
        return self._put_generation

    def start(self) -> None:
        if self._poll is None and not self._is_closed:
            self._poll = asyncio.create_task(self._follow(), name=f"poll {self._url}")
            self._poll.add_done_callback(self._ended)

    def _ended(self, poll: asyncio.Task[None]) -> None:
        """Told and begun again: a state that nobody refreshes would be believed for ever."""
        if poll.cancelled() or (error := poll.exception()) is None:
            return
        logger.error("coordinator %s: polling failed", self._url, exc_info=error)
        self._state, self._put_generation, self._poll = None, None, None
        self._tell()
        asyncio.get_running_loop().call_later(AWAY_AFTER_S, self.start)

    async def first_answer(self) -> None:
        """Wait for it, for a while: a new operator must not take "not asked yet" for "away" and say so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_ANSWER_S):
                await self._answered.wait()

    async def close(self) -> None:
        self._is_closed = True
        if self._telling is not None:
            self._telling.cancel()
        if self._poll is not None:
            self._poll.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poll
            self._poll = None
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def put_wish(self, wish: RuntimeWish) -> None:
        await self._send("PUT", "/v1/wish", wish.canonical())
        self._put_generation = wish.generation  # until the next state says what the coordinator itself knows

    async def inject(self, fault: FaultRequest) -> None:
        await self._send("POST", "/v1/faults", fault.canonical())

    def _headers(self) -> dict[str, str]:
        token = self._token()
        if token is None:
            raise Unavailable(f"coordinator {self._url}: its token does not exist yet")
        return {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session

    async def _send(self, method: str, path: str, body: str) -> None:
        try:
            async with self._open().request(
                method, self._url + path, data=body, headers=self._headers(), timeout=aiohttp.ClientTimeout(total=10)
            ) as answer:
                if answer.status >= 400:
                    raise _error(f"coordinator {self._url}{path}", answer.status, await answer.text())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"coordinator {self._url}{path}: {error!r}") from error

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        version, failing_since = 0, None
        while True:
            try:
                state = await self._poll_once(version)
            except (aiohttp.ClientError, TimeoutError, Unavailable, InvalidInput) as error:
                version = 0  # whoever answers next may count from the start, and shall not wait for our number
                failing_since = failing_since or loop.time()
                hangs = isinstance(error, TimeoutError)  # it was waited for already
                if self._state is not None and (hangs or loop.time() - failing_since > AWAY_AFTER_S):
                    logger.warning("coordinator %s is away: %r", self._url, error)
                    self._state, self._put_generation = None, None
                    self._tell()
                await asyncio.sleep(RETRY_S)
                continue
            version, failing_since = state.version, None
            self._answered.set()
            if state != self._state:
                is_pressing = self._state is None or _pressing(state) != _pressing(self._state)
                self._state, self._put_generation = state, state.wish_put
                self._tell() if is_pressing else self._tell_in_time()

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._told_at = asyncio.get_running_loop().time()
        self._on_change()

    def _tell_in_time(self) -> None:
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_at(self._told_at + self._calm_s, self._tell)

    async def _poll_once(self, version: int) -> RuntimeState:
        url = f"{self._url}/v1/state?after={version}&wait_s={POLL_S:g}"
        timeout = aiohttp.ClientTimeout(total=POLL_S + POLL_GRACE_S, connect=3)
        async with self._open().get(url, headers=self._headers(), timeout=timeout) as answer:
            if answer.status != 200:
                raise Unavailable(f"{answer.status} {await answer.text()}")
            return RuntimeState.parse(await answer.read())


def _pressing(state: RuntimeState) -> RuntimeState:
    """The state without what only counts up."""
    ranks = tuple(rank.model_copy(update={"tokens": 0, "memory_bytes": 0}) for rank in state.ranks)
    training = None if state.training is None else TrainingProgress(step=0, done=state.training.done)
    return state.model_copy(update={"version": 0, "load": (), "serving": None, "training": training, "ranks": ranks})


def _error(where: str, status: int, text: str) -> ClusterError:
    try:
        said = str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        said = text[:200]
    message = f"{where}: {status} {said}"
    if status == 409:
        return Conflict(message)
    if status in (408, 429) or status >= 500:
        return Unavailable(message)
    return Refused(message, code=status, said=said)
