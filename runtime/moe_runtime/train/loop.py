"""The training loop of one rank: dense layers data-parallel, experts where they live, every step a transaction.

    trainer = Trainer(config, epm, run_id=uid)
    trainer.bind(group)              # at each new epoch, after epm.bind
    trainer.restore()                # all ranks: nothing when they agree, else the newest snapshot that all can read
    while not trainer.step().finished: ...
    trainer.finish()                 # checkpoint

A step raises GroupFault when a rank is lost; parameters, optimizer state, counters and the place in the text are then
as before it. Ranks commit after a last exchange; a rank that dies right there can leave others one step apart, which
the next `restore` sees and mends. Single process: bind(None).

The load-balancing loss is computed on each rank's own tokens, per layer, and averaged over layers and ranks.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_core.contract.base import digest_of
from moe_core.contract.expert_map import EMPTY_SLOT
from moe_core.contract.runtime_config import TrainingConfig
from moe_core.experts.measure import balance
from moe_core.outcome import InvalidInput
from moe_runtime.dispatch.group_face import Group
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.errors import RuntimeFault
from moe_runtime.train import snapshot as snapshots
from moe_runtime.train.checkpoint import Summary, await_published, publish_run, published_by
from moe_runtime.train.data import Corpus, WindowOrder, load_corpus
from moe_runtime.train.evaluate import heldout_bits, order2_bits, prefer_plain_attention, sample
from moe_runtime.train.figures import Figures
from moe_runtime.train.gradients import complete_gradients
from moe_runtime.train.losses import losses
from moe_runtime.train.parameters import dense_tensors, optimizer_for, restore_tensors, slot_tensors
from moe_runtime.train.schedule import progress, rate_share
from moe_runtime.train.snapshot import RunState, SnapshotDamaged, SnapshotReader

MAX_GRADIENT_NORM = 1.0
BITS = 1.0 / math.log(2.0)
MAX_SKIPPED = 20
"""In a row."""
IO_MS = 600_000
"""For exchanges before which ranks read, write or hash files. A peer that dies there is seen at once all the same, and
one that stops is ended by its guard, so this bounds nothing but a disk that hangs."""
CALIBRATION_WINDOWS = 256
"""Windows of training text on which the generalists are fitted; held-out text only measures them."""


class OutOfStep(RuntimeFault):
    """Ranks stand at different steps: `restore` first."""


class Diverged(RuntimeError):
    """The loss is no longer a number; a lower learning rate is the lever."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One committed step. `loss_bits`: training bits per byte over all ranks' tokens of this step."""

    step: int
    loss_bits: float
    router_losses: dict[str, float]
    """What was added to the text's loss, by name: scaled, over all layers and ranks."""
    router_counts: dict[str, int]
    """What the routers counted, over all layers and ranks."""
    balancedness: float
    """Mean over max of the ranks' picks in this step, mean over layers."""
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    """Training time so far, by the clock of the rank at position 0."""
    progress: float
    finished: bool


class Trainer:
    """One rank's side of the run. Not thread-safe."""

    def __init__(
        self,
        config: TrainingConfig,
        epm: ExpertParallelModel,
        *,
        run_id: str = "",
        corpus: Corpus | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`run_id` (the job's UID) tells the snapshots of this run from those of an earlier one in the same folder.
        corpus: that of `config.data`, where it has been read already.
        """
        self.config = config
        self.epm = epm
        self.output = Path(config.output_path)
        self.corpus = corpus or load_corpus(config.data)
        self.state = RunState()
        self._order = WindowOrder(self.corpus.training_N, length=config.sequence_length + 1, seed=config.seed)
        self._clock = clock
        self._mark = clock()
        self._group: Group | None = None
        self._skipped = 0
        self._summary: Summary | None = None
        prefer_plain_attention(epm, length=config.sequence_length)
        self._stale = True  # a fresh process knows nothing of the run yet
        self._optimizer = optimizer_for(self.epm, self.config)
        self._slots = self._slots_now()
        self._identity = digest_of(
            "/".join(
                map(str, (run_id, self.corpus.digest, config.sequence_length, config.seed, config.optimizer))
                # the model's shape decides the tensors: another one is another run
            )
            + "".join(f"{name}{tuple(p.shape)}" for name, p in sorted(epm.dense_parameters()))
            + ("" if epm.routed is None else epm.routed.config.canonical())
        )

    # ---------------------------------------------------------------- epochs

    def bind(self, group: Group | None) -> None:
        """Work in this group from now on (None: alone). `restore` comes next, on all ranks."""
        self._group = group
        self._mark = self._clock()
        if self._slots_now() != self._slots:  # other experts came into the slots: their optimizer state is not here
            self._slots = self._slots_now()
            self._optimizer = optimizer_for(self.epm, self.config)
            self._stale = True

    def restore(self) -> int:
        """Agree on a run and a step, on all ranks together; returns it. Nothing is read when all stand at the same one.

        Else the newest snapshot that every rank can read in full is taken, damaged ones are passed over. A run that has
        none begins with one; a run whose checkpoint is published already has finished. Raises GroupFault, OSError,
        InvalidInput when ranks are of unlike runs, and SnapshotDamaged when no common snapshot is left.
        """
        rows = self._gather((self.state.step, int(self._stale), _as_int(self._identity)), timeout_ms=IO_MS)
        if len({row[2] for row in rows}) > 1:
            raise InvalidInput(
                f"ranks differ in the training text, the model's shape or its router: this rank has read "
                f"{len(self.corpus.training_N)} bytes of {self.config.data} (digest {self.corpus.digest})"
            )
        if len({row[0] for row in rows}) == 1 and not any(row[1] for row in rows):
            return self.state.step
        published = published_by(self.output, self._identity)
        # One that sees it is enough: a shared volume may show it to others later, and its snapshots are gone already.
        if any(row[0] for row in self._gather((int(published is not None),), timeout_ms=IO_MS)):
            published = published or await_published(self.output, self._identity, clock=self._clock)
            self._summary, self._stale = published, False
            self.state = replace(self.state, step=published.steps, tokens=published.tokens, seconds=published.seconds)
            return self.state.step
        offered = self._readable_steps()
        padded = (*offered, *([-1] * snapshots.KEPT))[: snapshots.KEPT]
        of_rank = self._gather(padded, timeout_ms=IO_MS)
        common = set.intersection(*({step for step in row if step >= 0} for row in of_rank))
        if common:
            self._load(SnapshotReader(snapshots.step_folder(self.output, max(common))))
        elif all(row[0] == 0 for row in rows) and not any(step >= 0 for r in of_rank for step in r):
            # The beginning, for survivors of a fault in the first snapshot too: step 0 follows from the source.
            self._begin_alike()
            self.snapshot()
            self._stale = False
        else:
            raise SnapshotDamaged(f"{self.output}: no snapshot that all ranks can read, they offer {of_rank}")
        self._mark = self._clock()
        return self.state.step

    @torch.no_grad()
    def _begin_alike(self) -> None:
        """A user's own router may begin with something else on every rank; the one at position 0 counts."""
        routed, group = self.epm.routed, self._group
        if routed is None or not routed.may_differ_by_rank or group is None:
            return
        for _, tensor in sorted(routed.tensors().items()):
            told = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64)
            if group.position:
                told.zero_()
            group.all_reduce_sum(told)
            tensor.copy_(told)

    # ---------------------------------------------------------------- steps

    def step(self) -> StepReport:
        """One optimizer step over all ranks. Raises GroupFault (nothing changed), OutOfStep, Diverged."""
        rows = self._gather((self.state.step, self.state.cursor))
        if len({tuple(row) for row in rows}) > 1:
            raise OutOfStep(f"ranks stand at (step, cursor) {[tuple(row) for row in rows]}")
        done = progress(self.config, step=self.state.step, seconds=self.state.seconds)
        share = rate_share(self.config, step=self.state.step, done=done)

        size, position = (self._group.size, self._group.position) if self._group is not None else (1, 0)
        count = self.config.sequences_per_rank
        windows = self._order.take(self.state.cursor + position * count, count=count)
        ids_BQ = torch.from_numpy(windows).to(self._device)
        routed = self.epm.routed
        self.epm.zero_grad()
        self.epm.rollback()
        if routed is not None:
            routed.begin(step=self.state.step, progress=done, group=self._group)
        with self._precision():
            found = losses(self.epm, ids_BQ, aux_coefficient=self.config.aux_loss_coefficient)
            torch.autograd.backward(found.total / size)
            figures = Figures.of(found, self.epm, size=size)
            self._must_agree_on(figures)
            gradients = complete_gradients(
                self.epm, self._group, sums=figures.numbers, max_expert_norm=self.config.max_expert_gradient_norm
            )
            figures = figures.summed(gradients.sums)
            self.epm.zero_grad()
            # The last exchange: who passes it knows that all got this far. The clock of position 0 comes along, for all
            # must see the same learning rate.
            spent_us = self._gather((int((self._clock() - self._mark) * 1e6),))[0][0]
            if self._commit(gradients.of, norm=gradients.norm, share=share) and routed is not None:
                routed.after_step(figures.load_LE.to(self._device))
        self.epm.commit()
        self._mark = self._clock()
        tokens = size * count * self.config.sequence_length
        self.state = RunState(
            step=self.state.step + 1,
            cursor=self.state.cursor + size * count,
            seconds=self.state.seconds + spent_us / 1e6,
            tokens=self.state.tokens + tokens,
        )
        done = progress(self.config, step=self.state.step, seconds=self.state.seconds)
        report = StepReport(
            step=self.state.step,
            loss_bits=figures.text * BITS,
            router_losses=figures.losses,
            router_counts=figures.counts,
            balancedness=self._balancedness(figures.load_LE),
            gradient_norm=gradients.norm,
            learning_rate=self.config.learning_rate * share,
            tokens=tokens,
            seconds=self.state.seconds,
            progress=done,
            finished=done >= 1.0,
        )
        if not report.finished and self.state.step % self.config.snapshot_every_steps == 0:
            self.snapshot()
        return report

    def _must_agree_on(self, figures: Figures) -> None:
        """Numbers are summed over ranks by their place. Only a user's own router can name others on another rank."""
        if self.epm.routed is None or not self.epm.routed.may_differ_by_rank:
            return
        names = f"losses {list(figures.losses)} and counts {list(figures.counts)}"
        if len({key for (key,) in self._gather((_as_int(digest_of(names)),))}) > 1:
            raise InvalidInput(f"a router's losses and counts have the same names on all ranks, this rank has {names}")

    def _balancedness(self, load_LE: torch.Tensor) -> float:
        ranks = self._group.ranks if self._group is not None else (self.epm.rank,)
        return balance(self.epm.expert_map, load_LE.tolist(), ranks).balancedness

    def _commit(self, gradients: dict[str, torch.Tensor], *, norm: float, share: float) -> bool:
        """Needs no other rank. False: a step whose gradient is no number is passed over, on all ranks alike."""
        if not math.isfinite(norm):
            self._skipped += 1  # the same on all ranks
            if self._skipped > MAX_SKIPPED:
                raise Diverged(
                    f"the gradient was no number in {self._skipped} steps in a row, last at step {self.state.step}; "
                    f"lower training.learningRate ({self.config.learning_rate:g})"
                )
            return False
        if norm > MAX_GRADIENT_NORM:
            torch._foreach_mul_(list(gradients.values()), MAX_GRADIENT_NORM / norm)
        self._optimizer.apply(gradients, rate_share=share, step=self.state.step)
        self._skipped = 0
        return True

    # ---------------------------------------------------------------- snapshots

    def snapshot(self) -> Path:
        """Write this step on all ranks together; it is complete when this returns. Raises GroupFault."""
        ranks = self._group.ranks if self._group is not None else (self.epm.rank,)
        position = self._group.position if self._group is not None else 0
        folder = snapshots.step_folder(self.output, self.state.step)
        plan = snapshots.slots_to_write(self.epm.expert_map, ranks)
        slots_of_layer = [[slot for slot, _ in layer] for layer in plan[self.epm.rank]]
        tensors = slot_tensors(self.epm, self._optimizer, slots_of_layer)
        digests = [snapshots.write_tensors(folder, snapshots.experts_file(self.epm.rank), tensors)]
        if position == 0:
            digests.append(
                snapshots.write_tensors(folder, snapshots.DENSE_FILE, dense_tensors(self.epm, self._optimizer))
            )
        of_rank = self._gather(_as_ints(digests[0]), timeout_ms=IO_MS)
        if position == 0:
            files = {snapshots.experts_file(rank): _as_hex(row) for rank, row in zip(ranks, of_rank, strict=True)}
            snapshots.write_manifest(
                folder,
                snapshots.Manifest(
                    version=snapshots.VERSION,
                    identity=self._identity,
                    state=self.state,
                    digests={**files, snapshots.DENSE_FILE: digests[1]},
                    experts={
                        snapshots.experts_file(rank): tuple(tuple(e for _, e in layer) for layer in layers)
                        for rank, layers in plan.items()
                    },
                ),
            )
            kept = snapshots.complete_steps(self.output, self._identity)[: snapshots.KEPT]
            snapshots.prune(self.output, keep=kept)
        self._gather((1,), timeout_ms=IO_MS)  # nobody waits for position 0 in a step's exchange
        return folder

    def _readable_steps(self) -> list[int]:
        steps = []
        wanted = {(i.layer_idx, e) for i in self.epm.expert_parameters() for e in i.logical_of_slot if e != EMPTY_SLOT}
        for step in snapshots.complete_steps(self.output, self._identity)[: snapshots.KEPT]:
            with contextlib.suppress(SnapshotDamaged):
                SnapshotReader(snapshots.step_folder(self.output, step)).verify(wanted)
                steps.append(step)
        return steps

    def _load(self, reader: SnapshotReader) -> None:
        restore_tensors(reader, self.epm, self._optimizer)
        self.state = reader.manifest.state
        self._stale = False
        self._skipped = 0

    # ---------------------------------------------------------------- the end

    @property
    def finished(self) -> bool:
        """Whether the run has reached its bound: `finish` comes next."""
        return (
            self._summary is not None or progress(self.config, step=self.state.step, seconds=self.state.seconds) >= 1.0
        )

    def evaluate(self) -> float:
        """Held-out bits per byte, all ranks together. Raises GroupFault. Takes no training time."""
        bits = self._heldout()
        self._mark = self._clock()
        return bits

    def _heldout(self, *, whole_texts: bool = False) -> float:
        chosen = sample(self.corpus.heldout_N, length=self.config.sequence_length)
        return heldout_bits(self.epm, self.corpus.heldout_N, chosen, group=self._group, whole_texts=whole_texts)

    def finish(self) -> Summary | None:
        """A last snapshot and the held-out figure, on all ranks together; then position 0 alone writes the checkpoint.

        The other ranks return None at once and must not wait for position 0 in a collective (it takes seconds).
        Raises GroupFault before anything of an older checkpoint is touched; may be called again then.
        """
        is_writer = self._group is None or self._group.position == 0
        if self._summary is not None:  # published before the fault that brought us here again
            return self._summary if is_writer else None
        folder = self.snapshot()
        bits = self.evaluate()
        routed = self.epm.routed
        whole_text_bits = self._heldout(whole_texts=True) if routed is not None and routed.looks_ahead else None
        if not is_writer:
            return None
        chosen = sample(self.corpus.heldout_N, length=self.config.sequence_length)
        summary = Summary(
            tokenizer="bytes",
            bits_per_byte=round(bits, 4),
            order2_bits_per_byte=round(order2_bits(self.corpus, chosen), 4),
            heldout_bytes=chosen.num_bytes,
            window=chosen.length,
            steps=self.state.step,
            tokens=self.state.tokens,
            seconds=round(self.state.seconds, 1),
            data=self.config.data,
            training_bytes=len(self.corpus.training_N),
            text=self.corpus.digest,
            run=self._identity,
            whole_text_bits_per_byte=None if whole_text_bits is None else round(whole_text_bits, 4),
        )
        ids_NQ = torch.from_numpy(self._order.take(self.state.cursor, count=CALIBRATION_WINDOWS)[:, :-1])
        publish_run(self.output, summary, snapshot=folder, epm=self.epm, calibration_NQ=ids_NQ)
        self._summary = summary
        return summary

    # ---------------------------------------------------------------- parts

    def _slots_now(self) -> list[tuple[str, int, tuple[int, ...]]]:
        return [(item.name, id(item.parameter), item.logical_of_slot) for item in self.epm.expert_parameters()]

    def _gather(self, row: tuple[int, ...], *, timeout_ms: int | None = None) -> list[list[int]]:
        return self._group.all_gather_ints(row, timeout_ms=timeout_ms) if self._group is not None else [list(row)]

    @property
    def _device(self) -> torch.device:
        return next(parameter for _, parameter in self.epm.dense_parameters()).device

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """The setting is the process's, so it is put back: serving and evaluation multiply in full precision."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.config.matmul_precision.lower())
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _as_int(digest: str) -> int:
    return int(digest[:15], 16)


def _as_ints(digest: str) -> tuple[int, ...]:
    return tuple(int(digest[i : i + 8], 16) for i in range(0, 64, 8))


def _as_hex(row: list[int]) -> str:
    return "".join(f"{value:08x}" for value in row)
