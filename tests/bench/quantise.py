"""Routed experts in fewer bits: memory, what they are off, what a model's held-out text costs. CPU only.

    PYTHONPATH=tests:operator:runtime python tests/bench/quantise.py .moerator/tiny      # what job-tiny.yaml wrote

Every packing is written as a checkpoint (moe_runtime.convert.quantise), with codes chosen by the weights alone and by
held-in text, loaded as a service loads it, and scored on the same held-out bytes in one process:

    MiB        experts in memory, all layers
    weights    |W - packed|^2 / |W|^2; output: the same of what matrices give, on rows that only score
    bits       held-out bits per byte, and what they are above the model's in full
    kl         bits per byte by which the distribution of the next byte is off (Kullback-Leibler): a loss has luck
               in it, this has none

Prints the table and writes it as .moerator/bench/quantise.json.
"""

import argparse
import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_core.contract.packing import Packing
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.convert.calibrate import Calibration
from moe_runtime.convert.quantise import calibrated, quantise
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.train.data import load_corpus
from moe_runtime.train.evaluate import map_without, prefer_plain_attention, sample

PACKINGS = (
    Packing.of("BFloat16"),
    Packing.of("Float8"),
    Packing.of("Int8"),
    Packing.of("Int4", 32),
    Packing.of("Int4", 64),
    Packing.of("Int4", 128),
)
WINDOW, BATCH = 128, 16
OUTPUT = Path(".moerator/bench/quantise.json")


@dataclass(frozen=True)
class Row:
    packing: str
    way: str
    mebibytes: float
    weights: float
    output: float | None
    bits: float
    kl: float


class Scorer:
    """The same held-out windows for everybody; the first model scored is what others are held against."""

    def __init__(self, num_bytes: int) -> None:
        corpus = load_corpus("stdlib")
        chosen = sample(corpus.heldout_N, length=WINDOW, num_bytes=num_bytes)
        self._scored = chosen.scored
        self._ids_WQ = torch.from_numpy(chosen.windows(corpus.heldout_N))
        self._full_WQV: list[torch.Tensor] = []

    @torch.no_grad()
    def score(self, folder: Path) -> tuple[float, float, int]:
        """(bits per byte, kl in bits, bytes of one expert)."""
        source = ModelSource(path=str(folder))
        epm = ExpertParallelModel.load(source, expert_map=map_without(folder, frozenset()), rank=0)
        prefer_plain_attention(epm, length=WINDOW)
        nats = kl = 0.0
        is_first = not self._full_WQV
        for i, ids_BQ in enumerate(torch.split(self._ids_WQ, BATCH)):
            logits = epm.module(input_ids=ids_BQ[:, :-1], use_cache=False).logits[:, -self._scored :]
            epm.rollback()
            log_BQV = torch.log_softmax(logits.float(), dim=-1)
            if is_first:
                self._full_WQV.append(log_BQV)
            full_BQV = self._full_WQV[i]
            kl += float((full_BQV.exp() * (full_BQV - log_BQV)).sum())
            nats -= float(log_BQV.gather(-1, ids_BQ[:, -self._scored :, None]).sum())
        num_bytes = self._scored * len(self._ids_WQ) * math.log(2)
        return nats / num_bytes, kl / num_bytes, epm.expert_bytes()


def measure(source: Path, packing: Packing, scorer: Scorer, calibration: Calibration, folder: Path) -> list[Row]:
    """One row without scales, else one by the weights alone and one by text."""
    if not packing.is_scaled:
        return [written(source, packing, scorer, folder, None)[0]]
    calibration.forget_figures()
    by_text, layers = written(source, packing, scorer, folder, calibration)
    by_weights, _ = written(source, packing, scorer, folder, None)
    nearest, chosen = (mean_of(layers, f"output_error_{way}") for way in ("nearest", "chosen"))
    return [replace(by_weights, output=nearest), replace(by_text, output=chosen)]


def written(
    source: Path, packing: Packing, scorer: Scorer, folder: Path, calibration: Calibration | None
) -> tuple[Row, tuple[dict[str, Any], ...]]:
    destination = folder / "packed"
    shutil.rmtree(destination, ignore_errors=True)
    converted = quantise(source, destination, packing, calibration=calibration)
    bits, kl, _ = scorer.score(destination)
    row = Row(
        packing=str(packing),
        way="text" if calibration is not None else "weights",
        mebibytes=converted.packed_bytes / 2**20,
        weights=sum(converted.errors) / len(converted.errors),
        output=None,
        bits=bits,
        kl=kl,
    )
    return row, converted.layers


def mean_of(layers: tuple[dict[str, Any], ...], name: str) -> float:
    values: list[float] = [layer[name] for layer in layers]
    return sum(values) / len(values)


def table(rows: list[Row]) -> str:
    full = rows[0]
    lines = ["| experts | codes by | MiB | weights | output | bits per byte | above | kl |", "|---|" + "---|" * 7]
    for row in rows:
        output = "" if row.output is None else f"{row.output:.1e}"
        lines.append(
            f"| {row.packing} | {row.way} | {row.mebibytes:.2f} | {row.weights:.1e} | {output} | {row.bits:.4f} | "
            f"{row.bits - full.bits:+.4f} | {row.kl:.5f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint in full, of bytes")
    parser.add_argument("--bytes", type=int, default=51_200, help="held-out bytes to score")
    parser.add_argument("--rows", type=int, default=1024, help="rows that every expert is to be asked")
    given: Any = parser.parse_args()
    torch.set_num_threads(1)
    scorer = Scorer(given.bytes)
    bits, kl, expert_bytes = scorer.score(given.checkpoint)
    layers = map_without(given.checkpoint, frozenset())
    mebibytes = expert_bytes * layers.num_layers * layers.num_logical_experts / 2**20
    rows = [Row("Float32", "", mebibytes, 0.0, None, bits, kl)]
    calibration = calibrated(given.checkpoint, data="stdlib", rows_per_expert=given.rows, max_windows=2048)
    with tempfile.TemporaryDirectory() as folder:
        for packing in PACKINGS:
            rows += measure(given.checkpoint, packing, scorer, calibration, Path(folder))
    print(f"{calibration.tokens} tokens of held-in text; fewest rows of an expert {calibration.least_own_rows}\n")
    print(table(rows))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
