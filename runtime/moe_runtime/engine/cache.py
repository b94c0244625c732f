"""What layers remember of many sequences, each in a row at its own length; a step that fails leaves no trace.

SlotKVCache    keys and values in preallocated rows, for families whose layers keep nothing else. Committed length is
               the only state: keys written past it are masked until `commit` and overwritten by the repeated step, so
               rolling back is doing nothing. Sliding-window layers keep the whole length too and see their window
               through the mask: memory is spent for a rollback that costs nothing at any length.
OwnStateCache  transformers' own cache of the family, one per row, whatever it holds: recurrent and convolution state,
               compressed or indexed keys. Such a cache changes in place and cannot be cropped, so a step works on a
               copy of it, which `commit` puts in its place and `rollback` throws away.

B rows of the step, Q query tokens per row, H key-value heads, S stored tokens per row.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from moe_core.outcome import InvalidInput


class StepCache:
    """num_rows sequences of up to max_length tokens. `lengths[row]` is the number of committed tokens of a row."""

    def __init__(self, *, num_rows: int, max_length: int) -> None:
        self.num_rows, self.max_length = num_rows, max_length
        self.lengths = [0] * num_rows
        self._pending: dict[int, int] = {}

    def begin_idle(self) -> None:
        """The coming step has no tokens for this cache."""
        self._pending = {}

    def _begin(self, rows_B: Sequence[int], positions_BQ: torch.Tensor) -> None:
        """Note what the coming step adds. Raises InvalidInput for positions outside the row, or ahead of its committed
        length (a hole no one has written).
        """
        top_B = positions_BQ.amax(dim=1).tolist()
        low_B = torch.where(positions_BQ < 0, self.max_length, positions_BQ).amin(dim=1).tolist()
        for row, low, top in zip(rows_B, low_B, top_B, strict=True):
            if not 0 <= row < self.num_rows:
                raise InvalidInput(f"row must be 0..{self.num_rows - 1}, got {row}")
            if top >= self.max_length or (top >= 0 and low > self.lengths[row]):
                raise InvalidInput(
                    f"row {row} holds {self.lengths[row]} of {self.max_length} tokens, got positions {low}..{top}"
                )
        self._pending = {row: top + 1 for row, top in zip(rows_B, top_B, strict=True) if top >= 0}

    def commit(self) -> None:
        """Rows of the last step grow to their highest position + 1. `ExpertParallelModel.commit` calls it."""
        for row, length in self._pending.items():
            self.lengths[row] = length
        self._pending = {}

    def rollback(self) -> None:
        """Forget the last step."""
        self._pending = {}

    def free(self, row: int) -> None:
        """The row's sequence is over: its length is 0 again."""
        self.lengths[row] = 0
        self._pending.pop(row, None)


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's rows: [rows + 1, H, max_length + 1, head_dim]. The last row and the last place take what is padding.

    Latent attention (MLA) keeps its compressed pair here, which has one head and two widths.
    """

    def __init__(self, owner: "SlotKVCache") -> None:
        super().__init__()
        self._owner = owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, places = self._owner.num_rows + 1, self._owner.max_length + 1
        self.keys = key_states.new_zeros(rows, key_states.shape[1], places, key_states.shape[-1])
        self.values = value_states.new_zeros(rows, value_states.shape[1], places, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, H, Q, head_dim] at the step's places, return [B, H, S, head_dim] of its rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        owner = self._owner
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            # advanced indices around a slice come first: [B, Q, H, head_dim]
            stored[owner.row_B1, :, owner.place_BQ] = new.transpose(1, 2)
        return self.keys[owner.row_index, :, : owner.stored], self.values[owner.row_index, :, : owner.stored]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        return self._owner.stored, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given; no caller may derive them from the cache

    def get_max_length(self) -> int:
        return self._owner.max_length


class SlotKVCache(StepCache, Cache):  # type: ignore[misc]
    """Keys and values of every layer in rows, which a step reads and writes as one batch."""

    def __init__(self, *, num_layers: int, num_rows: int, max_length: int) -> None:
        StepCache.__init__(self, num_rows=num_rows, max_length=max_length)
        Cache.__init__(self, layers=[_SlotLayer(self) for _ in range(num_layers)])

    def begin(self, rows_B: Sequence[int], positions_BQ: torch.Tensor) -> None:
        """Aim the coming forward at these rows and positions (-1: padding). `forward_tokens` calls it.

        Raises InvalidInput for positions outside the row, or ahead of its committed length.
        """
        self._begin(rows_B, positions_BQ)
        self._aim(list(rows_B), positions_BQ)

    def begin_idle(self, device: str = "cpu") -> None:
        """Aim at nothing: one padding token in the spare row, for a rank that only takes part."""
        self._aim([self.num_rows], torch.full((1, 1), -1, device=device))
        super().begin_idle()

    def _aim(self, rows: list[int], positions_BQ: torch.Tensor) -> None:
        device = positions_BQ.device
        is_padding_BQ = positions_BQ < 0
        self.row_B1 = torch.tensor(rows, device=device).unsqueeze(1)
        self.place_BQ = torch.where(is_padding_BQ, self.max_length, positions_BQ)
        self.seen_BQ = torch.where(is_padding_BQ, 0, positions_BQ)
        """Highest place each query may see; padding sees place 0, which is always finite."""
        self.stored = int(self.seen_BQ.max()) + 1  # device sync: sizes the attention
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        # a slice is a view, an index is a copy of all keys
        self.row_index: Any = slice(rows[0], rows[0] + len(rows)) if contiguous else torch.tensor(rows, device=device)

    def visible_BQS(self, *, sliding_window: int | None) -> torch.Tensor:
        """[B, 1, Q, S] bool: which stored places each query of the step attends to."""
        place_S = torch.arange(self.stored, device=self.seen_BQ.device)
        visible = place_S <= self.seen_BQ.unsqueeze(-1)
        if sliding_window is not None:
            visible &= place_S > self.seen_BQ.unsqueeze(-1) - sliding_window
        return visible.unsqueeze(1)


class OwnStateCache(StepCache):
    """One cache of the family's own making for every row. Rows run one at a time: what they hold differs in shape."""

    def __init__(self, *, num_rows: int, max_length: int) -> None:
        super().__init__(num_rows=num_rows, max_length=max_length)
        self._kept: dict[int, Any] = {}
        self._working: dict[int, Any] = {}

    def begin(self, rows_B: Sequence[int], positions_BQ: torch.Tensor) -> None:
        """Note the coming step's rows and positions (-1: padding).

        Raises InvalidInput for positions outside the row, or that neither follow its committed length nor start anew.
        """
        self._begin(rows_B, positions_BQ)
        self._working = {}
        first_B = torch.where(positions_BQ < 0, self.max_length, positions_BQ).amin(dim=1).tolist()
        for row, first in zip(rows_B, first_B, strict=True):
            if row in self._pending and first not in {0, self.lengths[row]}:
                raise InvalidInput(f"row {row} holds {self.lengths[row]} tokens and cannot go back to position {first}")

    def take(self, row: int, *, first_position: int) -> Any:
        """What the row's next forward may change; None for a sequence that starts: the family makes its cache then."""
        if not first_position:
            return None
        return self._working[row] if row in self._working else copy.deepcopy(self._kept[row])

    def put(self, row: int, state: Any) -> None:
        """What the row's forward has left."""
        self._working[row] = state

    def commit(self) -> None:
        self._kept.update(self._working)
        self._working = {}
        super().commit()

    def rollback(self) -> None:
        self._working = {}
        super().rollback()

    def free(self, row: int) -> None:
        self._kept.pop(row, None)
        self._working.pop(row, None)
        super().free(row)
