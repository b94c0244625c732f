"""The best that any assignment of one layer can do, by integer programming: for a handful of experts and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.fleet import Fleet

Row = tuple[list[tuple[int, float]], float, float]
"""Factors of variables, and what their sum must be between."""


@dataclass
class Program:
    """Variables are numbered; the last one, `worst`, is the load of the heaviest rank, to be made small."""

    is_whole: list[bool] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def variables(self, *shape: int, whole: bool) -> IntArray:
        """Ids of new variables: 0 or 1 where they are whole, else from 0 up."""
        first = len(self.is_whole)
        self.is_whole += [whole] * int(np.prod(shape))
        return np.arange(first, len(self.is_whole)).reshape(shape)

    def require(self, ids: IntArray, factors: Sequence[float] | FloatArray | float, least: float, most: float) -> None:
        ids = np.asarray(ids).reshape(-1)
        weights = np.broadcast_to(np.asarray(factors, dtype=float).reshape(-1), ids.shape)
        self.rows.append((list(zip(ids.tolist(), weights.tolist(), strict=True)), least, most))

    def least_worst(self, load_of_rank: Sequence[tuple[IntArray, FloatArray]]) -> float:
        """The smallest possible largest load, each rank's load being a sum of factors times variables."""
        worst = int(self.variables(1, whole=False)[0])
        for ids, factors in load_of_rank:
            self.require(np.append(ids.reshape(-1), worst), np.append(factors.reshape(-1), -1.0), -np.inf, 0.0)
        entries = [(r, i, f) for r, (factors, _, _) in enumerate(self.rows) for i, f in factors]
        row, column, value = zip(*entries, strict=True)
        matrix = csr_array((value, (row, column)), shape=(len(self.rows), len(self.is_whole)))
        low, high = np.array([r[1] for r in self.rows]), np.array([r[2] for r in self.rows])
        whole = np.array(self.is_whole)
        cost = np.zeros(len(whole))
        cost[worst] = 1.0
        found = milp(
            cost,
            constraints=LinearConstraint(matrix, low, high),
            integrality=whole.astype(int),
            bounds=Bounds(np.zeros(len(whole)), np.where(whole, 1.0, np.inf)),
            options={"mip_rel_gap": 0.0},
        )
        assert found.status == 0, found.message
        return float(found.fun)


def exact_of_copies(load_E: FloatArray, copies_E: IntArray, fleet: Fleet) -> float:
    """Exactly these copies, each on a rank of its own, all copies of an expert alike."""
    program = Program()
    on_RE = program.variables(fleet.num_ranks, len(load_E), whole=True)
    for expert, copies in enumerate(copies_E.tolist()):
        program.require(on_RE[:, expert], 1.0, copies, copies)
    for rank, slots in enumerate(fleet.slots_of_rank):
        program.require(on_RE[rank], 1.0, 0, slots)
    per_copy_E = load_E / copies_E
    return program.least_worst([(on_E, per_copy_E / speed) for on_E, speed in zip(on_RE, fleet.speed_R, strict=True)])


def exact_of_slots(load_E: FloatArray, fleet: Fleet) -> float:
    """Any number of copies, all copies of an expert alike. is_KE: whether an expert has k + 1 copies."""
    program = Program()
    num_experts, most = len(load_E), fleet.ranks_with_slots
    is_KE = program.variables(most, num_experts, whole=True)
    on_RKE = program.variables(fleet.num_ranks, most, num_experts, whole=True)
    for expert in range(num_experts):
        program.require(is_KE[:, expert], 1.0, 1, 1)
        for k in range(most):
            ids = np.append(on_RKE[:, k, expert], is_KE[k, expert])
            program.require(ids, [1.0] * fleet.num_ranks + [-(k + 1.0)], 0, 0)
            for rank in range(fleet.num_ranks):
                program.require(np.array([on_RKE[rank, k, expert], is_KE[k, expert]]), [1.0, -1.0], -np.inf, 0)
    for rank, slots in enumerate(fleet.slots_of_rank):
        program.require(on_RKE[rank], 1.0, 0, slots)
    per_copy_KE = load_E / np.arange(1, most + 1)[:, None]
    return program.least_worst(
        [(on_KE, per_copy_KE / speed) for on_KE, speed in zip(on_RKE, fleet.speed_R, strict=True)]
    )


def exact_of_shares(load_E: FloatArray, fleet: Fleet) -> float:
    """Any number of copies, which divide their expert's load in any way."""
    program = Program()
    on_RE = program.variables(fleet.num_ranks, len(load_E), whole=True)
    part_RE = program.variables(fleet.num_ranks, len(load_E), whole=False)
    for expert, load in enumerate(load_E.tolist()):
        program.require(on_RE[:, expert], 1.0, 1, np.inf)
        program.require(part_RE[:, expert], 1.0, load, load)
        for rank in range(fleet.num_ranks):
            program.require(np.array([part_RE[rank, expert], on_RE[rank, expert]]), [1.0, -load], -np.inf, 0)
    for rank, slots in enumerate(fleet.slots_of_rank):
        program.require(on_RE[rank], 1.0, 0, slots)
    return program.least_worst(
        [(part_E, np.full(len(load_E), 1 / speed)) for part_E, speed in zip(part_RE, fleet.speed_R, strict=True)]
    )
