"""Where a family's layer keeps the weights that score experts, so that a router of ours can score with the same ones.

Nothing here knows a family by name: a gate is the one module beside the experts whose parameters are a row per expert
and, at most, a few numbers per expert. T tokens, D model, E logical experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_runtime.experts.families import ExpertsModule, UnsupportedModel, text_config

_PROBE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Gate:
    """`holder` keeps the weight [E, D] and perhaps a bias [E]; `module` (it or a parent of it) is what the layer calls,
    `block` the layer.

    Numbers per expert other than a linear bias (corrections of a score) belong to the family's own routing.
    """

    name: str
    module: torch.nn.Module
    holder: torch.nn.Module
    block: torch.nn.Module

    def correction(self) -> torch.Tensor | None:
        """[E] the family's own bias on the choice, in the gate or beside it; None where there is none or several."""
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        tensors += [*self.block.named_parameters(recurse=False), *self.block.named_buffers(recurse=False)]
        num_experts = self.holder.get_parameter("weight").shape[0]
        found = [t for name, t in tensors if t.numel() == num_experts and name.rpartition(".")[2] != "bias"]
        return found[0].reshape(-1) if len(found) == 1 else None

    @property
    def dim(self) -> int:
        return self.holder.get_parameter("weight").shape[1]

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, E] float32, whatever the model computes in."""
        weight_ED = self.holder.get_parameter("weight")
        bias_E = dict(self.holder.named_parameters(recurse=False)).get("bias")
        return torch.nn.functional.linear(x_TD.float(), weight_ED.float(), None if bias_E is None else bias_E.float())


def find_gate(model: torch.nn.Module, entry: ExpertsModule) -> Gate:
    """The gate beside these experts. Raises UnsupportedModel."""
    family = str(model.config.model_type)  # type: ignore[union-attr]
    block_name = entry.name.rpartition(".")[0]
    found = [
        (name, module, holder)
        for name, module in model.get_submodule(block_name).named_children()
        if module is not entry.module and (holder := _holder(module, entry.num_experts)) is not None
    ]
    if len(found) != 1:
        named = ", ".join(name for name, *_ in found) or "none"
        raise UnsupportedModel(
            family, f"a router of ours needs the one gate beside {entry.name}, with a row per expert: found {named}"
        )
    name, module, holder = found[0]
    return Gate(f"{block_name}.{name}", module, holder, model.get_submodule(block_name))


def _holder(module: torch.nn.Module, num_experts: int) -> torch.nn.Module | None:
    """What holds the weight, if all that `module` has is one and numbers per expert."""
    rows = None
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and parameter.shape[0] == num_experts and rows is None:
            path, _, own = name.rpartition(".")
            if own != "weight":
                return None
            rows = module.get_submodule(path)
        elif parameter.numel() != num_experts:
            return None
    return rows


@torch.no_grad()
def check_gates(model: torch.nn.Module, entries: Sequence[ExpertsModule], gates: Sequence[Gate]) -> None:
    """Refuse a layer whose gate sees something else than its experts do (a norm of its own, a wider input).

    `model` must have weights; its experts may be off. Raises UnsupportedModel.
    """
    seen: dict[int, torch.Tensor] = {}

    def note(module: torch.nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        seen[id(module)] = (*given, *named.values())[0]

    modules = [entry.module for entry in entries] + [gate.module for gate in gates]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    vocab_size = int(text_config(model.config).vocab_size)
    device = next(model.parameters()).device
    try:
        model(input_ids=torch.arange(1, 1 + _PROBE_TOKENS, device=device).unsqueeze(0) % vocab_size, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    family = str(model.config.model_type)  # type: ignore[union-attr]
    for entry, gate in zip(entries, gates, strict=True):
        x, given = seen.get(id(entry.module)), seen.get(id(gate.module))
        if x is None or given is None or given.numel() != x.numel() or not torch.equal(given.reshape(x.shape), x):
            raise UnsupportedModel(family, f"{gate.name} is given something else than {entry.name}: no router of ours")
