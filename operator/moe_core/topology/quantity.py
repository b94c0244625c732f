"""Kubernetes quantities in base units: cpu in millicores, everything else in bytes or counts.

A request is rounded up and an offer down, so that rounding can never make room that is not there.
"""

import re
from collections.abc import Mapping
from fractions import Fraction

from moe_core.outcome import InvalidInput

_SUFFIXES = {
    **{suffix: Fraction(10) ** (3 * power) for power, suffix in enumerate(("n", "u", "m", "", "k", *"MGTPE"), -3)},
    **{f"{suffix}i": Fraction(2) ** (10 * power) for power, suffix in enumerate("KMGTPE", 1)},
}
_QUANTITY = re.compile(r"(?P<number>[-+]?(\d+\.?\d*|\.\d+))(?P<scale>[eE][-+]?\d{1,2}|[numkMGTPE]|[KMGTPE]i)?")


def base_units(resource: str, quantity: object, *, round_up: bool = True) -> int:
    """One quantity, text or number, in base units. Raises InvalidInput naming the resource and the text.

    >>> base_units("cpu", "500m"), base_units("memory", "1Gi"), base_units("nvidia.com/gpu", "8")
    (500, 1073741824, 8)
    """
    match = _QUANTITY.fullmatch(str(quantity))
    if match is None:
        raise InvalidInput(f"{resource} must be a Kubernetes quantity, got {quantity!r}")
    scale = match["scale"] or ""
    value = Fraction(match["number"]) * _SUFFIXES[scale] if scale in _SUFFIXES else Fraction(match["number"] + scale)
    value *= 1000 if resource == "cpu" else 1
    whole = value.numerator // value.denominator
    return whole + 1 if round_up and whole != value else whole


def request_of(requests: Mapping[str, str], limits: Mapping[str, str]) -> dict[str, int]:
    """What the scheduler counts for one pod: requests, and limits where no request is given. Sorted, without zeros."""
    merged = {**limits, **requests}
    in_units = {resource: base_units(resource, merged[resource]) for resource in sorted(merged)}
    return {resource: amount for resource, amount in in_units.items() if amount}


def listed(request: Mapping[str, int]) -> str:
    """A request in base units as people write it.

    >>> listed({"cpu": 1500, "memory": 768 << 20, "nvidia.com/gpu": 1024})
    'cpu 1500m, memory 768Mi, nvidia.com/gpu 1024'
    """
    return ", ".join(f"{resource} {_written(resource, amount)}" for resource, amount in sorted(request.items()))


def _written(resource: str, amount: int) -> str:
    if resource == "cpu":
        return f"{amount}m" if amount % 1000 else str(amount // 1000)
    in_bytes = resource in {"memory", "ephemeral-storage"} or resource.startswith("hugepages-")
    powers = [power for power in range(4, 0, -1) if in_bytes and amount and amount % (1 << 10 * power) == 0]
    return f"{amount >> 10 * powers[0]}{' KMGT'[powers[0]]}i" if powers else str(amount)
