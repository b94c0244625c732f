"""Routing traces: which experts each token chose, read from lines (moe_core.contract.trace) into arrays.

Megatron's pointers to its tracer's binary side files (`hs_*`, `logit_*`) are passed over: a plan needs choices only.
No file is opened here; a shell hands in the lines.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from moe_core.contract.trace import LayerName, TraceRecord
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.outcome import InvalidInput

MOST_EXPERTS = 4096
"""As a resource may say of its model: arrays are as large as the highest expert asks."""
SIDE_FILES = ("hs_offset", "hs_bytes", "hs_shape", "logit_offset", "logit_bytes", "logit_shape")


def read_lines(lines: Iterable[str]) -> Iterator[TraceRecord]:
    """Records of a trace; empty lines are passed over. Raises InvalidInput with the line's number and what is wrong."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also for a number of thousands of digits
            raise InvalidInput(f"line {number}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InvalidInput(f"line {number}: must be a JSON object, got {line.strip()[:60]}")
        try:
            yield TraceRecord(**{name: value for name, value in fields.items() if name not in SIDE_FILES})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "record"
            raise InvalidInput(f"line {number}: {where}: {first['msg']}") from error


@dataclass(frozen=True, slots=True)
class Trace:
    """Records in order of step; `layers` names the model's layers in the order in which arrays have them."""

    records: tuple[TraceRecord, ...]
    layers: tuple[LayerName, ...]
    num_experts: int

    @classmethod
    def of(cls, records: Iterable[TraceRecord], *, num_experts: int | None = None) -> "Trace":
        """A whole trace. Without `num_experts` the highest expert that was chosen is the last.

        Raises InvalidInput for an empty trace, or an expert beyond `num_experts` or MOST_EXPERTS.
        """
        known = tuple(sorted(records, key=lambda r: (r.step, r.layer_name, r.rank)))
        if not known:
            raise InvalidInput("the trace must have at least one record, got none")
        highest = max((max(picks) for record in known for picks in record.top_indices), default=0)
        if highest >= MOST_EXPERTS:
            raise InvalidInput(f"the trace names expert {highest}, models have up to {MOST_EXPERTS}")
        if num_experts is not None and highest >= num_experts:
            raise InvalidInput(f"the trace names expert {highest}, the model has experts 0..{num_experts - 1}")
        layers = tuple(sorted({record.layer_name for record in known}))
        return cls(known, layers, highest + 1 if num_experts is None else num_experts)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({record.step for record in self.records}))

    def load_of_steps(self) -> IntArray:
        """[steps, L, E] picks."""
        step_idx = {step: index for index, step in enumerate(self.steps)}
        layer_idx = {name: index for index, name in enumerate(self.layers)}
        found = np.zeros((len(step_idx), len(self.layers), self.num_experts), dtype=np.int64)
        for record in self.records:
            np.add.at(found[step_idx[record.step], layer_idx[record.layer_name]], _flat(record), 1)
        return found

    def load_of_sources(self, num_ranks: int) -> IntArray:
        """[R, L, E] picks of each source rank. Raises InvalidInput for a rank beyond `num_ranks`."""
        layer_idx = {name: index for index, name in enumerate(self.layers)}
        found = np.zeros((num_ranks, len(self.layers), self.num_experts), dtype=np.int64)
        for record in self.records:
            if record.rank >= num_ranks:
                raise InvalidInput(f"the trace names rank {record.rank}, there are ranks 0..{num_ranks - 1}")
            np.add.at(found[record.rank, layer_idx[record.layer_name]], _flat(record), 1)
        return found

    def picks(self, layer: LayerName) -> IntArray:
        """[tokens, K] of one layer, all steps and ranks; -1: nobody. Raises InvalidInput if ranks disagree on topk."""
        rows = [record for record in self.records if record.layer_name == layer and record.num_tokens]
        sizes = sorted({record.topk for record in rows})
        if len(sizes) > 1:
            raise InvalidInput(f"layer {layer} must have one topk, got {sizes}")
        return np.asarray([picks for record in rows for picks in record.top_indices], dtype=np.int64)

    def chosen_together(self) -> FloatArray:
        """[L, E, E] tokens that chose both; how often an expert was chosen is on the diagonal."""
        found = np.zeros((len(self.layers), self.num_experts, self.num_experts))
        for index, layer in enumerate(self.layers):
            # the last column takes picks of nobody
            chosen_TE = np.zeros((len(picks_TK := self.picks(layer)), self.num_experts + 1), dtype=np.float32)
            if len(picks_TK):
                np.put_along_axis(chosen_TE, picks_TK, 1, axis=1)
            found[index] = (chosen_TE.T @ chosen_TE)[:-1, :-1]
        return found


def _flat(record: TraceRecord) -> IntArray:
    picks = np.asarray(record.top_indices, dtype=np.int64).ravel()
    return picks[picks >= 0]
