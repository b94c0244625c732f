"""The end of a run: one folder that transformers loads, with the generalists and what the training was.

    <output>/config.json, model.safetensors     `AutoModelForCausalLM.from_pretrained(output)` gives the same logits
             generalist.safetensors, generalist.json    what answers for a lost expert
             router.safetensors, router.json    routers of ours, where the job asked for one
             moerator.json      tokenizer, training summary, held-out figures; written last: its presence means complete

Files are written beside and renamed into place one by one, because the output folder itself may be a mount, which
cannot be renamed; the old moerator.json goes first, so that no mixture of two runs passes for a checkpoint.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_core.contract.router import RouterConfig
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.calibrate import calibrate
from moe_runtime.experts.families import facts_of, find_experts
from moe_runtime.experts.generalists import write_generalists
from moe_runtime.experts.imitate import answers_alike
from moe_runtime.experts.routed import PREFIX, restored
from moe_runtime.experts.router_files import SavedRouter, remove_router, write_router
from moe_runtime.train.snapshot import FOLDER, SnapshotReader, write_file

SUMMARY = "moerator.json"
_PUBLISHED_S = 90.0
"""How long a rank looks for a checkpoint that another one sees: NFS keeps attributes for up to a minute."""


@dataclass(frozen=True, slots=True)
class Summary:
    """moerator.json. Bits per byte are of the same held-out bytes for the model and the order-2 model."""

    tokenizer: str
    bits_per_byte: float
    order2_bits_per_byte: float
    heldout_bytes: int
    window: int
    steps: int
    tokens: int
    seconds: float
    data: str
    training_bytes: int
    text: str
    """Digest of training and held-out text."""
    run: str
    """Identity of the run, so that its ranks know it for finished."""
    version: int = 1
    whole_text_bits_per_byte: float | None = None
    """Of a router that looks ahead, scored on whole texts, where it leaks what comes next: not what serving gives.
    """


def read_summary(folder: Path) -> Summary | None:
    """None when the folder holds no complete checkpoint that a run of this version has written."""
    try:
        return Summary(**json.loads((folder / SUMMARY).read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # none, or a hand-written one, or of another version
        return None


def published_by(output: Path, identity: str) -> Summary | None:
    """The summary of the checkpoint in `output`, if it is this run's."""
    summary = read_summary(output)
    return summary if summary is not None and summary.run == identity else None


def await_published(output: Path, identity: str, *, clock: Callable[[], float]) -> Summary:
    """Wait for the checkpoint that another rank sees. Raises OSError."""
    deadline = clock() + _PUBLISHED_S
    while (published := published_by(output, identity)) is None:
        if clock() > deadline:
            raise OSError(f"{output}: another rank sees the finished checkpoint there, this one does not")
        time.sleep(0.5)
    return published


def publish_run(
    output: Path, summary: Summary, *, snapshot: Path, epm: ExpertParallelModel, calibration_NQ: torch.Tensor
) -> None:
    """Make a run's last snapshot the checkpoint in `output`, with routers and generalists, and remove its snapshots.

    calibration_NQ: windows of text on which the generalists are fitted. Needs no other rank. Raises OSError.
    """
    reader = SnapshotReader(snapshot)
    layers = {item.name: item.layer_idx for item in epm.expert_parameters()}

    def fill(staging: Path) -> None:
        model = whole_model(epm.module.config, reader, layers, num_experts=epm.num_experts)
        saved = None if epm.routed is None else saved_router(model, epm.routed.config, reader)
        model.save_pretrained(staging)
        if saved is not None:
            write_router(staging, saved)
        write_generalists(calibrate(model, calibration_NQ, router=saved), staging)

    publish(output, fill, summary)
    shutil.rmtree(output / FOLDER, ignore_errors=True)  # a finished run needs none; the next job here starts anew


def whole_model(config: Any, reader: SnapshotReader, expert_layers: dict[str, int], *, num_experts: int) -> Any:
    """The transformers model of a snapshot. expert_layers: stacked parameter's name -> MoE layer. CPU, float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a rank's log is no terminal
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    state = {k: value for k, value in reader.dense().items() if "#" not in k and not k.startswith(PREFIX)}
    for name, layer_idx in expert_layers.items():
        rows = [reader.expert(name, layer_idx=layer_idx, logical_id=e) for e in range(num_experts)]
        state[name] = torch.stack(rows)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or set(missing) - tied:
        raise ValueError(f"the snapshot does not fit the model: lacks {sorted(set(missing) - tied)}, knows {unknown}")
    model.tie_weights()
    return model.eval()


def saved_router(model: Any, config: RouterConfig, reader: SnapshotReader) -> SavedRouter:
    """The routers of a snapshot of this whole model, which is given their bias where its family has one of its own."""
    tensors = {key: value for key, value in reader.dense().items() if "#" not in key and key.startswith(PREFIX)}
    entries = find_experts(model)
    saved = SavedRouter(config, tensors)
    routed = restored(model, entries, saved, facts=facts_of(model.config, entries))
    return replace(saved, as_family=config.type == "TopK" and answers_alike(model, entries, routed))


def publish(output: Path, fill: Callable[[Path], None], summary: Summary) -> None:
    """`fill` writes the checkpoint into a folder beside; then everything is renamed into place."""
    staging = output / f".checkpoint-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        fill(staging)
        (output / SUMMARY).unlink(missing_ok=True)
        remove_router(output)
        for path in sorted(staging.iterdir()):
            path.replace(output / path.name)
        write_file(output / SUMMARY, json.dumps(asdict(summary), indent=1).encode())
    finally:
        shutil.rmtree(staging, ignore_errors=True)
