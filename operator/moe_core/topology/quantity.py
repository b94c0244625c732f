"""Kubernetes quantities in base units: cpu in millicores, everything else in bytes or counts.

A request is rounded up and an offer down, so that rounding can never make room that is not there.
"""

from collections.abc import Mapping
from fractions import Fraction

from moe_core.outcome import InvalidInput

_SUFFIXES = {
    "": Fraction(1),
    "m": Fraction(1, 1000),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "T": Fraction(10**12),
    "Ki": Fraction(2**10),
    "Mi": Fraction(2**20),
    "Gi": Fraction(2**30),
    "Ti": Fraction(2**40),
    "Pi": Fraction(2**50),
}


def base_units(resource: str, quantity: str, *, round_up: bool = True) -> int:
    """One quantity in base units. Raises InvalidInput naming the resource and the text.

    >>> base_units("cpu", "500m"), base_units("memory", "1Gi"), base_units("nvidia.com/gpu", "8")
    (500, 1073741824, 8)
    """
    number = quantity.rstrip("mkKMGTPi")
    suffix = quantity[len(number) :]
    try:
        value = Fraction(number) * _SUFFIXES[suffix] * (1000 if resource == "cpu" else 1)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise InvalidInput(f"{resource} must be a Kubernetes quantity, got {quantity!r}") from error
    whole = value.numerator // value.denominator
    return whole + 1 if round_up and whole != value else whole


def request_of(requests: Mapping[str, str], limits: Mapping[str, str]) -> dict[str, int]:
    """What the scheduler counts for one pod: requests, and limits where no request is given. Sorted, without zeros."""
    merged = {**limits, **requests}
    in_units = {resource: base_units(resource, merged[resource]) for resource in sorted(merged)}
    return {resource: amount for resource, amount in in_units.items() if amount}
