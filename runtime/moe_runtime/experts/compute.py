"""Which code runs the rows that have come to this rank's slots.

    experts_cpu   SwiGLU experts (most families) in float32 on a CPU
    mixture       SwiGLU experts on a GPU (moe_runtime.kernels), packed ones too: codes are multiplied as they lie
    the family    its own forward, as transformers runs it, for every other

The choice is made at each call from the tensors themselves: parameters come and go with maps. What was chosen last is
told (`way`), and at the start it is held against the family's own forward (build._check_mixture).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moe_runtime.experts.families import ExpertsModule
from moe_runtime.experts.store import FamilyForward, PackedStore, SlotStore
from moe_runtime.kernels import experts_cpu, mixture

Mixes = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_TD, slot_TK, weight_TK) -> [T, D] the weighted sum over each token's picks; a pick of slot -1 gives nothing."""
_SWIGLU_PARAMETERS = ("gate_up_proj", "down_proj")


NOBODY, ONEDNN, TRITON, FAMILY = "nobody yet", "oneDNN", "Triton", "the family's own forward"


class SlotCompute:
    """One layer's slots as a function of rows. way: which code ran last, in words."""

    way: str = NOBODY

    def __init__(self, entry: ExpertsModule, family_forward: FamilyForward) -> None:
        self._module: Any = entry.module
        self.family_forward = family_forward
        self._is_swiglu = is_swiglu(entry)

    def __call__(self, rows_RD: torch.Tensor, slot_R1: torch.Tensor, ones_R1: torch.Tensor) -> torch.Tensor:
        """[R, D] each row through its slot's expert. R >= 1; the ones are the weights that a family's forward wants."""
        if self._is_swiglu:
            gate_up_S2FD, down_SDF = self._module.gate_up_proj, self._module.down_proj
            if rows_RD.dtype == torch.float32 and experts_cpu.runs_here(gate_up_S2FD, down_SDF):
                self.way = ONEDNN
                return experts_cpu.run_experts(rows_RD, slot_R1.squeeze(-1), gate_up_S2FD, down_SDF)
        self.way = FAMILY
        return self.family_forward(rows_RD, slot_R1, ones_R1)  # by position: families name them apart

    def kernel(self, x_TD: torch.Tensor, store: SlotStore) -> Mixes | None:
        """What does a whole mixture of such rows in one call, from packed codes as they lie too; None: nothing here."""
        if not self._is_swiglu:
            return None
        if isinstance(store, PackedStore):
            packing, stacks = store.packing, store.stacks()
            gate_up, down = (packing.packed(name, stacks) for name in _SWIGLU_PARAMETERS)
            may = not (torch.is_grad_enabled() and x_TD.requires_grad)  # the store says what is wrong with that
            if not (may and mixture.packed_runs_here(x_TD, gate_up, down, packing.packing)):
                return None
            self.way = TRITON
            return partial(mixture.mixture_packed, gate_up_S2FD=gate_up, down_SDF=down, packing=packing.packing)
        gate_up_S2FD, down_SDF = self._module.gate_up_proj, self._module.down_proj
        if not mixture.runs_here(x_TD, gate_up_S2FD, down_SDF):
            return None
        self.way = TRITON
        return partial(mixture.mixture, gate_up_S2FD=gate_up_S2FD, down_SDF=down_SDF)


def is_swiglu(entry: ExpertsModule) -> bool:
    """Whether an expert is down(silu(gate(x)) * up(x)) with gate and up stacked [S, 2F, D] and nothing else."""
    from transformers.activations import ACT2FN
    from transformers.integrations import moe

    module: Any = entry.module
    return (
        sorted(entry.parameter_names) == sorted(_SWIGLU_PARAMETERS)
        and len(list(module.parameters())) + len(list(module.buffers())) == len(_SWIGLU_PARAMETERS)
        and getattr(module, "has_gate", False)
        and not any(getattr(module, name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm"))
        and getattr(type(module), "_apply_gate", None) is getattr(moe, "_default_apply_gate", module)
        and isinstance(getattr(module, "act_fn", None), torch.nn.SiLU | type(ACT2FN["silu"]))
    )
