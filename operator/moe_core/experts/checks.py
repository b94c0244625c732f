"""Checks that moe_core.experts shares. A load is [L][E] tokens per logical expert, finite and not negative."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_core.outcome import InvalidInput

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def as_load_LE(load: ArrayLike, *, num_layers: int | None = None, num_logical_experts: int | None = None) -> FloatArray:
    """The load as a float array [L, E]. Raises InvalidInput that names the shape or the first bad value."""
    try:
        load_LE = np.asarray(load, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"load must be a rectangle of numbers [layers][experts]: {error}") from error
    if load_LE.ndim != 2:
        raise InvalidInput(f"load must have the shape [layers, experts], got {list(load_LE.shape)}")
    wanted = (
        load_LE.shape[0] if num_layers is None else num_layers,
        load_LE.shape[1] if num_logical_experts is None else num_logical_experts,
    )
    if load_LE.shape != wanted:
        raise InvalidInput(f"load must have the shape {list(wanted)}, got {list(load_LE.shape)}")
    bad = ~np.isfinite(load_LE) | (load_LE < 0)
    if bad.any():
        layer, expert = (int(i) for i in np.argwhere(bad)[0])
        raise InvalidInput(f"load[{layer}][{expert}] must be finite and not negative, got {load_LE[layer, expert]}")
    return load_LE


def check_shape(name: str, given: NDArray[np.generic], wanted: tuple[int, ...]) -> None:
    """Raises InvalidInput unless `given` has the shape."""
    if given.shape != wanted:
        raise InvalidInput(f"{name} must have the shape {list(wanted)}, got {list(given.shape)}")


def check_slots(slots_of_rank: Sequence[int], *, num_logical_experts: int) -> None:
    """Raises InvalidInput unless every expert can have a slot."""
    if num_logical_experts < 1:
        raise InvalidInput(f"num_logical_experts must be at least 1, got {num_logical_experts}")
    if not slots_of_rank:
        raise InvalidInput("slots_of_rank must name at least one rank, got none")
    for rank, count in enumerate(slots_of_rank):
        if count < 0:
            raise InvalidInput(f"slots_of_rank[{rank}] must not be negative, got {count}")
    if sum(slots_of_rank) < num_logical_experts:
        raise InvalidInput(
            f"slots_of_rank must hold every expert: {sum(slots_of_rank)} slots for {num_logical_experts} experts"
        )
