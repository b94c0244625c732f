"""How one serving step runs through a transformers model, by what the family's layers remember.

BatchedForward  layers keep keys and values only: all rows of the step are one batch, padded, with masks of ours.
RowForward      layers keep anything else: one forward per row on the family's own cache, with masks of its own. Ranks
                stay in lockstep: all run as many forwards as the one with the most rows, and tell each other the sizes.

B rows of the step, Q query tokens per row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.dispatch.step import StepContext
from moe_runtime.engine.attention import attention_masks
from moe_runtime.engine.cache import OwnStateCache, SlotKVCache, StepCache
from moe_runtime.experts.families import UnsupportedModel, shared_windows, text_config


@dataclass(frozen=True, slots=True)
class Step:
    """ids_BQ, positions_BQ: None for a rank without tokens; position -1 is padding, on either side.

    tokens_of_rank: valid tokens per position from the control exchange; None costs one exchange more.
    """

    ids_BQ: torch.Tensor | None
    positions_BQ: torch.Tensor | None
    rows_B: tuple[int, ...]
    tokens_of_rank: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """logits_BV of each row's last valid token; whether each row met a lost expert."""

    logits_BV: torch.Tensor
    degraded_B: list[bool]


class BatchedForward:
    def __init__(self, module: Any, context: StepContext, windows: dict[str, int | None], device: str) -> None:
        self._module, self._context, self._windows, self._device = module, context, windows, device
        # sdpa takes masks of bools, eager attention floats to add
        self._additive = None if text_config(module.config)._attn_implementation == "sdpa" else torch.float32

    def new_cache(self, *, num_rows: int, max_length: int) -> SlotKVCache:
        num_layers = int(text_config(self._module.config).num_hidden_layers)
        return SlotKVCache(num_layers=num_layers, num_rows=num_rows, max_length=max_length)

    def run(self, step: Step, cache: StepCache) -> StepResult:
        assert isinstance(cache, SlotKVCache), "the cache comes from new_cache"
        if step.ids_BQ is None or step.positions_BQ is None:
            # attention crashes on empty batches: one masked token that is neither dispatched nor counted
            cache.begin_idle(self._device)
            ids_BQ = torch.zeros(1, 1, dtype=torch.long, device=self._device)
            positions_BQ = torch.full((1, 1), -1, device=self._device)
        else:
            ids_BQ, positions_BQ = step.ids_BQ, step.positions_BQ
            cache.begin(step.rows_B, positions_BQ)
        is_valid_BQ = positions_BQ >= 0
        num_valid = int(is_valid_BQ.sum())  # device sync: tells the other ranks
        valid_V = None if num_valid == is_valid_BQ.numel() else torch.nonzero(is_valid_BQ.reshape(-1)).squeeze(-1)
        column_Q = torch.arange(positions_BQ.shape[1], device=positions_BQ.device)
        last_B = torch.where(is_valid_BQ, column_Q, 0).amax(dim=1)
        tokens_of_position = _tokens_of_position(self._context, num_valid, step.tokens_of_rank)
        with self._context.running(valid_V, is_valid_BQ.numel(), tokens_of_position):
            output = self._module(
                input_ids=ids_BQ,
                position_ids=cache.seen_BQ,
                attention_mask=attention_masks(cache, self._windows, additive=self._additive),
                past_key_values=cache,
                use_cache=True,
                # of single tokens all: transformers 5.17 has no other way that costs no more
                logits_to_keep=last_B.unsqueeze(1) if positions_BQ.shape[1] > 1 else 0,
            )
        if not step.rows_B:
            return StepResult(output.logits.new_zeros(0, output.logits.shape[-1]), [])
        num_rows, degraded_T = positions_BQ.shape[0], self._context.degraded_T
        degraded_B = [False] * num_rows if degraded_T is None else degraded_T.view(num_rows, -1).any(dim=1).tolist()
        return StepResult(_of_places(output.logits, last_B, positions_BQ.shape[1]).float(), degraded_B)


def _of_places(logits: torch.Tensor, last_B: torch.Tensor, num_queries: int) -> torch.Tensor:
    """[B, V] logits of each row's last token, in whichever form they come: [B, 1, V] as asked, [B, Q, V] from families
    that give all, [B, B, 1, V] with every row's token at every row's place from transformers 5.17.

    Raises ValueError for any other: a place that is not there would end the process on a GPU.
    """
    row_B = torch.arange(len(last_B), device=last_B.device)
    if logits.ndim == 4 and logits.shape[:3] == (len(last_B), len(last_B), 1):
        return logits[row_B, row_B, 0]
    if logits.ndim == 3 and logits.shape[1] in {1, num_queries}:
        return logits[row_B, last_B if logits.shape[1] > 1 else 0]
    raise ValueError(f"its logits are {list(logits.shape)} where one token of each of {len(last_B)} rows was asked for")


class RowForward:
    """in_parts: whether the family's cache lets a prompt be read in parts. If not, what follows a sequence's first part
    is read one token at a time.
    """

    def __init__(self, module: Any, context: StepContext, device: str, *, in_parts: bool) -> None:
        self._module, self._context, self._device, self._in_parts = module, context, device, in_parts

    def new_cache(self, *, num_rows: int, max_length: int) -> OwnStateCache:
        return OwnStateCache(num_rows=num_rows, max_length=max_length)

    def run(self, step: Step, cache: StepCache) -> StepResult:
        assert isinstance(cache, OwnStateCache), "the cache comes from new_cache"
        parts: list[_Part] = []
        if step.ids_BQ is None or step.positions_BQ is None:
            cache.begin_idle()
        else:
            cache.begin(step.rows_B, step.positions_BQ)
            parts = self._parts(step.ids_BQ, step.positions_BQ)
        logits: dict[int, torch.Tensor] = {}
        degraded_B = [False] * len(step.rows_B)
        nothing = torch.zeros(1, dtype=torch.long, device=self._device)
        logits_V = torch.zeros(0, device=self._device)
        for i, tokens_of_position in enumerate(self._tokens_of_forwards([len(part.ids_Q) for part in parts])):
            if i >= len(parts):
                # takes part with one token that is neither dispatched nor counted
                with self._context.running(nothing[:0], 1, tokens_of_position):
                    logits_V, _ = read(self._module, nothing, nothing, None)
                continue
            part = parts[i]
            row = step.rows_B[part.index]
            with self._context.running(None, len(part.ids_Q), tokens_of_position):
                state = cache.take(row, first_position=int(part.positions_Q[0]))
                logits_V, state = read(self._module, part.ids_Q, part.positions_Q, state)
            cache.put(row, state)
            logits[part.index] = logits_V
            degraded_T = self._context.degraded_T
            degraded_B[part.index] |= degraded_T is not None and bool(degraded_T.any())
        rows = [logits.get(index, torch.zeros_like(logits_V)) for index in range(len(step.rows_B))]
        return StepResult(torch.stack(rows) if rows else logits_V.new_zeros(0, len(logits_V)), degraded_B)

    def _parts(self, ids_BQ: torch.Tensor, positions_BQ: torch.Tensor) -> "list[_Part]":
        parts: list[_Part] = []
        for index, is_valid_Q in enumerate(positions_BQ >= 0):
            ids_Q, positions_Q = ids_BQ[index][is_valid_Q], positions_BQ[index][is_valid_Q]
            if not len(ids_Q):
                continue
            starts = int(positions_Q[0]) == 0
            size = len(ids_Q) if starts or self._in_parts else 1
            split = zip(torch.split(ids_Q, size), torch.split(positions_Q, size), strict=True)
            parts += [_Part(index, *part) for part in split]
        return parts

    def _tokens_of_forwards(self, tokens_of_row: Sequence[int]) -> list[tuple[int, ...] | None]:
        """For each forward of the step its tokens per position (None: this rank is alone)."""
        group = self._context.group
        if group is None:
            return [None] * len(tokens_of_row)
        num_forwards = max(row[0] for row in group.all_gather_ints((len(tokens_of_row),)))
        if not num_forwards:
            return []
        padded = [*tokens_of_row, *[0] * (num_forwards - len(tokens_of_row))]
        return list(zip(*group.all_gather_ints(padded), strict=True))


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens of the step's row `index` that one forward reads."""

    index: int
    ids_Q: torch.Tensor
    positions_Q: torch.Tensor


def read(module: Any, ids_Q: torch.Tensor, positions_Q: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """One forward of one sequence: logits [V] (float32) after its last token, and the family's cache grown by it."""
    output = module(
        input_ids=ids_Q.unsqueeze(0),
        position_ids=positions_Q.unsqueeze(0),
        past_key_values=state,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[0, -1].float(), output.past_key_values


def _tokens_of_position(context: StepContext, num_valid: int, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
    group = context.group
    if group is None:
        return None
    if given is None:
        return tuple(row[0] for row in group.all_gather_ints((num_valid,)))
    if len(given) != group.size or given[group.position] != num_valid:
        raise InvalidInput(f"tokens_of_rank {list(given)} does not say {num_valid} for position {group.position}")
    return given


_PROBE_TOKENS, _PROBE_FIRST_PART = 12, 7
_PROBE_TOLERANCE = 1e-4
"""Of the largest logit. Float32 noise was seen at 2e-6; a lost state, the smallest mistake seen, at 1e-2."""
_REFUSALS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""How a family's code says that it cannot take a cache or a mask of this kind."""


@torch.no_grad()
def choose_forward(module: Any, context: StepContext, device: str) -> BatchedForward | RowForward:
    """The fastest way that gives what the family's own forward gives without a cache; the model itself is asked.

    A short text is read at once and in parts, experts left out: theirs is not the state. Some families start their
    recurrence anew with every part, some keep a cache that other code cannot drive. Raises UnsupportedModel.
    """
    windows = shared_windows(module.config)
    ways: list[BatchedForward | RowForward] = (
        [] if windows is None else [BatchedForward(module, context, windows, device)]
    )
    ways += [RowForward(module, context, device, in_parts=True), RowForward(module, context, device, in_parts=False)]
    ids_Q = torch.arange(1, 1 + _PROBE_TOKENS, device=device) % int(text_config(module.config).vocab_size)
    why = "what it gives token by token is not what it gives at once"
    with context.without_experts():
        whole_V = module(input_ids=ids_Q.unsqueeze(0), use_cache=False).logits[0, -1].float()
        for way in ways:
            try:
                parts_V = _read_in_parts(way, ids_Q)
            except _REFUSALS as error:
                why = str(error)
                continue
            if float((parts_V - whole_V).abs().max()) <= _PROBE_TOLERANCE * float(whole_V.abs().max()):
                return way
    raise UnsupportedModel(str(module.config.model_type), f"its cache cannot be driven here: {why}")


def _read_in_parts(way: BatchedForward | RowForward, ids_Q: torch.Tensor) -> torch.Tensor:
    """Logits after the last token, read in two steps beside a shorter text in another row."""
    cache = way.new_cache(num_rows=2, max_length=len(ids_Q) + 1)
    position_Q = torch.arange(len(ids_Q), device=ids_Q.device)
    first, rest = slice(0, _PROBE_FIRST_PART), slice(_PROBE_FIRST_PART, len(ids_Q))
    way.run(Step(ids_Q[first].unsqueeze(0), position_Q[first].unsqueeze(0), (1,), None), cache)
    cache.commit()
    shorter = torch.where(position_Q[rest] < len(ids_Q) - 1, position_Q[rest] - _PROBE_FIRST_PART, -1)
    ids_BQ, positions_BQ = torch.stack([ids_Q[rest]] * 2), torch.stack([position_Q[rest], shorter])
    return way.run(Step(ids_BQ, positions_BQ, (1, 0), None), cache).logits_BV[0]
