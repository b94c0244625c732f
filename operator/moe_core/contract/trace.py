"""One line of a routing trace: what a rank routed in one layer of one step, in the fields of Megatron's router tracer.

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0,
     "num_tokens": 2, "topk": 2, "top_indices": [[12, 45], [3, 12]]}

Layers of multi-token prediction bear `mtp_idx` as well. Where a token takes fewer than topk, -1 stands for nobody (a
router of varying K, a pick without room).
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LayerName = tuple[str, int, int]
"""(block, mtp_idx or -1, layer)."""


NOBODY = -1


class TraceRecord(BaseModel):
    """What one rank routed in one layer of one step. top_indices [num_tokens][topk] are logical experts,
    NOBODY where there is none.
    """

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
            if min(picks) < NOBODY:
                raise ValueError(f"top_indices[{token}] names expert {min(picks)}")
        return self

    @property
    def layer_name(self) -> LayerName:
        return self.block, -1 if self.mtp_idx is None else self.mtp_idx, self.layer

    def line(self) -> str:
        """The record as a line of the file, without its line break."""
        return self.model_dump_json(exclude_none=True)


def trace_file(name: str, *, rank: int, pod_uid: str) -> str:
    """File name of what one pod of a rank records: a pod that comes after it writes another file.

    >>> trace_file("tiny", rank=2, pod_uid="1f0c")
    'tiny-rank-2-1f0c.jsonl'
    """
    return f"{name}-rank-{rank}-{pod_uid}.jsonl"
