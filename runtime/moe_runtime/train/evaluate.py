"""Held-out bits per byte: of the model in training over all ranks, and of a checkpoint with and without some experts.

A fixed number of held-out bytes is scored: the second half of windows that are spread evenly over the held-out text, so
that every scored byte has at least half a window before it. The order-2 model is scored on the very same bytes.

    python -m moe_runtime.train.evaluate CHECKPOINT --lost 0:5,1:9      # prints JSON
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.dispatch.group_face import Group
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.generalists import read_generalists
from moe_runtime.train.checkpoint import read_summary
from moe_runtime.train.data import Bytes_N, Corpus, DataError, Ids_BQ, load_corpus
from moe_runtime.train.order2 import Order2Model

SCORED_BYTES = 102_400
BATCH = 16
"""Windows per forward."""
DEFAULT_WINDOW = 128
PLAIN_ATTENTION_LENGTH = 512
"""On CPUs torch's fused attention is the slower one for short rows: a whole training step of 32 rows of 128 bytes
(hidden size 128, 4 heads, one thread) took 549 ms of CPU time with it and 314 ms with plain products."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Where the scored bytes lie: windows of `length` + 1 bytes, of which the last `scored` are predicted."""

    starts: tuple[int, ...]
    length: int
    scored: int

    @property
    def num_bytes(self) -> int:
        return len(self.starts) * self.scored

    def windows(self, text_N: Bytes_N) -> Ids_BQ:
        return np.stack([text_N[s : s + self.length + 1] for s in self.starts]).astype(np.int64)

    def mask(self, num_bytes: int) -> npt.NDArray[np.bool_]:
        """[N] the bytes of the text that are scored."""
        mask = np.zeros(num_bytes, dtype=np.bool_)
        for start in self.starts:
            mask[start + self.length + 1 - self.scored : start + self.length + 1] = True
        return mask


def sample(text_N: Bytes_N, *, length: int, num_bytes: int = SCORED_BYTES) -> Sample:
    """About `num_bytes` scored bytes, fewer when the text is short; no byte is scored twice. Raises DataError."""
    scored = max(1, length // 2)
    room = len(text_N) - length - 1
    if room < 0:
        raise DataError(f"held-out text of {len(text_N)} bytes is shorter than one window of {length + 1}")
    count = max(1, min(num_bytes // scored, room // scored))
    return Sample(tuple(int(start) for start in np.linspace(0, room, count).astype(np.int64)), length, scored)


def prefer_plain_attention(epm: ExpertParallelModel, *, length: int) -> None:
    """For training and scoring whole windows on a CPU; the numbers are the same."""
    device = next(parameter for _, parameter in epm.dense_parameters()).device
    if device.type == "cpu" and length <= PLAIN_ATTENTION_LENGTH:
        epm.module.set_attn_implementation("eager")


def heldout_bits(
    epm: ExpertParallelModel,
    text_N: Bytes_N,
    chosen: Sample,
    *,
    group: Group | None = None,
    whole_texts: bool = False,
) -> float:
    """Bits per byte over the sample, its windows dealt out to the ranks; all ranks get the sum. Raises GroupFault.

    Every token is routed as if it were alone, as when it is generated, so that a router that looks ahead tells nothing
    of what comes next. With `whole_texts` such a router sees each batch of windows whole, as in training, and leaks.
    Every rank runs equally many batches: dispatch is lockstep. The model's counters are left as they were.
    """
    if whole_texts and epm.routed is not None:
        with epm.routed.scoring_whole_texts():
            return _heldout_bits(epm, text_N, chosen, group)
    return _heldout_bits(epm, text_N, chosen, group)


def _heldout_bits(epm: ExpertParallelModel, text_N: Bytes_N, chosen: Sample, group: Group | None) -> float:
    size, position = (group.size, group.position) if group is not None else (1, 0)
    sums = _score(epm, chosen.windows(text_N), chosen.scored, position=position, size=size)
    if group is not None and group.size > 1:
        group.all_reduce_sum(sums)
    return _bits(sums)


def _bits(sums: torch.Tensor) -> float:
    return float(sums[0] / sums[1]) / math.log(2.0)


@torch.no_grad()
def _score(epm: ExpertParallelModel, windows: Ids_BQ, scored: int, *, position: int, size: int) -> torch.Tensor:
    """[2] float64: nats and scored bytes of the batches that fall to `position` of `size`."""
    rounds = math.ceil(len(windows) / (size * BATCH))
    device = next(parameter for _, parameter in epm.dense_parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for number in range(rounds):
        first = (number * size + position) * BATCH
        mine = windows[first : first + BATCH]
        ids_BQ = torch.from_numpy(mine if len(mine) else windows[:1]).to(device)
        logits = epm.module(input_ids=ids_BQ[:, :-1], use_cache=False).logits[:, -scored:]
        if len(mine):
            targets = ids_BQ[:, -scored:].reshape(-1)
            nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
            sums += torch.stack([nats.double(), nats.new_tensor(targets.numel(), dtype=torch.float64)])
        epm.rollback()
    return sums


@dataclass(frozen=True, slots=True)
class Held:
    """Bits per byte on the same held-out bytes; `generalist` is None without generalists or lost experts, `whole_text`
    but for a router that looks ahead: scored on whole texts, where it leaks what comes next.
    """

    full: float
    generalist: float | None
    drop: float | None
    order2: float
    num_bytes: int
    num_lost: int
    whole_text: float | None = None


def evaluate_checkpoint(
    folder: Path,
    *,
    data: str,
    length: int | None = None,
    lost: Iterable[tuple[int, int]] = (),
    num_bytes: int = SCORED_BYTES,
    router_class: str | None = None,
    workers: int = 1,
) -> Held:
    """Score a checkpoint in this process: whole, and with the (MoE layer, logical expert) pairs of `lost` gone.

    `length` None takes the window it was trained with. Each of `workers` threads has the model for itself.

    Raises OSError, InvalidInput, DataError.
    """
    corpus = load_corpus(data)
    summary = read_summary(folder)
    if length is None:
        length = summary.window if summary is not None else DEFAULT_WINDOW
    chosen = sample(corpus.heldout_N, length=length, num_bytes=num_bytes)
    gone = frozenset(lost)
    source = ModelSource(path=str(folder), router_class=router_class)

    windows = chosen.windows(corpus.heldout_N)

    def load(missing: frozenset[tuple[int, int]]) -> list[ExpertParallelModel]:
        expert_map = map_without(folder, missing)
        copies = [ExpertParallelModel.load(source, expert_map=expert_map, rank=0) for _ in range(workers)]
        for epm in copies:
            prefer_plain_attention(epm, length=length)
        return copies

    def score(copies: Sequence[ExpertParallelModel]) -> float:
        """Dealt out batch by batch, as to ranks, so that every batch is the same however many workers there are."""

        def share(position: int) -> torch.Tensor:
            return _score(copies[position], windows, chosen.scored, position=position, size=workers)

        with ThreadPoolExecutor(workers) as pool:
            return _bits(torch.stack(list(pool.map(share, range(workers)))).sum(0))

    whole = load(frozenset())
    full = score(whole)
    whole_text = None
    if whole[0].routed is not None and whole[0].routed.looks_ahead:
        whole_text = heldout_bits(whole[0], corpus.heldout_N, chosen, whole_texts=True)
    generalist = drop = None
    if gone:
        injured = load(gone)
        if read_generalists(folder) is not None:
            generalist = score(injured)
        for epm in injured:
            epm.use_generalists(None)
        drop = score(injured)
    known = summary is not None and (summary.window, summary.heldout_bytes, summary.text) == (
        chosen.length,
        chosen.num_bytes,
        corpus.digest,
    )
    order2 = summary.order2_bits_per_byte if summary is not None and known else order2_bits(corpus, chosen)
    return Held(full, generalist, drop, order2, chosen.num_bytes, len(gone), whole_text)


def order2_bits(corpus: Corpus, chosen: Sample) -> float:
    """The order-2 model of the training text on the sample's bytes."""
    model = Order2Model.fitted(corpus.training_N)
    return model.bits_per_byte(corpus.heldout_N, scored_N=chosen.mask(len(corpus.heldout_N)))


def map_without(folder: Path, missing: frozenset[tuple[int, int]]) -> ExpertMap:
    """All experts on one rank, the missing ones' slots empty."""
    from moe_runtime.experts.families import read_facts

    facts = read_facts(ModelSource(path=str(folder)))
    return ExpertMap(
        generation=0,
        num_logical_experts=facts.num_experts,
        slots_of_rank=(facts.num_experts,),
        logical_of_slot=tuple(
            tuple(EMPTY_SLOT if (layer, e) in missing else e for e in range(facts.num_experts))
            for layer in range(facts.num_layers)
        ),
    )


def parse_lost(text: str, *, num_layers: int) -> list[tuple[int, int]]:
    """(MoE layer, logical expert) pairs.

    >>> parse_lost("0:5,1:7,3", num_layers=2)
    [(0, 5), (1, 7), (0, 3), (1, 3)]
    """
    pairs = []
    for part in filter(None, text.split(",")):
        layer, colon, expert = part.rpartition(":")
        pairs += [(int(layer), int(expert))] if colon else [(each, int(expert)) for each in range(num_layers)]
    return pairs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_runtime.train.evaluate", description="Held-out bits per byte.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", default="stdlib", help="stdlib or a folder of text")
    parser.add_argument("--length", type=int, help="window in bytes (default: as trained)")
    parser.add_argument("--bytes", type=int, default=SCORED_BYTES, help="held-out bytes to score")
    parser.add_argument(
        "--lost", default="", help="layer:expert pairs, comma-separated; an expert alone is lost in every layer"
    )
    parser.add_argument("--workers", type=int, default=1, help="threads, each with the model for itself")
    parser.add_argument("--router-class", help="module:Class of the checkpoint's router, if that is one of your own")
    given = parser.parse_args(arguments)
    if given.workers < 1:
        parser.error(f"--workers must be at least 1, not {given.workers}")
    torch.set_num_threads(1)  # in one operation more of them wait for each other in a loop: 25 s instead of 2
    held = evaluate_checkpoint(
        given.checkpoint,
        data=given.data,
        length=given.length,
        lost=parse_lost(given.lost, num_layers=map_without(given.checkpoint, frozenset()).num_layers),
        num_bytes=given.bytes,
        router_class=given.router_class,
        workers=given.workers,
    )
    sys.stdout.write(json.dumps(asdict(held)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
