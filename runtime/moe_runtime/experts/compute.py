"""Which code runs the rows that have come to this rank's slots.

    experts_cpu   SwiGLU experts (most families) in float32 on a CPU
    mixture       SwiGLU experts on a GPU (moe_runtime.kernels), packed ones too: codes are multiplied as they lie
    the family    its own forward, as transformers runs it, for every other

The choice is made at each call from the tensors themselves: parameters come and go with maps. What was chosen last is
told (`way`), and at the start it is held against the family's own forward (build._check_mixture).
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_runtime.experts.families import ExpertsModule
from moe_runtime.experts.packing import LayerPacking, Stacks
from moe_runtime.kernels import experts_cpu, mixture

FamilyForward = Callable[..., torch.Tensor]
_SWIGLU_PARAMETERS = ("gate_up_proj", "down_proj")


NOBODY, ONEDNN, TRITON, FAMILY = "nobody yet", "oneDNN", "Triton", "the family's own forward"


class SlotCompute:
    """One layer's slots as a function of rows. way: which code ran last, in words."""

    way: str = NOBODY

    def __init__(self, entry: ExpertsModule, family_forward: FamilyForward) -> None:
        self._module: Any = entry.module
        self.family_forward = family_forward
        self._is_swiglu = is_swiglu(entry)

    def __call__(self, rows_RD: torch.Tensor, slot_R: torch.Tensor) -> torch.Tensor:
        """[R, D] each row through its slot's expert, unweighted. R >= 1."""
        if self._is_swiglu:
            gate_up_S2FD, down_SDF = self._module.gate_up_proj, self._module.down_proj
            if rows_RD.dtype == torch.float32 and experts_cpu.runs_here(gate_up_S2FD, down_SDF):
                self.way = ONEDNN
                return experts_cpu.run_experts(rows_RD, slot_R, gate_up_S2FD, down_SDF)
            if mixture.runs_here(rows_RD, gate_up_S2FD, down_SDF):
                self.way = TRITON
                ones_R1 = rows_RD.new_ones(len(rows_RD), 1)
                return mixture.mixture(rows_RD, slot_R.unsqueeze(-1), ones_R1, gate_up_S2FD, down_SDF)
        self.way = FAMILY
        ones_R1 = rows_RD.new_ones(len(rows_RD), 1)
        # by position: families name their arguments apart
        return self.family_forward(rows_RD, slot_R.unsqueeze(-1), ones_R1)

    def packed(
        self, rows_RD: torch.Tensor, slot_R: torch.Tensor, packing: LayerPacking, stacks: Stacks
    ) -> torch.Tensor | None:
        """The same from codes as they lie; None: not here, they must be unpacked."""
        if not self._is_swiglu or (torch.is_grad_enabled() and rows_RD.requires_grad):
            return None
        gate_up_S2FD, down_SDF = (packing.packed(name, stacks) for name in _SWIGLU_PARAMETERS)
        if not mixture.packed_runs_here(rows_RD, gate_up_S2FD, down_SDF, packing.packing):
            return None
        self.way = TRITON
        ones_R1 = rows_RD.new_ones(len(rows_RD), 1)
        return mixture.mixture_packed(
            rows_RD, slot_R.unsqueeze(-1), ones_R1, gate_up_S2FD, down_SDF, packing=packing.packing
        )


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
