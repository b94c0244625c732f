"""A transformers MoE model whose experts live in slots spread over the ranks of an epoch: the facade for engine and
trainer.

    epm = ExpertParallelModel.load(source, expert_map=emap, rank=2)         # weights of this rank's slots only
    epm.bind(group, expert_map=emap)                                        # at each new epoch; group None: alone
    logits_BV = epm.forward_tokens(ids_BQ, positions_BQ, rows_B, cache)     # GroupFault: rollback, bind, once more
    epm.commit()                                                            # the step counts, its cache grows
    loss = epm.module(input_ids=ids, labels=ids).loss; loss.backward()      # training: through the same dispatch

Suffixes: B rows of a batch, Q query tokens per row, T = B*Q tokens, V vocabulary, L MoE layers, E logical experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_core.contract.dispatch import goes_by_node, row_bytes
from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.contract.packing import FULL
from moe_core.contract.router import LocalityConfig
from moe_core.contract.runtime_config import DispatchConfig, ModelSource
from moe_core.outcome import InvalidInput
from moe_runtime.dispatch.by_node import Relay
from moe_runtime.dispatch.group_face import Group
from moe_runtime.dispatch.plan import logical_of_local_slot, make_plan
from moe_runtime.dispatch.step import StepContext
from moe_runtime.engine.answers import Fallback, PickCounts, settle_answers
from moe_runtime.engine.cache import StepCache
from moe_runtime.engine.forward import BatchedForward, RowForward, Step, choose_forward
from moe_runtime.experts.build import BuiltModel, build, open_weights
from moe_runtime.experts.digest import slot_digests
from moe_runtime.experts.families import ModelFacts, check_map, text_config
from moe_runtime.experts.generalists import Generalists, read_generalists
from moe_runtime.experts.layout import layouts
from moe_runtime.experts.routed import RouterRequest

TakeRouted = Callable[[Sequence[tuple[int, torch.Tensor]]], None]
"""Gets (MoE layer, expert_TK) of a step, a layer perhaps in several parts."""


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


@dataclass(frozen=True, slots=True)
class StagedSlots:
    """Slots of a coming map, loaded and not yet in force: per MoE layer, parameter name -> [slots, ...]."""

    expert_map: ExpertMap
    tensors: tuple[dict[str, torch.Tensor], ...]
    digests: tuple[tuple[int, ...], ...] = ()
    """[L][slots], of these tensors."""


class ExpertParallelModel:
    """One rank's part of the model. Not thread-safe: only the step loop calls it (`stage` may run in another thread).

    module            the transformers model; dense parameters are whole, experts' parameters hold this rank's slots
    facts             family, num_layers (MoE layers, L), num_experts (E), top_k (K), vocab_size (V)
    expert_map        the map in force
    routed            routers of ours, None where the family's own route
    packing           how this rank keeps its experts
    degraded_rows     whether each row of the last `forward_tokens` met a lost expert
    """

    def __init__(
        self, built: BuiltModel, *, source: ModelSource, rank: int, seed: int, fallback: Fallback, group_ranks: int = 0
    ) -> None:
        self.module: Any = built.module
        self.facts: ModelFacts = built.facts
        self.expert_map: ExpertMap = built.expert_map
        self.routed = built.routed
        self.packing = built.packing
        self.rank = rank
        self._group_ranks = group_ranks
        self.degraded_rows: list[bool] = []
        self._layers = built.layers
        self._forward: BatchedForward | RowForward | None = None
        self._context: StepContext = built.context
        self._source, self._seed, self._fallback, self._device = source, seed, fallback, built.device
        self._expert_names = frozenset(
            f"{layer.entry.name}.{name}" for layer in built.layers for name in layer.entry.parameter_names
        )
        self._generalists = read_generalists(Path(source.path)) if source.path is not None else None
        self._counts = PickCounts(self.facts.num_layers, self.facts.num_experts)
        self._slot_digests: tuple[tuple[int, ...], ...] | None = None
        self._last_cache: StepCache | None = None
        self._take_routed: TakeRouted | None = None
        self.bind(None)

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
        dispatch: DispatchConfig | None = None,
        router: RouterRequest | None = None,
        locality: LocalityConfig | None = None,
    ) -> "ExpertParallelModel":
        """Build the model with the dense weights and this rank's slots only, in float32.

        A shape is initialised from `seed`: dense weights are identical on all ranks and an expert's weights do not
        depend on the layout. Raises UnsupportedModel (family and why), InvalidInput (map and model disagree), OSError.
        Generalists and routers are read from the checkpoint's folder when they lie there; `router` is for a model that
        has none, and with `locality` tokens prefer near experts. Bound to no group: `bind` comes next.
        """
        dispatch = dispatch or DispatchConfig()
        built = build(
            source,
            expert_map=expert_map,
            rank=rank,
            device=device,
            seed=seed,
            dispatch=dispatch,
            router=router,
            locality=locality,
        )
        return cls(built, source=source, rank=rank, seed=seed, fallback=fallback, group_ranks=dispatch.group_ranks)

    @property
    def experts_way(self) -> str:
        """Which code ran this rank's slots last, in words (moe_runtime.experts.compute)."""
        return self._layers[0].compute.way

    @property
    def num_layers(self) -> int:
        return self.facts.num_layers

    @property
    def num_experts(self) -> int:
        return self.facts.num_experts

    @property
    def top_k(self) -> int:
        return self.facts.top_k

    # ---------------------------------------------------------------- epochs

    def bind(self, group: Group | None, *, expert_map: ExpertMap | None = None) -> None:
        """Use `group` (None: this rank alone) and recompute who answers for each expert from its living ranks.

        `expert_map` must assign this rank the slots that are loaded; None keeps the map in force. Uncommitted counters
        are dropped. Raises InvalidInput.
        """
        new_map = expert_map if expert_map is not None else self.expert_map
        for layer in self._layers:
            wanted = logical_of_local_slot(new_map, self.rank, layer.layer_idx)
            if wanted != layer.logical_of_slot:
                raise InvalidInput(
                    f"layer {layer.layer_idx}: the map gives rank {self.rank} the experts {list(wanted)}, "
                    f"its slots hold {list(layer.logical_of_slot)}; stage and commit the map first"
                )
        self.expert_map = new_map
        ranks = group.ranks if group is not None else (self.rank,)
        domains = group.domains if group is not None else None
        plan = make_plan(
            new_map, ranks, rank=self.rank, domains=domains, group_ranks=self._group_ranks, device=self._device
        )
        self._context.plan, self._answers = settle_answers(
            plan,
            self._layers,
            self._generalists if self._fallback == "Generalist" else None,
            expert_map=new_map,
            fallback=self._fallback,
            num_experts=self.num_experts,
            device=self._device,
        )
        self._context.group = group if group is not None and group.size > 1 else None
        self._context.relay = None
        if domains is not None and goes_by_node(
            self._context.hierarchy, domains, top_k=self.top_k, ranks=ranks, group_ranks=self._group_ranks
        ):
            self._context.relay = Relay.of(domains, position=plan.position, device=self._device)
        if self.routed is not None:
            self.routed.use_layouts(layouts(new_map, plan, domains))
        self.rollback()

    def use_generalists(self, generalists: Generalists | None) -> None:
        """Answer for lost experts with these from now on (None: drop)."""
        self._generalists = generalists
        self.bind(self._context.group)

    def lost_experts(self) -> list[tuple[int, ...]]:
        """[L] logical experts without a live copy under the bound group."""
        return [layer.lost for layer in self._context.plan.layers]

    # ---------------------------------------------------------------- serving

    def new_cache(self, *, num_rows: int, max_length: int) -> StepCache:
        """A cache for `num_rows` sequences of up to `max_length` tokens. Raises UnsupportedModel."""
        if self._forward is None:
            self._forward = choose_forward(self.module, self._context, self._device)
        return self._forward.new_cache(num_rows=num_rows, max_length=max_length)

    @torch.no_grad()
    def forward_tokens(
        self,
        input_ids_BQ: torch.Tensor | None,
        positions_BQ: torch.Tensor | None,
        rows_B: Sequence[int],
        cache: StepCache,
        *,
        tokens_of_rank: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """One serving step: logits [B, V] (float32) of the last valid token of each row.

        positions_BQ: position of each token in its own sequence, -1 for padding (either side). rows_B: cache rows.
        A rank without tokens passes None, None, () and gets [0, V]; it takes part in every layer.
        tokens_of_rank: valid tokens per position from the control exchange; None costs one exchange more.
        Raises GroupFault: nothing is committed then, call `rollback`, `bind` and run the same step again.
        """
        assert self._forward is not None, "the cache comes from new_cache"
        self._last_cache = cache
        if input_ids_BQ is None or positions_BQ is None or input_ids_BQ.numel() == 0:
            input_ids_BQ, positions_BQ, rows_B = None, None, ()
        told = None if tokens_of_rank is None else tuple(tokens_of_rank)
        result = self._forward.run(Step(input_ids_BQ, positions_BQ, tuple(rows_B), told), cache)
        self.degraded_rows = result.degraded_B
        return result.logits_BV

    # ---------------------------------------------------------------- the step as a transaction

    def commit(self) -> None:
        """The step counts: pending load and degraded counters are added, the cache of the last step grows."""
        self._counts.add(self._context.pending_LE.cpu(), self._answers)
        if self._last_cache is not None:
            self._last_cache.commit()
        if self._take_routed is not None and self._context.routed is not None:
            self._take_routed(self._context.routed)
        self._forget()

    def rollback(self) -> None:
        """The step never happened: pending counters and pending cache lengths are dropped."""
        if self._last_cache is not None:
            self._last_cache.rollback()
        self._forget()

    def _forget(self) -> None:
        self._last_cache = None
        if self.routed is not None:
            self.routed.forget()
        self._context.degraded_T = None
        self._context.routed = None if self._take_routed is None else []
        self._context.pending_LE = torch.zeros(
            self.num_layers, self.num_experts, dtype=torch.int64, device=self._device
        )

    def record(self, take: TakeRouted) -> None:
        """From now on `take` gets what each committed step has routed on this rank."""
        self._take_routed = take
        self._forget()

    def pending_load(self) -> torch.Tensor:
        """[L, E] int64: picks of this rank's own tokens since the last commit or rollback."""
        return self._context.pending_LE

    def load_window(self, *, reset: bool = False) -> list[list[int]]:
        """[L][E] committed picks of this rank's own tokens per logical expert since the last reset."""
        return self._counts.window(reset=reset)

    def expert_work(self) -> tuple[float, int]:
        """(seconds, rows) of this rank's experts in all steps so far, committed or not."""
        return self._context.stopwatch.read()

    def wire_error(self) -> dict[str, float]:
        """By leg (dispatch, combine, gradient) the relative error of what this rank sent since it was last asked."""
        return self._context.legs.error.take()

    def pick_bytes(self) -> int:
        """What one token sends to one expert and gets back from it."""
        legs, dim = self._context.legs, int(text_config(self.module.config).hidden_size)
        return row_bytes(legs.there.wire, dim) + row_bytes(legs.back.wire, dim)

    def expert_bytes(self) -> int:
        """Of one physical expert of one layer; layers are alike."""
        if not self._layers[0].logical_of_slot:
            return 0
        return sum(stack[0].nbytes for stack in self._layers[0].store.stacks().values())

    def degraded_tokens(self) -> dict[str, int]:
        """Committed picks answered otherwise than by a live copy, by reason: generalist, drop. Cumulative."""
        return dict(self._counts.degraded)

    # ---------------------------------------------------------------- parameters and moves

    def dense_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters every rank holds whole (gradients want an all-reduce)."""
        yield from ((n, p) for n, p in self.module.named_parameters() if n not in self._expert_names)
        if self.routed is not None:
            yield from self.routed.named_parameters()

    def zero_grad(self) -> None:
        self.module.zero_grad(set_to_none=True)
        if self.routed is not None:
            self.routed.zero_grad()

    def dense_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Buffers that a checkpoint holds; every rank has them whole."""
        saved = self.module.state_dict()
        yield from ((name, buffer) for name, buffer in self.module.named_buffers() if name in saved)
        if self.routed is not None:
            yield from self.routed.named_buffers()

    def expert_parameters(self) -> list[ExpertParameter]:
        """This rank's stacked slots. Gradients of a slot are complete but for other copies of the same expert.

        Raises InvalidInput where experts are packed: codes are no parameters.
        """
        if self.packing != FULL:
            raise InvalidInput(f"experts are packed as {self.packing}: they answer, they cannot be trained")
        return [
            ExpertParameter(
                f"{layer.entry.name}.{name}",
                layer.layer_idx,
                layer.entry.module.get_parameter(name),
                layer.logical_of_slot,
            )
            for layer in self._layers
            for name in layer.entry.parameter_names
        ]

    def stage(self, new_map: ExpertMap, *, source: Path | None = None) -> StagedSlots:
        """Bring the slots of `new_map` into memory beside the ones in use: resident experts are copied, others read
        from `source` (default: where the model came from). Steps may go on. Raises InvalidInput, OSError.
        """
        check_map(new_map, self.facts)
        weights = open_weights(
            ModelSource(path=str(source)) if source is not None else self._source, self.module, seed=self._seed
        )
        wanted = [logical_of_local_slot(new_map, self.rank, layer.layer_idx) for layer in self._layers]
        tensors = tuple(layer.read(weights, ids) for layer, ids in zip(self._layers, wanted, strict=True))
        return StagedSlots(new_map, tensors, tuple(map(slot_digests, tensors, wanted)))

    def commit_map(self, staged: StagedSlots) -> int:
        """Swap the staged slots in, at a step boundary that all ranks agreed on; `bind` must follow. Returns the bytes
        of experts that were not on this rank before."""
        moved = 0
        for layer, tensors in zip(self._layers, staged.tensors, strict=True):
            logical_of_slot = logical_of_local_slot(staged.expert_map, self.rank, layer.layer_idx)
            new = set(logical_of_slot) - set(layer.logical_of_slot) - {EMPTY_SLOT}
            moved += len(new) * sum(stack[:1].nbytes for stack in tensors.values())
            layer.install(tensors, logical_of_slot, device=self._device)
        self.expert_map = staged.expert_map
        # On a CPU the staged tensors themselves lie in the slots now; elsewhere they were copied and are read again.
        self._slot_digests = (staged.digests or None) if self._device == "cpu" else None
        return moved

    # ---------------------------------------------------------------- what lies in the slots

    def slot_digests(self, *, fresh: bool = False) -> tuple[tuple[int, ...], ...]:
        """[L][local slots], read from the slots' memory once after each change of the map, and when `fresh`.

        For serving: a training step changes what lies there.
        """
        if self._slot_digests is None or fresh:
            self._slot_digests = tuple(
                slot_digests(layer.store.stacks(), layer.logical_of_slot) for layer in self._layers
            )
        return self._slot_digests

    def holds(self, layer_idx: int, logical_id: int) -> bool:
        return logical_id in self._layers[layer_idx].logical_of_slot

    def slot_digest(self, layer_idx: int, logical_id: int) -> int:
        """Of this rank's copy."""
        return self.slot_digests()[layer_idx][self._layers[layer_idx].logical_of_slot.index(logical_id)]

    def source_digest(self, layer_idx: int, logical_id: int) -> int:
        """Of one expert as the model's source gives it now. Raises InvalidInput, OSError."""
        weights = open_weights(self._source, self.module, seed=self._seed)
        return slot_digests(self._layers[layer_idx].store.fetch(weights, [logical_id]), (logical_id,))[0]
