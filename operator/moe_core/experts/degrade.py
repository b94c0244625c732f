"""Who answers for a logical expert once ranks are gone: a live copy, its generalist, or nobody (drop and renormalise).

The ranks decide this for themselves from the map and the committed membership, so all of them come to the same answer
without asking anybody.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.checks import IntArray
from moe_core.experts.measure import copies_of_logical


class Answer(IntEnum):
    """Rungs of the ladder, best first. REFUSE: the owner would rather fail the request than answer it degraded."""

    COPY = 0
    GENERALIST = 1
    DROP = 2
    REFUSE = 3


@dataclass(frozen=True, slots=True)
class Answers:
    """answer_LE [L, E] of Answer as int8; copies_LE [L, E] live copies."""

    answer_LE: NDArray[np.int8]
    copies_LE: IntArray

    @property
    def num_lost(self) -> int:
        """(layer, logical expert) pairs without a live copy."""
        return int((self.copies_LE == 0).sum())


_RUNG = {"Generalist": Answer.GENERALIST, "Drop": Answer.DROP, "Refuse": Answer.REFUSE}


def degrade(
    expert_map: ExpertMap,
    live_ranks: Collection[int],
    *,
    fallback: Literal["Generalist", "Drop", "Refuse"] = "Generalist",
    has_generalist_LE: NDArray[np.bool_] | None = None,
) -> Answers:
    """The answer for every expert while only `live_ranks` take part.

    `has_generalist_LE` [L, E] says which experts have a calibrated generalist; those without fall to DROP.
    Raises InvalidInput for a rank that the map does not know.
    """
    copies_LE = copies_of_logical(expert_map, live_ranks)
    rung_LE = np.full(copies_LE.shape, _RUNG[fallback], dtype=np.int8)
    if fallback == "Generalist" and has_generalist_LE is not None:
        rung_LE[~has_generalist_LE] = Answer.DROP
    return Answers(np.where(copies_LE > 0, np.int8(Answer.COPY), rung_LE).astype(np.int8), copies_LE)
