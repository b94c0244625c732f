"""What ranks and gateways have counted, those that are gone included: nothing counted falls because a process went.

A new coordinator knows the counts of those that report to it, and no others.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from moe_core.contract.exchange import ServingProgress
from moe_runtime.metrics import RankCounts
from moe_runtime.registration import GatewayReport, RankReport


class Tally:
    """Sums of counters by name. A process whose count falls has been started anew: what it had before stays counted.

    >>> tally = Tally()
    >>> for ok in (5, 7, 1):
    ...     tally.note("g", {"ok": ok})
    >>> tally.total()
    {'ok': 8}
    """

    def __init__(self) -> None:
        self._past: dict[str, int] = {}
        self._newest: dict[str, Mapping[str, int]] = {}

    def note(self, process: str, counts: Mapping[str, int]) -> None:
        before = self._newest.get(process, {})
        if any(counts.get(name, 0) < count for name, count in before.items()):
            _add(self._past, before)
        self._newest[process] = dict(counts)

    def total(self) -> dict[str, int]:
        total = dict(self._past)
        for counts in self._newest.values():
            _add(total, counts)
        return total


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


class Counts:
    """Of one group, by pod uid."""

    def __init__(self) -> None:
        self._degraded = Tally()
        self._tokens = Tally()
        self._gateways = Tally()
        self._dispatch_bytes = Tally()
        self._moves = Tally()
        self._step_us = Tally()
        self._waited_us = Tally()
        self._past_load_LE: npt.NDArray[np.int64] | None = None
        self._load_of: dict[str, npt.NDArray[np.int64]] = {}

    def note_rank(self, report: RankReport) -> None:
        """A report without a load says that there is none newer than the last."""
        uid, rank = report.member.pod_uid, str(report.member.rank)
        self._degraded.note(uid, report.degraded_tokens)
        self._tokens.note(f"{rank} {uid}", {rank: report.tokens})
        self._dispatch_bytes.note(uid, report.dispatch_bytes)
        self._moves.note(uid, {"bytes": report.moved_bytes, "mismatches": report.digest_mismatches})
        time = report.step_time
        parts = {"compute": time.compute_us, "exchange": time.exchange_us, "wait": time.wait_us}
        self._step_us.note(uid, parts)
        self._waited_us.note(uid, {str(rank): waited for rank, waited in time.waited_us.items()})
        if report.load:
            self._load_of[uid] = np.array(report.load, dtype=np.int64)

    def note_gateway(self, report: GatewayReport) -> None:
        self._gateways.note(
            report.pod_uid,
            {
                "requests_ok": report.requests_ok,
                "requests_failed": report.requests_failed,
                "requests_replayed": report.requests_replayed,
                "tokens_out": report.tokens_out,
            },
        )

    def forget_load(self, pod_uid: str) -> None:
        gone_LE = self._load_of.pop(pod_uid, None)
        if gone_LE is not None:
            past_LE = self._past_load_LE
            is_same_model = past_LE is not None and past_LE.shape == gone_LE.shape
            self._past_load_LE = past_LE + gone_LE if past_LE is not None and is_same_model else gone_LE

    def serving(self) -> ServingProgress:
        return ServingProgress(**self._gateways.total(), degraded_tokens=self._degraded.total())

    def tokens_of_rank(self) -> dict[int, int]:
        """Over all pods that a rank ever had."""
        return {int(rank): tokens for rank, tokens in sorted(self._tokens.total().items(), key=lambda r: int(r[0]))}

    def of_ranks(self) -> RankCounts:
        """Over all pods that ranks ever had."""
        moves = self._moves.total()
        ever = [load_LE for load_LE in (self._past_load_LE, *self._load_of.values()) if load_LE is not None]
        is_one_model = bool(ever) and all(load_LE.shape == ever[0].shape for load_LE in ever)
        return RankCounts(
            tokens_of_rank=self.tokens_of_rank(),
            dispatch_bytes=self._dispatch_bytes.total(),
            moved_bytes=moves.get("bytes", 0),
            digest_mismatches=moves.get("mismatches", 0),
            step_us=self._step_us.total(),
            waited_us={int(rank): waited for rank, waited in self._waited_us.total().items()},
            expert_tokens_LE=np.sum(ever, axis=0).tolist() if is_one_model else [],
        )
