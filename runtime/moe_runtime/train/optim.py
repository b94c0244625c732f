"""Optimizers whose state is plain tensors by name, so that a snapshot can hand an expert's state to any rank.

AdamW (Loshchilov & Hutter 2019) for everything, or Muon (Jordan et al. 2024): the momentum of a weight matrix is
replaced by the nearest orthogonal matrix before it is applied, whole stacks of experts in one batched product;
embeddings, norms, biases and routers stay on AdamW. Muon's update is scaled to AdamW's usual size (Moonlight, 2025),
so that one learning rate serves both.

Nothing here talks to other ranks: gradients come in complete, every rank applies the same update to what it shares.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Rule = Literal["AdamW", "Muon"]

ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-10
MUON_MOMENTUM = (0.85, 0.95)
"""Momentum at the first step and from MUON_MOMENTUM_STEPS on."""
MUON_MOMENTUM_STEPS = 100
MUON_SIZE = 0.2
"""Root mean square of an AdamW update, which Muon's is scaled to."""
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic whose iteration drives all singular values towards one; chosen for its slope at zero, not for precision."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One trained tensor. `per_expert`: row s belongs to the expert in slot s, and so does row s of its state."""

    name: str
    tensor: torch.Tensor
    rule: Rule
    per_expert: bool

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum",) if self.rule == "Muon" else ("mean", "square")


def rule_for(tensor: torch.Tensor, *, optimizer: Rule, per_expert: bool, is_embedding: bool, num_experts: int) -> Rule:
    """Muon only for weight matrices inside the layers; a router has one row per expert."""
    matrix_dims = tensor.ndim - (1 if per_expert else 0)
    is_router = not per_expert and tensor.ndim == 2 and tensor.shape[0] == num_experts
    return "Muon" if optimizer == "Muon" and matrix_dims == 2 and not is_embedding and not is_router else "AdamW"


class Optimizer:
    """State and update rule of this rank's tensors."""

    def __init__(self, trained: Sequence[Trained], *, learning_rate: float, weight_decay: float) -> None:
        self.trained = tuple(trained)
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self.state: dict[str, dict[str, torch.Tensor]] = {
            item.name: {moment: torch.zeros_like(item.tensor) for moment in item.moments} for item in trained
        }

    @torch.no_grad()
    def apply(self, gradients: Mapping[str, torch.Tensor], *, rate_share: float, step: int) -> None:
        """One update. `rate_share` of the learning rate (schedule), `step` counts from 0."""
        rate = self._learning_rate * rate_share
        present = [item for item in self.trained if item.tensor.numel() > 0]
        adam = [item for item in present if item.rule == "AdamW"]
        if adam:
            self._apply_adam(adam, gradients, rate=rate, step=step)
        for shape_group in _by_matrix_shape([item for item in present if item.rule == "Muon"]):
            self._apply_muon(shape_group, gradients, rate=rate, step=step)

    def _apply_adam(
        self, items: Sequence[Trained], gradients: Mapping[str, torch.Tensor], *, rate: float, step: int
    ) -> None:
        beta1, beta2 = ADAM_BETAS
        tensors = [item.tensor for item in items]
        grads = [gradients[item.name] for item in items]
        means = [self.state[item.name]["mean"] for item in items]
        squares = [self.state[item.name]["square"] for item in items]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2 ** (step + 1)) ** 0.5)
        torch._foreach_add_(roots, ADAM_EPSILON)
        decayed = [item.tensor for item in items if item.tensor.ndim - item.per_expert >= 2]
        if self._weight_decay and decayed:
            torch._foreach_mul_(decayed, 1 - rate * self._weight_decay)
        torch._foreach_addcdiv_(tensors, means, roots, -rate / (1 - beta1 ** (step + 1)))

    def _apply_muon(
        self, items: Sequence[Trained], gradients: Mapping[str, torch.Tensor], *, rate: float, step: int
    ) -> None:
        first, last = MUON_MOMENTUM
        momentum = first + (last - first) * min(1.0, step / MUON_MOMENTUM_STEPS)
        wanted = []
        for item in items:
            gradient = gradients[item.name]
            buffer = self.state[item.name]["momentum"]
            buffer.lerp_(gradient, 1 - momentum)
            ahead = gradient.lerp(buffer, momentum)  # Nesterov
            wanted.append(ahead.reshape(-1, *ahead.shape[-2:]))
        direction_nRC = orthogonalised(torch.cat(wanted))
        rows, columns = direction_nRC.shape[-2:]
        size = MUON_SIZE * max(rows, columns) ** 0.5
        for item, direction in zip(items, torch.split(direction_nRC, [w.shape[0] for w in wanted]), strict=True):
            if self._weight_decay:
                item.tensor.mul_(1 - rate * self._weight_decay)
            item.tensor.add_(direction.reshape(item.tensor.shape), alpha=-rate * size)


def orthogonalised(matrix_nRC: torch.Tensor) -> torch.Tensor:
    """[n, R, C] each matrix's singular values brought near one (0.7 to 1.2), singular vectors kept; zero stays zero."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix_nRC.shape[-2] > matrix_nRC.shape[-1]
    x: torch.Tensor = matrix_nRC.mT if tall else matrix_nRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _by_matrix_shape(items: Iterable[Trained]) -> list[list[Trained]]:
    groups: dict[tuple[int, ...], list[Trained]] = {}
    for item in items:
        groups.setdefault(tuple(item.tensor.shape[-2:]), []).append(item)
    return list(groups.values())
