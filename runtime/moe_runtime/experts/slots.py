"""An experts module of transformers turned into numbered slots on this rank, with the dispatch in front of it.

The module keeps its class and its own forward, which runs the slots as top-1 with weight one on whatever rows arrive;
only its parameters (slots instead of experts) and its entry are ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_core.contract.expert_map import EMPTY_SLOT
from moe_runtime.dispatch.mixture import mix
from moe_runtime.dispatch.step import StepContext
from moe_runtime.experts.compute import SlotCompute
from moe_runtime.experts.families import ExpertsModule
from moe_runtime.experts.ladder import LayerLadder, SharedExpert
from moe_runtime.experts.packing import LayerPacking, Stacks
from moe_runtime.experts.routed import RoutedLayer
from moe_runtime.experts.store import make_store
from moe_runtime.experts.weights import WeightSource

Watch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Sees (x_TD, expert_TK, weight_TK) of a layer, as routed."""


class SlottedExperts:
    """One MoE layer of this rank: its slots, who is in them, and the way from routed tokens to the mixture's output.

    router: a router of ours, which answers instead of the family's own.
    """

    router: RoutedLayer | None = None

    def __init__(
        self,
        entry: ExpertsModule,
        layer_idx: int,
        context: StepContext,
        shared: SharedExpert | None,
        packing: LayerPacking | None = None,
    ) -> None:
        """packing: how experts are kept; None: in full, as parameters that can be trained."""
        self.entry, self.layer_idx, self._context = entry, layer_idx, context
        self.store = make_store(entry, packing)
        self.watch: Watch | None = None
        self.logical_of_slot: tuple[int, ...] = ()
        self.ladder = LayerLadder(shared)
        self.compute = SlotCompute(entry, entry.module.forward)
        entry.module.forward = self._forward

    def install(self, stacks: Stacks, logical_of_slot: Sequence[int], device: str) -> None:
        """Put `stacks` (name -> [slots, ...]) into the slots."""
        self.store.install(stacks, device)
        self.logical_of_slot = tuple(logical_of_slot)

    def read(self, weights: WeightSource, logical_of_slot: Sequence[int]) -> Stacks:
        """Stacks for these slots: experts that are resident are copied, the others read. Empty slots are zero.

        A layer whose slots stay as they are gives the tensors that lie in them: most layers of a new map are such.
        """
        now = self.store.stacks()
        # no slots may also mean that nothing has been installed yet, and then nothing lies there
        if now and tuple(logical_of_slot) == self.logical_of_slot:
            return now
        wanted = [e for e in dict.fromkeys(logical_of_slot) if e != EMPTY_SLOT]
        resident = {e: slot for slot, e in enumerate(self.logical_of_slot) if e != EMPTY_SLOT}
        missing = [e for e in wanted if e not in resident]
        fetched = self.store.fetch(weights, missing) if missing else {}
        staged = self.store.blank(len(logical_of_slot))
        for name, stack in staged.items():
            for slot, logical_id in enumerate(logical_of_slot):
                if logical_id in resident:
                    stack[slot] = now[name][resident[logical_id]]
                elif logical_id != EMPTY_SLOT:
                    stack[slot] = fetched[name][missing.index(logical_id)]
        return staged

    def run_slots(self, rows_RD: torch.Tensor, local_slot_R: torch.Tensor) -> torch.Tensor:
        """[R, D] this rank's slots on rows, unweighted. R >= 1."""
        ones_R1 = rows_RD.new_ones(len(rows_RD), 1)
        with self._context.stopwatch.running(rows_RD.shape[0]):
            slot_R1 = local_slot_R.unsqueeze(-1)
            if (kernel := self.compute.kernel(rows_RD, self.store)) is not None:
                return kernel(rows_RD, slot_R1, ones_R1)
            return self.store.run(self.compute, rows_RD, slot_R1, ones_R1)

    def _forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden_TD, expert_TK, weight_TK = (*args, *kwargs.values())
        if self._context.experts_off:
            return torch.zeros_like(hidden_TD)
        valid_V = self._context.valid_V
        if valid_V is None:
            return self._routed(hidden_TD, expert_TK, weight_TK, None)
        # padding is neither dispatched nor counted
        mixed_VD = self._routed(hidden_TD[valid_V], expert_TK[valid_V], weight_TK[valid_V], valid_V)
        return torch.zeros_like(hidden_TD).index_copy(0, valid_V, mixed_VD)

    def _routed(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, valid_V: torch.Tensor | None
    ) -> torch.Tensor:
        if self.router is None:
            return self._mixture(x_TD, expert_TK, weight_TK)
        return self.router.mix(x_TD, valid_V, self._mixture, group=self._context.group)

    def _mixture(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, *, of_tokens: bool = True
    ) -> torch.Tensor:
        if self.watch is not None:
            self.watch(x_TD, expert_TK, weight_TK)
        context = self._context
        # a pick that nobody takes has no weight: nobody answers for it
        address_TK = context.address(self.layer_idx, expert_TK, may_be_nobody=self.router is not None)
        layer = context.plan.layers[self.layer_idx]
        local_TD: torch.Tensor | None = None
        if layer.lost:
            context.mark_degraded(self.layer_idx, expert_TK, of_tokens=of_tokens)
            weight_TK, local_TD = self.ladder.answer(x_TD, expert_TK, address_TK, weight_TK)
        is_whole = context.group is None and self.router is None and not layer.lost  # every pick has a slot here
        if is_whole and (kernel := self.compute.kernel(x_TD, self.store)) is not None:
            with context.stopwatch.running(address_TK.numel()):
                return kernel(x_TD, address_TK, weight_TK)
        mixed_TD = mix(
            x_TD,
            address_TK,
            weight_TK,
            context=context,
            run_slots=self.run_slots,
            only_by_pick=self.router is not None and self.router.may_differ_by_rank,
        )
        return mixed_TD if local_TD is None else mixed_TD + local_TD
