"""What a step tells beside its gradients: flat numbers that are summed over ranks, and what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.train.losses import Losses


@dataclass(frozen=True, slots=True)
class Figures:
    """One rank's part of a step, or all ranks' sum. `text`: nats per byte; `losses`, `counts`: of the routers, by name,
    the same names on all ranks; load_LE int64 picks of logical experts.
    """

    text: float
    losses: dict[str, float]
    counts: dict[str, int]
    load_LE: torch.Tensor

    @classmethod
    def of(cls, found: Losses, epm: ExpertParallelModel, *, size: int) -> "Figures":
        """This rank's part of the mean over `size` ranks."""
        values = torch.stack([found.text, *found.router.values()]).detach() / size
        text, *losses = values.tolist()  # device sync: what is told
        counts = {} if epm.routed is None else dict(sorted(epm.routed.counts.items()))
        return cls(text, dict(zip(found.router, losses, strict=True)), counts, epm.pending_load().cpu())

    @property
    def numbers(self) -> tuple[float, ...]:
        """For the exchange; whole numbers pass it exactly up to 2^53."""
        load = map(float, self.load_LE.reshape(-1).tolist())
        return (self.text, *self.losses.values(), *map(float, self.counts.values()), *load)

    def summed(self, numbers: Sequence[float]) -> "Figures":
        """The same figures of all ranks, from the exchange."""
        rest = list(numbers)
        text = rest.pop(0)
        losses = {name: rest.pop(0) for name in self.losses}
        counts = {name: int(rest.pop(0)) for name in self.counts}
        return Figures(text, losses, counts, torch.tensor(rest, dtype=torch.float64).long().view_as(self.load_LE))
