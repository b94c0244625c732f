"""What the step loop drives: serving or training, seen from the loop. One thread calls all of it.

A step is a transaction: `run` either finishes, or raises GroupFault and `rollback` leaves everything as before it.
"""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from moe_core.contract.exchange import Coverage, TrainingProgress
from moe_core.contract.expert_map import ExpertMap
from moe_core.outcome import MoeratorError
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.membership.group import EpochGroup


@dataclass(slots=True)
class WorkReport:
    """Written by the loop's thread, read by the coordinator link; plain values that are replaced, never changed."""

    tokens: int = 0
    degraded_tokens: dict[str, int] = field(default_factory=dict)
    load: tuple[tuple[int, ...], ...] = ()
    expert_work: tuple[float, int] = (0.0, 0)
    """Seconds that this rank's experts took, and for how many rows."""
    wire_error: dict[str, float] = field(default_factory=dict)
    """By leg of the dispatch, of the newest steps that were looked at."""
    training: TrainingProgress | None = None


class ModelUnusable(RuntimeError):
    """No restart can mend it: the checkpoint is missing, damaged, or of a family that is not supported."""


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Around the reading of a model: whatever can be wrong in a checkpoint becomes ModelUnusable, which says `what`.

    What another try may mend passes as it is: a disk or volume (OSError), memory, the device.
    """
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except MoeratorError as error:
        raise ModelUnusable(f"{what}: {error}") from error
    except (
        *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
        *(SafetensorError, StrictDataclassError),
    ) as error:
        traceback.print_exc()  # not foreseen: whoever wants to know more finds it in the pod's log
        raise ModelUnusable(f"{what}: {type(error).__name__}: {error}") from error


class Work(Protocol):
    """One rank's work in steps."""

    report: WorkReport
    epm: ExpertParallelModel | None

    def load(self, expert_map: ExpertMap) -> None:
        """Bring the model and this rank's slots into memory. Raises ModelUnusable; OSError for a disk or volume."""

    def enter(self, group: EpochGroup, epoch: int) -> None:
        """A new epoch: the model is bound already."""

    def prepare(self) -> int:
        """Plan this rank's part of the next step; returns its tokens. 0: nothing to do."""

    def run(self, tokens_of_rank: Sequence[int]) -> None:
        """The step. Raises GroupFault."""

    def rollback(self) -> None:
        """The step did not happen."""

    def leave(self, why: str) -> None:
        """Out of the epoch: hand everything back."""

    def idle(self, seconds: float) -> None:
        """Wait for work of this rank's own, at most so long."""


LOOK_EVERY_STEPS = 20
"""What is `looked_at` is told so often: reading it waits for the device."""


def looked_at(epm: ExpertParallelModel, report: WorkReport) -> WorkReport:
    """The same with load, expert work and wire error as they are now."""
    return replace(
        report,
        load=tuple(map(tuple, epm.load_window())),
        expert_work=epm.expert_work(),
        wire_error=epm.wire_error() or report.wire_error,
    )


def coverage(epm: ExpertParallelModel) -> Coverage:
    total = epm.num_layers * epm.num_experts
    return Coverage(covered=total - sum(len(lost) for lost in epm.lost_experts()), total=total)
