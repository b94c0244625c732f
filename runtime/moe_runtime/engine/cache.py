"""Keys and values of many sequences in preallocated rows, each at its own length; a step that fails leaves no trace.

Committed length is the only state: keys written past it are masked until `commit` and overwritten by the repeated step,
so rolling back is doing nothing. Not transformers' DynamicCache, which appends in place and remembers a failed step.
"""

from collections.abc import Sequence

import torch


class SlotKVCache:
    """num_rows sequences of up to max_length tokens. `lengths[row]` is the number of committed tokens of a row."""

    num_rows: int
    max_length: int
    lengths: list[int]

    def begin(self, rows_B: Sequence[int], positions_BQ: torch.Tensor) -> None:
        """Aim the coming forward at these rows and positions (-1: padding). `forward_tokens` calls it."""
        raise NotImplementedError

    def commit(self) -> None:
        """Rows of the last forward grow to their highest position + 1. `ExpertParallelModel.commit` calls it."""
        raise NotImplementedError

    def free(self, row: int) -> None:
        """The row's sequence is over: its length is 0 again."""
        raise NotImplementedError
