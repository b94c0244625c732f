"""A transformers MoE model whose experts live in slots spread over the ranks of an epoch: the facade for engine and trainer.

    epm = ExpertParallelModel.load(source, expert_map=emap, rank=2)         # weights of this rank's slots only
    epm.bind(group, expert_map=emap)                                        # at each new epoch; group None: alone
    logits_BV = epm.forward_tokens(ids_BQ, positions_BQ, rows_B, cache)     # serving; GroupFault -> rollback, rebind, again
    epm.commit()                                                            # counters of the step count, cache grows
    loss = epm.module(input_ids=ids, labels=ids).loss; loss.backward()      # training goes through the same dispatch

Suffixes: B rows of a batch, Q query tokens per row, T = B*Q tokens, V vocabulary, L MoE layers, E logical experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.dispatch.group_face import Group
from moe_runtime.engine.cache import SlotKVCache

Fallback = Literal["Generalist", "Drop", "Refuse"]


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """One stacked parameter of one MoE layer on this rank: row s belongs to logical expert `logical_of_slot[s]`.

    name is the transformers parameter name in the full model; `parameter` has shape [local slots, ...] and may have
    zero rows. An empty slot has -1 and its row is zero.
    """

    name: str
    layer_idx: int
    parameter: torch.nn.Parameter
    logical_of_slot: tuple[int, ...]


class ExpertParallelModel:
    """One rank's part of the model. Not thread-safe: only the step loop calls it.

    module            the transformers model; dense parameters are whole, experts' parameters hold this rank's slots
    num_layers, num_experts, top_k    of the MoE layers (L, E, K); dense layers are not counted
    expert_map        the map in force
    """

    module: torch.nn.Module
    num_layers: int
    num_experts: int
    top_k: int
    expert_map: ExpertMap

    @classmethod
    def load(
        cls,
        source: ModelSource,
        *,
        expert_map: ExpertMap,
        rank: int,
        device: str = "cpu",
        seed: int = 0,
        fallback: Fallback = "Generalist",
    ) -> "ExpertParallelModel":
        """Build the model with the dense weights and this rank's slots only.

        A shape is initialised from `seed`: dense weights are identical on all ranks and an expert's weights do not
        depend on the layout. Raises UnsupportedModel (family and why) or InvalidInput (map and model disagree).
        Generalists are read from the checkpoint's folder when they lie there. Bound to no group: `bind` comes next.
        """
        raise NotImplementedError

    def bind(self, group: Group | None, *, expert_map: ExpertMap | None = None) -> None:
        """Use `group` (None: this rank alone) and recompute who answers for each expert from its living ranks.

        `expert_map` must assign this rank the slots that are loaded; None keeps the map in force. Uncommitted counters
        are dropped. Raises InvalidInput.
        """
        raise NotImplementedError

    def new_cache(self, *, num_rows: int, max_length: int) -> SlotKVCache:
        """A KV cache for `num_rows` sequences of up to `max_length` tokens."""
        raise NotImplementedError

    def forward_tokens(
        self,
        input_ids_BQ: torch.Tensor | None,
        positions_BQ: torch.Tensor | None,
        rows_B: Sequence[int],
        cache: SlotKVCache,
        *,
        tokens_of_rank: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """One serving step: logits [B, V] (float32) of the last valid token of each row.

        positions_BQ: position of each token in its own sequence, -1 for padding (either side). rows_B: cache rows.
        A rank without tokens passes None, None, () and gets [0, V]; it takes part in every layer.
        tokens_of_rank: valid tokens per position from the control exchange; None costs one exchange more.
        Raises GroupFault: nothing is committed then, call `rollback`, `bind` and run the same step again.
        """
        raise NotImplementedError

    def commit(self) -> None:
        """The step counts: pending load and degraded counters are added, the cache of the last step grows."""
        raise NotImplementedError

    def rollback(self) -> None:
        """The step never happened: pending counters and pending cache lengths are dropped."""
        raise NotImplementedError

    def load_window(self, *, reset: bool = False) -> list[list[int]]:
        """[L][E] committed picks of this rank's own tokens per logical expert since the last reset."""
        raise NotImplementedError

    def degraded_tokens(self) -> dict[str, int]:
        """Committed picks answered otherwise than by a live copy, by reason: generalist, drop. Cumulative."""
        raise NotImplementedError

    def lost_experts(self) -> list[tuple[int, ...]]:
        """[L] logical experts without a live copy under the bound group."""
        raise NotImplementedError

    def dense_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters every rank holds whole (gradients want an all-reduce)."""
        raise NotImplementedError

    def expert_parameters(self) -> list[ExpertParameter]:
        """This rank's stacked slots (gradients are complete on the owner; copies of one expert want summing)."""
        raise NotImplementedError

    def stage(self, new_map: ExpertMap, *, source: Path | None = None) -> "StagedSlots":
        """Bring the slots of `new_map` into memory beside the ones in use: resident experts are copied, others read from
        `source` (default: where the model came from). Steps may go on. Raises InvalidInput, OSError.
        """
        raise NotImplementedError

    def commit_map(self, staged: "StagedSlots") -> None:
        """Swap the staged slots in, at a step boundary that all ranks agreed on; `bind` must follow."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class StagedSlots:
    """Slots of a coming map, loaded and not yet in force."""

    expert_map: ExpertMap
    tensors: dict[str, torch.Tensor]
