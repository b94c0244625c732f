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
V = 256
DISCOUNTS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
_TUNING_BLOCK = 4096
"""Bytes per block when a tenth of the training text is set aside to choose the discounts."""


@dataclass(frozen=True)
class Order2Model:
    """Probabilities of a byte after two bytes. Counts: n3 [256*256*256], the lower orders are their margins."""

    count_abc: npt.NDArray[np.int64]
    count_bc: npt.NDArray[np.int64]
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
        if not aside.any() or aside.all():
            return cls.counted(training_N, discount2=0.5, discount1=0.5)
        base = cls.counted(training_N[~aside], discount2=0.5, discount1=0.5)
        best: tuple[float, float, float] | None = None
        for discount2, discount1 in product(DISCOUNTS, DISCOUNTS):
            model = cls(base.count_abc, base.count_bc, base.count_c, discount2, discount1)
            bits = model.bits_per_byte(training_N[aside])
            if best is None or bits < best[0]:
                best = (bits, discount2, discount1)
        assert best is not None, "the grid of discounts is not empty"
        return cls.counted(training_N, discount2=best[1], discount1=best[2])

    def probability(self, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], c: npt.NDArray[np.int64]) -> Floats:
        """p(c | a b), elementwise."""
        p0 = (self.count_c[c] + 1.0) / (self.count_c.sum() + V)
        by_b = self.count_bc.reshape(V, V)
        p1 = _interpolate(self.count_bc[b * V + c], by_b.sum(1)[b], (by_b > 0).sum(1)[b], self.discount1, p0)
        by_ab = self.count_abc.reshape(V * V, V)
        totals, kinds = self._context_sums(by_ab)
        ab = a * V + b
        return _interpolate(by_ab[ab, c], totals[ab], kinds[ab], self.discount2, p1)

    def _context_sums(self, by_ab: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return by_ab.sum(1), (by_ab > 0).sum(1)

    def bits_per_byte(self, text_N: Bytes_N, *, scored_N: npt.NDArray[np.bool_] | None = None) -> float:
        """Mean -log2 p over the bytes from the third on; with `scored_N` [N] only over those marked."""
        a, b, c = _triples(text_N)
        if scored_N is not None:
            keep = scored_N[2:]
            a, b, c = a[keep], b[keep], c[keep]
        return float(-np.log2(self.probability(a, b, c)).mean())


def _triples(text_N: Bytes_N) -> tuple[npt.NDArray[np.int64], ...]:
    wide = text_N.astype(np.int64)
    return wide[:-2], wide[1:-1], wide[2:]


def _interpolate(
    count: npt.NDArray[np.int64],
    total: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.int64],
    discount: float,
    below: Floats,
) -> Floats:
    """One order over the one below; a context never seen passes the lower order through."""
    seen = np.maximum(total, 1)
    mixed = (np.maximum(count - discount, 0.0) + discount * kinds * below) / seen
    return np.where(total > 0, mixed, below)
