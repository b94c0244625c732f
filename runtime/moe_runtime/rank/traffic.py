"""Bytes that dispatch and combine have sent, by how far they went."""

from collections import Counter
from collections.abc import Sequence

from moe_core.contract.membership import Membership


class Traffic:
    """Over all epochs of one rank. Scopes: self (stayed in this rank), host (the same machine), network."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._past: Counter[str] = Counter()
        self._scopes: tuple[str, ...] = ()
        self._sent_bytes: Sequence[int] = ()

    def follow(self, membership: Membership, sent_bytes: Sequence[int]) -> None:
        """From now on `sent_bytes` (by position of `membership`, growing) counts; what was followed before is kept."""
        self._past.update(self._now())
        place_of = {member.rank: member.place for member in membership.members}
        mine = place_of[self._rank]
        self._scopes = tuple(
            "self" if rank == self._rank else "host" if place == mine else "network" for rank, place in place_of.items()
        )
        self._sent_bytes = sent_bytes

    def by_scope(self) -> dict[str, int]:
        return dict(sorted((self._past + self._now()).items()))

    def _now(self) -> Counter[str]:
        now: Counter[str] = Counter()
        for scope, count in zip(self._scopes, self._sent_bytes, strict=True):
            now[scope] += count
        return now
