"""Training, as the step loop drives it: one optimizer step per boundary, on all ranks or on none.

With an expert lost the run waits for the rank's replacement: a step without it would train another model. When it has
joined, all ranks restore the newest snapshot that they can read, unless all still stand at the same step.
"""

import errno
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_core.contract.exchange import TrainingProgress
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import RuntimeConfig
from moe_core.outcome import InvalidInput
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.membership.group import EpochGroup
from moe_runtime.rank.work import LOOK_EVERY_STEPS, ModelUnusable, WorkReport, loading, looked_at
from moe_runtime.train.data import asked_router, load_corpus
from moe_runtime.train.loop import Diverged, OutOfStep, StepReport, Trainer
from moe_runtime.train.snapshot import SnapshotDamaged

_PUBLISH_MS = 600_000
"""How long the others wait for position 0 to write the checkpoint; its death they see at once."""
_FIXED_POINT = 10_000
"""Figures go through an exchange of whole numbers."""
_WAITING_S = 0.2


class TrainWork:
    """One rank's side of the run. `is_done` once the checkpoint is published."""

    def __init__(self, config: RuntimeConfig, *, rank: int) -> None:
        if config.training is None:
            raise ValueError(f"mode {config.mode} has no training configuration")
        self._config, self._training, self._rank = config, config.training, rank
        self.report = WorkReport()
        self.epm: ExpertParallelModel | None = None
        self._trainer: Trainer | None = None
        self._group: EpochGroup | None = None
        self._is_whole = False
        self._must_restore = True
        self._is_done = False
        self._restored_from: int | None = None
        self._router_counts: Counter[str] = Counter()

    def load(self, expert_map: ExpertMap) -> None:
        _make_output(Path(self._training.output_path))
        with loading("the training text"):
            corpus = load_corpus(self._training.data)
        with loading(self._config.model.path or "the configured shape"):
            self.epm = ExpertParallelModel.load(
                self._config.model,
                expert_map=expert_map,
                rank=self._rank,
                device=self._config.device,
                seed=self._training.seed,
                dispatch=self._config.dispatch,
                router=None if self._config.router is None else asked_router(self._config.router, corpus),
            )
        with loading("the training run"):
            self._trainer = Trainer(self._training, self.epm, run_id=self._config.uid, corpus=corpus)
        self.epm.module.train()

    def _parts(self) -> tuple[ExpertParallelModel, Trainer, EpochGroup]:
        assert self.epm is not None and self._trainer is not None and self._group is not None, "load and enter first"
        return self.epm, self._trainer, self._group

    def enter(self, group: EpochGroup, epoch: int) -> None:  # noqa: ARG002 - serving marks its answers with it
        self._group = group
        epm, trainer, _ = self._parts()
        trainer.bind(group)
        self._is_whole = not any(epm.lost_experts())
        self._must_restore = True

    def prepare(self) -> int:
        return 1 if self._is_whole and not self._is_done else 0

    def run(self, tokens_of_rank: Sequence[int]) -> None:
        """Raises GroupFault; ModelUnusable when the run cannot go on at all."""
        if not all(tokens_of_rank):
            return
        _, trainer, group = self._parts()
        try:
            if self._must_restore:
                before = trainer.state.step
                step = trainer.restore()
                self._restored_from = step if step < before or (before == 0 and step > 0) else self._restored_from
                self._must_restore = False
            if trainer.finished:
                self._finish(trainer, group)
                return
            began = time.monotonic()
            report = trainer.step()
        except OutOfStep:
            self._must_restore = True
            return
        except (Diverged, SnapshotDamaged, InvalidInput) as error:  # the last of a router that answers nonsense
            raise ModelUnusable(str(error)) from error
        seconds = time.monotonic() - began
        self._tell(report, tokens_per_s=report.tokens / seconds if seconds > 0 else 0.0)

    def _finish(self, trainer: Trainer, group: EpochGroup) -> None:
        summary = trainer.finish()
        # Position 0 comes here once the checkpoint is published; should it die on the way, this faults, and the next
        # epoch's position 0 writes it.
        figures = (summary.bits_per_byte, summary.order2_bits_per_byte) if summary else (0.0, 0.0)
        row = tuple(round(bits * _FIXED_POINT) for bits in figures)
        heldout, order2 = (value / _FIXED_POINT for value in group.all_gather_ints(row, timeout_ms=_PUBLISH_MS)[0])
        self._is_done = True
        last = self.report.training
        progress = TrainingProgress(
            step=trainer.state.step,
            max_steps=self._training.max_steps,
            loss=last.loss if last else None,
            tokens_per_s=last.tokens_per_s if last else 0.0,
            seconds=trainer.state.seconds,
            restored_from_step=self._restored_from,
            router_losses=last.router_losses if last else {},
            router_counts=dict(self._router_counts),
            balancedness=last.balancedness if last else None,
            heldout_bits_per_byte=heldout,
            order2_bits_per_byte=order2,
            done=True,
            checkpoint_path=str(Path(self._training.output_path)),
        )
        epm, _, _ = self._parts()
        self.report = looked_at(epm, replace(self.report, training=progress))

    def _tell(self, report: StepReport, *, tokens_per_s: float) -> None:
        epm, trainer, _ = self._parts()
        self._router_counts.update(report.router_counts)
        progress = TrainingProgress(
            step=report.step,
            max_steps=self._training.max_steps,
            loss=report.loss_bits * math.log(2.0),
            tokens_per_s=tokens_per_s,
            seconds=report.seconds,
            restored_from_step=self._restored_from,
            router_losses=report.router_losses,
            router_counts=dict(self._router_counts),
            balancedness=report.balancedness,
        )
        told = replace(self.report, tokens=trainer.state.tokens, training=progress)
        self.report = looked_at(epm, told) if report.step % LOOK_EVERY_STEPS == 1 else told

    def rollback(self) -> None:
        """The trainer's own steps leave nothing behind; the model's counters do."""
        if self.epm is not None:
            self.epm.rollback()

    def leave(self, why: str) -> None:  # noqa: ARG002 - nobody waits for this rank's work
        self._group = None

    def idle(self, seconds: float) -> None:
        if not (self._is_whole and not self._is_done):
            time.sleep(max(seconds, _WAITING_S) if self._is_done else seconds)


def _make_output(folder: Path) -> None:
    """Before any step is taken, lest a run of days find out at its end. Raises OSError, which another pod may mend."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: output.path {folder}") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)}: output.path {folder} cannot be written")
