"""A router of the user's own: a class named `module:Class`, built as ours are, its every answer checked.

    class Mine(torch.nn.Module):
        looks_ahead = False
        def __init__(self, *, num_experts: int, top_k: int, dim: int, layer_idx: int, options: Mapping[str, str]): ...
        def forward(self, tokens: Tokens, moment: Moment) -> Routing: ...

`before_gate`, `use_layout` and `after_step` of `face.Router` may be left out.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.errors import RuntimeFault
from moe_runtime.router.check import checked
from moe_runtime.router.face import Layout, Moment, Routing, Tokens

_MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class CustomRouter(torch.nn.Module):
    """Raises InvalidInput when the class cannot be had or is no router, and at each answer that is none."""

    def __init__(
        self, class_path: str, *, num_experts: int, top_k: int, dim: int, layer_idx: int, options: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.num_experts, self._told = num_experts, f"router {class_path} of layer {layer_idx}"
        made = _load(class_path)
        try:
            router = made(num_experts=num_experts, top_k=top_k, dim=dim, layer_idx=layer_idx, options=options)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise InvalidInput(
                f"classPath {class_path}: cannot be built with options {dict(options)}: {why}"
            ) from error
        if not isinstance(router, torch.nn.Module) or not isinstance(getattr(router, "looks_ahead", None), bool):
            raise InvalidInput(f"classPath {class_path}: a router is a torch.nn.Module with looks_ahead True or False")
        self.router: Any = router
        self.looks_ahead = bool(router.looks_ahead)

    def before_gate(self, x_TD: torch.Tensor, moment: Moment) -> torch.Tensor:
        if not hasattr(self.router, "before_gate"):
            return x_TD
        seen_TD = self.router.before_gate(x_TD, moment)
        if not isinstance(seen_TD, torch.Tensor) or (seen_TD.shape, seen_TD.dtype) != (x_TD.shape, x_TD.dtype):
            raise InvalidInput(f"{self._told}: before_gate gives a tensor like its input, {x_TD.dtype} {[*x_TD.shape]}")
        return seen_TD

    def forward(self, tokens: Tokens, moment: Moment) -> Routing:
        try:
            return checked(self.router(tokens, moment), tokens, num_experts=self.num_experts)
        except InvalidInput as error:
            raise InvalidInput(f"{self._told}: {error}") from error
        except (RuntimeFault, torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # none of its own: a peer is gone, or the device is full
        except _MISTAKES as error:
            raise InvalidInput(f"{self._told}: {type(error).__name__}: {error}") from error

    def use_layout(self, layout: Layout) -> None:
        if hasattr(self.router, "use_layout"):
            self.router.use_layout(layout)

    def after_step(self, load_E: torch.Tensor) -> None:
        if hasattr(self.router, "after_step"):
            with torch.no_grad():
                self.router.after_step(load_E)


def _load(class_path: str) -> type:
    module_name, _, name = class_path.partition(":")
    try:
        found = getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(f"classPath {class_path}: cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise InvalidInput(f"classPath {class_path}: is no class but a {type(found).__name__}")
    return found
