"""The yardstick: an interpolated order-2 byte model counted on the training text.

Each order subtracts a discount from every count it has seen and gives what it saved to the order below:

    p2(c|ab) = max(n(abc) - D2, 0) / n(ab.) + D2 * kinds(ab.) / n(ab.) * p1(c|b)

down to unigram counts with one pseudo-count per byte (interpolated absolute discounting: Ney, Essen, Kneser 1994). The
discounts are chosen on a tenth of the training text, then all of it is counted; held-out text takes no part. With
millions of bytes for 65,536 contexts the choice moves the result by about a thousandth of a bit.
"""

from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np
import numpy.typing as npt

from moe_runtime.train.data import Bytes_N

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
V = 256
DISCOUNTS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
_TUNING_BLOCK = 4096
"""Bytes per block when a tenth of the training text is set aside to choose the discounts."""


@dataclass(frozen=True)
class Order2Model:
    """Probabilities of a byte after two bytes. Counts: n3 [256*256*256], the lower orders are their margins."""

    count_abc: Ints
    count_bc: Ints
    count_c: npt.NDArray[np.int64]
    discount2: float
    discount1: float

    @classmethod
    def counted(cls, text_N: Bytes_N, *, discount2: float, discount1: float) -> Self:
        a, b, c = _triples(text_N)
        count_abc = np.bincount((a * V + b) * V + c, minlength=V**3)
        count_bc = np.bincount(b * V + c, minlength=V**2)
        return cls(count_abc, count_bc, np.bincount(c, minlength=V), discount2, discount1)

    @classmethod
    def fitted(cls, training_N: Bytes_N) -> Self:
        """Count `training_N`, with the discounts that are best for a tenth of it after counting the other nine."""
        blocks = np.arange(len(training_N)) // _TUNING_BLOCK
        aside = blocks % 10 == 9
        discounts = (0.5, 0.5)
        if aside.any():
            rest = cls.counted(training_N[~aside], discount2=0.5, discount1=0.5)
            a, b, c, times = _distinct(training_N[aside])
            counts = rest._counts_at(a, b, c)
            discounts = min(product(DISCOUNTS, DISCOUNTS), key=lambda pair: -times @ np.log2(counts.mixed(*pair)))
        return cls.counted(training_N, discount2=discounts[0], discount1=discounts[1])

    def probability(self, a: Ints, b: Ints, c: Ints) -> Floats:
        """p(c | a b), elementwise."""
        return self._counts_at(a, b, c).mixed(self.discount2, self.discount1)

    def bits_per_byte(self, text_N: Bytes_N, *, scored_N: npt.NDArray[np.bool_] | None = None) -> float:
        """Mean -log2 p over the bytes from the third on; with `scored_N` [N] only over those marked."""
        a, b, c = _triples(text_N)
        if scored_N is not None:
            keep = scored_N[2:]
            a, b, c = a[keep], b[keep], c[keep]
        return float(-np.log2(self.probability(a, b, c)).mean())

    def _counts_at(self, a: Ints, b: Ints, c: Ints) -> "_Counts":
        by_ab, by_b = self.count_abc.reshape(V * V, V), self.count_bc.reshape(V, V)
        ab = a * V + b
        return _Counts(
            order2=_Order(by_ab[ab, c], by_ab.sum(1)[ab], (by_ab > 0).sum(1)[ab]),
            order1=_Order(by_b[b, c], by_b.sum(1)[b], (by_b > 0).sum(1)[b]),
            order0=(self.count_c[c] + 1.0) / (self.count_c.sum() + V),
        )


@dataclass(frozen=True)
class _Order:
    """Of each asked byte: its count in its context, the context's total, and how many different bytes followed it."""

    count: Ints
    total: Ints
    kinds: Ints

    def over(self, below: Floats, *, discount: float) -> Floats:
        """This order interpolated with the one below; a context never seen passes the lower order through."""
        seen = np.maximum(self.total, 1)
        mixed: Floats = (np.maximum(self.count - discount, 0.0) + discount * self.kinds * below) / seen
        return np.where(self.total > 0, mixed, below)


@dataclass(frozen=True)
class _Counts:
    order2: _Order
    order1: _Order
    order0: Floats

    def mixed(self, discount2: float, discount1: float) -> Floats:
        return self.order2.over(self.order1.over(self.order0, discount=discount1), discount=discount2)


def _triples(text_N: Bytes_N) -> tuple[Ints, Ints, Ints]:
    wide = text_N.astype(np.int64)
    return wide[:-2], wide[1:-1], wide[2:]


def _distinct(text_N: Bytes_N) -> tuple[Ints, Ints, Ints, Ints]:
    """Each triple of the text once, and how often it occurs: a fortieth as many as bytes."""
    a, b, c = _triples(text_N)
    abc, times = np.unique((a * V + b) * V + c, return_counts=True)
    return abc // V**2, abc // V % V, abc % V, times
