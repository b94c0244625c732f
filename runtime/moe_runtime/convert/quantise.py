"""A checkpoint with packed experts of one in full: routed experts as few bits, everything else as it was.

    python -m moe_runtime.convert.quantise SOURCE DESTINATION --experts Int4 --group-size 64      # prints JSON
    python -m moe_runtime.convert.quantise SOURCE DESTINATION --experts Int4 --calibrate stdlib

Layer after layer and expert after expert, so that memory holds one layer's codes and one expert in full. Codes are the
nearest ones under scales of least squared error; with text, what errs least on it (calibrate.py), and then the whole
model is in memory, with a sample of every expert's rows.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_core.contract.packing import CONFIG_KEY, SCALED, PackedConfig, Packing
from moe_core.contract.runtime_config import DispatchConfig, ModelSource
from moe_core.outcome import InvalidInput, MoeratorError
from moe_runtime.convert.calibrate import Calibration, summary
from moe_runtime.convert.text import heldin_windows
from moe_runtime.experts.build import build
from moe_runtime.experts.families import ExpertsModule, describe
from moe_runtime.experts.packed_config import read_packed
from moe_runtime.experts.packed_files import INDEX, PackedWriter
from moe_runtime.experts.packing import LayerPacking, Stacks
from moe_runtime.experts.weights import CheckpointWeights
from moe_runtime.kernels.quantise import Packed, pack_best, unpack
from moe_runtime.train.checkpoint import read_summary
from moe_runtime.train.evaluate import DEFAULT_WINDOW, map_without

Choose = Callable[[str, int, torch.Tensor], Packed]
"""(parameter, logical expert, weight [N, M]) -> its codes."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Converted:
    """expert_bytes: of all experts, in float32 and as packed. errors: per MoE layer |W - packed|^2 / |W|^2 over its
    matrices.
    """

    experts: str
    calibration: str
    full_bytes: int
    packed_bytes: int
    errors: tuple[float, ...]
    layers: tuple[dict[str, Any], ...] = ()
    """What calibration saw and chose, per MoE layer."""


def quantise(source: Path, destination: Path, packing: Packing, *, calibration: Calibration | None = None) -> Converted:
    """Write `destination`, which must be empty or not there. calibration: has read text; None: each matrix by itself.

    Raises InvalidInput, UnsupportedModel, OSError; nothing is left behind then.
    """
    if packing.precision == "Float32":
        raise InvalidInput("experts are packed as BFloat16, Float8, Int8 or Int4; Float32 is what they are")
    _must_be_full(source)
    if destination.exists() and any(destination.iterdir()):
        raise InvalidInput(f"{destination} is not empty")
    model, entries, facts = describe(ModelSource(path=str(source)))
    weights = CheckpointWeights(source, model)
    choose = partial(calibration.choose, packing) if calibration is not None else partial(_by_itself, packing)
    told = "" if calibration is None else f"{calibration.tokens} tokens of text"
    staging = destination / f".packing-{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        writer = PackedWriter(staging)
        expert_names = frozenset(f"{entry.name}.{name}" for entry in entries for name in entry.parameter_names)
        writer.write_dense(weights.dense_tensors(model, expert_names))
        errors: list[float] = []
        full_bytes = packed_bytes = 0
        for layer_idx, entry in enumerate(entries):
            layer = LayerPacking(entry, packing, family=facts.family)
            stacks, error = _pack_layer(weights, entry, layer, partial(choose, layer_idx))
            writer.write_experts(entry, stacks)
            errors.append(error)
            full_bytes += entry.num_experts * layer.unpacked_bytes
            packed_bytes += sum(stack.nbytes for stack in stacks.values())
        writer.close()
        _copy_rest(source, staging, weights)
        config = json.loads((source / "config.json").read_text())
        config[CONFIG_KEY] = PackedConfig(experts=packing, calibration=told).model_dump(mode="json")
        (staging / "config.json").write_text(json.dumps(config, indent=2))
        # what makes a checkpoint of the files comes last
        for path in sorted(staging.iterdir(), key=lambda path: (path.name in {INDEX, "config.json"}, path.name)):
            path.replace(destination / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    layers = () if calibration is None else tuple(summary(calibration.figures))
    return Converted(str(packing), told, full_bytes, packed_bytes, tuple(errors), layers)


def calibrated(source: Path, *, data: str, rows_per_expert: int, max_windows: int) -> Calibration:
    """Has read held-in text, in windows as long as the model was trained with.

    Raises InvalidInput, UnsupportedModel, DataError, OSError.
    """
    _must_be_full(source)
    trained = read_summary(source)
    length = trained.window if trained is not None else DEFAULT_WINDOW
    ids_WQ = heldin_windows(source, data, count=max_windows, length=length)
    model, expert_map = ModelSource(path=str(source)), map_without(source, frozenset())
    built = build(model, expert_map=expert_map, rank=0, device="cpu", seed=0, dispatch=DispatchConfig())
    calibration = Calibration(built, rows_per_expert=rows_per_expert)
    calibration.read(ids_WQ)
    return calibration


def _must_be_full(source: Path) -> None:
    if read_packed(source) is not None:
        raise InvalidInput(f"{source} is packed already; give the checkpoint that it was packed from")


def _by_itself(packing: Packing, _layer_idx: int, _name: str, _logical_id: int, weight_NM: torch.Tensor) -> Packed:
    return pack_best(weight_NM, packing)


def _pack_layer(
    weights: CheckpointWeights, entry: ExpertsModule, layer: LayerPacking, choose: Choose
) -> tuple[Stacks, float]:
    stacks = layer.blank(entry.num_experts)
    lost = whole = 0.0
    for logical_id in range(entry.num_experts):
        for name in entry.parameter_names:
            weight = weights.read_experts(entry, name, [logical_id])[0].float()
            if name not in layer.matrices:
                stacks[name][logical_id] = weight
                continue
            matrix = layer.matrices[name]
            weight_NM = matrix.turned(weight)
            packed = choose(name, logical_id, weight_NM)
            for stack, value in layer.stacks_of(name, [packed]).items():
                stacks[stack][logical_id] = value[0]
            back_NM = unpack(packed, layer.packing, num_columns=matrix.num_columns)
            lost += float((back_NM - weight_NM).double().square().sum())
            whole += float(weight_NM.double().square().sum())
    return stacks, lost / whole if whole else 0.0


def _copy_rest(source: Path, destination: Path, weights: CheckpointWeights) -> None:
    """Tokenizer, generalists, routers, summaries: whatever is no weight of the model."""
    own = {*weights.file_of_key.values(), "config.json", "model.safetensors.index.json"}
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in own and path.suffix not in PICKLED:
            shutil.copy2(path, destination / path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_runtime.convert.quantise", description="Pack routed experts.")
    parser.add_argument("source", type=Path, help="folder of a safetensors checkpoint in full")
    parser.add_argument("destination", type=Path, help="folder to write, empty or not there")
    parser.add_argument("--experts", required=True, choices=["BFloat16", *sorted(SCALED)])
    parser.add_argument("--group-size", type=int, help="columns that share a scale, 0: the row (Int4: 64)")
    parser.add_argument("--calibrate", metavar="TEXT", help="stdlib or a folder of text to choose codes by")
    parser.add_argument("--rows", type=int, default=1024, help="rows that every expert is to be asked")
    parser.add_argument("--windows", type=int, default=2048, help="windows of text to read for that at most")
    given: Any = parser.parse_args(arguments)
    try:
        packing = Packing.of(given.experts, given.group_size)
        calibration = None
        if given.calibrate is not None:
            calibration = calibrated(
                given.source, data=given.calibrate, rows_per_expert=given.rows, max_windows=given.windows
            )
        converted = quantise(given.source, given.destination, packing, calibration=calibration)
    except (MoeratorError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(asdict(converted)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
