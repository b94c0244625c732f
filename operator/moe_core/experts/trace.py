"""Routing traces: which experts each token chose, line by line, in the fields that Megatron's router tracer writes.

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0,
     "num_tokens": 2, "topk": 2, "top_indices": [[12, 45], [3, 12]]}

Layers of multi-token prediction bear `mtp_idx` as well. The tracer's pointers to its binary side files (`hs_*`,
`logit_*`) are passed over: a plan needs choices only. No file is opened here; a shell hands in the lines.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.outcome import InvalidInput

SIDE_FILES = ("hs_offset", "hs_bytes", "hs_shape", "logit_offset", "logit_bytes", "logit_shape")
LayerName = tuple[str, int, int]
"""(block, mtp_idx or -1, layer)."""


class TraceRecord(BaseModel):
    """What one rank routed in one layer of one step. top_indices [num_tokens][topk] are logical experts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    step: int = Field(ge=0)
    stage: str = "pre_dispatch"
    block: str = "decoder"
    layer: int = Field(ge=0)
    mtp_idx: int | None = Field(default=None, ge=0)
    rank: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    topk: int = Field(ge=1)
    top_indices: list[list[int]]

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if len(self.top_indices) != self.num_tokens:
            raise ValueError(f"top_indices has {len(self.top_indices)} tokens, num_tokens says {self.num_tokens}")
        for token, picks in enumerate(self.top_indices):
            if len(picks) != self.topk:
                raise ValueError(f"top_indices[{token}] has {len(picks)} picks, topk says {self.topk}")
            if min(picks) < 0:
                raise ValueError(f"top_indices[{token}] names expert {min(picks)}")
        return self

    @property
    def layer_name(self) -> LayerName:
        return self.block, -1 if self.mtp_idx is None else self.mtp_idx, self.layer

    def line(self) -> str:
        """The record as a line of the file, without its line break."""
        return self.model_dump_json(exclude_none=True)


def read_lines(lines: Iterable[str]) -> Iterator[TraceRecord]:
    """Records of a trace; empty lines are passed over. Raises InvalidInput with the line's number and what is wrong."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise InvalidInput(f"line {number}: must be a JSON object, got {line.strip()[:60]}")
            yield TraceRecord(**{name: value for name, value in fields.items() if name not in SIDE_FILES})
        except (json.JSONDecodeError, RecursionError) as error:
            raise InvalidInput(f"line {number}: not JSON: {error}") from error
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

        Raises InvalidInput for an empty trace, or an expert beyond `num_experts`.
        """
        known = tuple(sorted(records, key=lambda r: (r.step, r.layer_name, r.rank)))
        if not known:
            raise InvalidInput("the trace must have at least one record, got none")
        highest = max((max(picks) for record in known for picks in record.top_indices), default=0)
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
            np.add.at(
                found[step_idx[record.step], layer_idx[record.layer_name]], np.asarray(record.top_indices).ravel(), 1
            )
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
        """[tokens, K] of one layer, all steps and ranks. Raises InvalidInput if ranks disagree about topk."""
        rows = [record for record in self.records if record.layer_name == layer and record.num_tokens]
        sizes = sorted({record.topk for record in rows})
        if len(sizes) > 1:
            raise InvalidInput(f"layer {layer} must have one topk, got {sizes}")
        return np.asarray([picks for record in rows for picks in record.top_indices], dtype=np.int64)

    def chosen_together(self) -> FloatArray:
        """[L, E, E] tokens that chose both; how often an expert was chosen is on the diagonal."""
        found = np.zeros((len(self.layers), self.num_experts, self.num_experts))
        for index, layer in enumerate(self.layers):
            chosen_TE = np.zeros((len(picks_TK := self.picks(layer)), self.num_experts), dtype=np.float32)
            if len(picks_TK):
                np.put_along_axis(chosen_TE, picks_TK, 1, axis=1)
            found[index] = chosen_TE.T @ chosen_TE
        return found


def _flat(record: TraceRecord) -> IntArray:
    return np.asarray(record.top_indices, dtype=np.int64).ravel()
