"""Keeps a gateway's directory of ranks true: from the coordinator while it answers, and from the ranks in any case."""

import asyncio
import contextlib
from typing import Protocol

import aiohttp

from moe_core.contract.membership import Membership
from moe_core.outcome import InvalidInput
from moe_runtime.gateway.face import GatewayFace
from moe_runtime.gateway.ranks import RankDirectory
from moe_runtime.gateway.replay import RankForgot, RankUnreachable
from moe_runtime.host.pod_env import PodEnv
from moe_runtime.registration import GatewayReport, MembersView

_REPORT_EVERY_S = 0.5
_ASK_RANKS_EVERY_S = 1.0
_CALL_S = 3.0


class RankViews(Protocol):
    """What a rank says of its membership."""

    async def view(self, pod_uid: str) -> Membership | None:
        """None while the rank is in no epoch. Raises RankUnreachable, RankForgot."""

    def forget(self, living: set[str]) -> None:
        """Nobody else will be asked for."""


class Scout:
    """Two loops over one directory; `face` has the counts that the coordinator is told."""

    def __init__(self, env: PodEnv, directory: RankDirectory, ranks: RankViews, face: GatewayFace) -> None:
        self._env = env
        self._directory = directory
        self._ranks = ranks
        self._face = face
        self._turn = 0

    async def follow_coordinator(self) -> None:
        """Report this gateway's counts, get the members in return."""
        headers = {"Authorization": f"Bearer {self._env.token}"}
        timeout = aiohttp.ClientTimeout(total=_CALL_S)
        url = f"{self._env.coordinator_url}/v1/gateways"
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            while True:
                counts = self._face.counts
                report = GatewayReport(
                    pod_uid=self._env.pod_uid,
                    requests_ok=counts.ok,
                    requests_failed=counts.failed,
                    requests_replayed=counts.replayed,
                    tokens_out=counts.tokens_out,
                )
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, InvalidInput):
                    async with session.post(url, data=report.canonical()) as response:
                        if response.status == 200:
                            self.take(MembersView.parse(await response.read()))
                await asyncio.sleep(_REPORT_EVERY_S)

    def take(self, view: MembersView) -> None:
        """The coordinator's word. One that has just started knows nobody yet: no members is no news."""
        active = [(rank.rank, rank.pod_uid) for rank in view.ranks if rank.phase == "Active"]
        if active and self._directory.tell(view.epoch, active):
            self._directory.covered, self._directory.total = view.covered, view.total

    async def ask_ranks(self) -> None:
        """Any rank knows the committed membership: one is asked in turn, a dead or hung one is found out on the way."""
        while True:
            await asyncio.sleep(_ASK_RANKS_EVERY_S)
            await self.ask_next()

    async def ask_next(self) -> None:
        uids = self._directory.active_uids()
        if not uids:
            return
        self._turn += 1
        uid = uids[self._turn % len(uids)]
        try:
            membership = await self._ranks.view(uid)
        except RankUnreachable as error:
            self._directory.suspect(uid, is_gone=error.is_gone)
            return
        except RankForgot:
            return
        if membership is None:  # it lives, in no epoch: it would take no request, and confirms none
            self._directory.suspect(uid)
        elif membership.epoch == self._directory.epoch or self._directory.tell(
            membership.epoch, [(m.rank, m.pod_uid) for m in membership.members]
        ):
            self._directory.clear(uid)
        self._ranks.forget(set(self._directory.known_uids()))
