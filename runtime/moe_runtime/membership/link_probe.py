"""How fast this rank reaches the others: measured between two steps, pair by pair, all pairs of a round side by side.

A tournament: in each round every rank has one partner, and after size - 1 rounds everybody has met everybody. Of a
larger group rounds are left out evenly. Partners send each other a few bytes there and back, then messages that grow
until one takes long enough to be timed. A rank that has spent its budget sends no more large ones, so that slow links
cost little; a partner that does not answer within a step's deadline is a fault like any other.
"""

import time
from collections.abc import Callable, Mapping

import torch

from moe_core.contract.base import three_digits
from moe_core.contract.links import LinkSpeed
from moe_runtime.membership.group import EpochGroup

BUDGET_S = 1.0
"""Of one rank for large messages; a message of a slow link may exceed it once."""
MOST_ROUNDS = 32
_MEET_MS = 5000
"""Until a partner is there: it may be in an earlier round still. One large message of a slow link and a step's
deadline."""
_PINGS = 4
_FIRST_BYTES, _MOST_BYTES, _GROWTH = 1 << 16, 1 << 22, 8
_LONG_ENOUGH_S = 2e-3


def rounds_of(size: int, *, most: int = MOST_ROUNDS) -> list[list[int]]:
    """[round][position] partner, the position itself for none. Every pair meets once, unless rounds are left out.

    >>> rounds_of(3)
    [[0, 2, 1], [1, 0, 2], [2, 1, 0]]
    """
    places = size + size % 2
    rounds = []
    for turn in range(places - 1):
        partner = list(range(places))
        last = turn * (places // 2) % (places - 1)  # plays against the fixed one
        partner[places - 1], partner[last] = last, places - 1
        for i in range(1, places // 2):
            one, other = (last + i) % (places - 1), (last - i) % (places - 1)
            partner[one], partner[other] = other, one
        rounds.append([p if p < size else i for i, p in enumerate(partner[:size])])
    if len(rounds) <= most:
        return rounds
    return [rounds[i * len(rounds) // most] for i in range(most)]


def probe_links(group: EpochGroup, *, clock: Callable[[], float] = time.perf_counter) -> Mapping[int, LinkSpeed]:
    """Rank -> how fast this rank reaches it, itself included. All members call it at one boundary.

    Raises GroupFault.
    """
    found = {group.ranks[group.position]: _own_speed(group, clock)}
    began = clock()
    for partners in rounds_of(group.size):
        partner = partners[group.position]
        if partner == group.position:
            continue
        # the lower one measures first
        for is_mine in (True, False) if group.position < partner else (False, True):
            if is_mine:
                found[group.ranks[partner]] = _measure(group, partner, clock, may_grow=clock() - began < BUDGET_S)
            else:
                _answer(group, partner)
    return found


def _measure(group: EpochGroup, partner: int, clock: Callable[[], float], *, may_grow: bool) -> LinkSpeed:
    header, echo = (torch.zeros(1, dtype=torch.int64, device=group.device) for _ in range(2))

    def sent(num_bytes: int) -> float:
        """Seconds until the partner has it and says so."""
        payload = torch.zeros(num_bytes, dtype=torch.uint8, device=group.device)
        header.fill_(num_bytes)
        group.send(header, partner)
        began = clock()
        group.send(payload, partner)
        group.receive(echo, partner)
        return clock() - began

    there_and_back_s = min(sent(1) for _ in range(_PINGS))
    num_bytes, seconds = _FIRST_BYTES, sent(_FIRST_BYTES)
    while may_grow and seconds < _LONG_ENOUGH_S and num_bytes < _MOST_BYTES:
        num_bytes *= _GROWTH
        seconds = sent(num_bytes)
    header.zero_()
    group.send(header, partner)
    # the echo is on its way for half of a ping; a clock that cannot tell them apart knows of no more than this
    alone_s = max(seconds - there_and_back_s / 2, seconds / 2, 1e-9)
    return LinkSpeed(latency_us=three_digits(there_and_back_s / 2 * 1e6), bytes_per_s=three_digits(num_bytes / alone_s))


def _answer(group: EpochGroup, partner: int) -> None:
    header = torch.zeros(1, dtype=torch.int64, device=group.device)
    while True:
        group.receive(header, partner, timeout_ms=_MEET_MS)
        num_bytes = int(header)
        if not num_bytes:
            return
        payload = torch.empty(num_bytes, dtype=torch.uint8, device=group.device)
        group.receive(payload, partner)
        group.send(header, partner)


def _own_speed(group: EpochGroup, clock: Callable[[], float]) -> LinkSpeed:
    """What stays on a rank is copied."""
    source = torch.zeros(_MOST_BYTES, dtype=torch.uint8, device=group.device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(_PINGS):
        began = clock()
        target.copy_(source)
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)  # device sync: the copy is what is timed
        seconds.append(clock() - began)
    return LinkSpeed(latency_us=0.0, bytes_per_s=three_digits(_MOST_BYTES / max(min(seconds), 1e-9)))
