"""What rank processes do in the training tests: train a very small model over a group and hand back numbers."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gloo_ranks import join_group
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.router import LocalityConfig, RouterConfig
from moe_core.contract.runtime_config import ModelShape, ModelSource, TrainingConfig
from moe_core.outcome import InvalidInput
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.errors import GroupFault
from moe_runtime.membership.group import EpochGroup
from moe_runtime.train import loop
from moe_runtime.train.data import asked_router, load_corpus
from moe_runtime.train.gradients import complete_gradients
from moe_runtime.train.loop import Trainer
from moe_runtime.train.losses import losses
from moe_runtime.train.snapshot import SnapshotReader, step_folder
from router_cases import Unlike

NUM_LAYERS, NUM_EXPERTS = 2, 8
SHAPE = ModelShape(
    family="qwen3_moe",
    hidden_size=32,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=NUM_EXPERTS,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    vocab_size=256,
    max_position_embeddings=128,
)
WINDOWS_PER_STEP = 8


def write_text(folder: Path) -> Path:
    """A folder of text of which some files are held out."""
    folder.mkdir()
    for number in range(40):
        lines = (f"def step_{number}(x): return x + {number * i}\n" for i in range(12))
        (folder / f"file{number}.py").write_text("".join(lines))
    return folder


def config_for(output: Path, text: Path, *, num_ranks: int, **changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "data": str(text),
        "sequence_length": 16,
        "sequences_per_rank": WINDOWS_PER_STEP // num_ranks,
        "max_steps": 8,
        "max_seconds": None,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "weight_decay": 0.05,
        # per rank's own tokens, so that it differs between one rank and several: off where they are compared
        "aux_loss_coefficient": 0.0,
        "seed": 5,
        "snapshot_every_steps": 3,
        "output_path": str(output),
        "optimizer": "Muon",
    }
    return TrainingConfig(**{**values, **changes})


def even_map(num_ranks: int, *, redundant: int = 0) -> ExpertMap:
    """Experts in order, and `redundant` slots per rank with copies of the next rank's experts."""
    each = NUM_EXPERTS // num_ranks
    row: list[int] = []
    for rank in range(num_ranks):
        row += [rank * each + i for i in range(each)]
        row += [((rank + 1) * each + i) % NUM_EXPERTS for i in range(redundant)]
    return ExpertMap(
        generation=0,
        num_logical_experts=NUM_EXPERTS,
        slots_of_rank=(each + redundant,) * num_ranks,
        logical_of_slot=(tuple(row),) * NUM_LAYERS,
    )


def trainer_for(
    config: TrainingConfig,
    expert_map: ExpertMap,
    rank: int,
    *,
    router: dict[str, Any] | None = None,
    family: str = SHAPE.family,
) -> Trainer:
    """`router`: options of a RouterConfig."""
    source = ModelSource(shape=SHAPE.model_copy(update={"family": family}))
    corpus = load_corpus(config.data)
    asked = None if router is None else asked_router(RouterConfig(**router), corpus)
    epm = ExpertParallelModel.load(source, expert_map=expert_map, rank=rank, seed=config.seed, router=asked)
    return Trainer(config, epm, run_id="test", corpus=corpus)


def everything(output: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a snapshot, parameters and optimizer state, experts as whole stacks."""
    reader = SnapshotReader(step_folder(output, step))
    found = dict(reader.dense())
    for layer_idx in range(NUM_LAYERS):
        prefix = f"model.layers.{layer_idx}.mlp.experts."
        for name in ("gate_up_proj", "down_proj", "gate_up_proj#momentum", "down_proj#momentum"):
            rows = [reader.expert(prefix + name, layer_idx=layer_idx, logical_id=e) for e in range(NUM_EXPERTS)]
            found[prefix + name] = torch.stack(rows)
    return found


def live_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of everything a step may change on this rank."""
    tensors = {name: p.detach().clone() for name, p in trainer.epm.module.named_parameters()}
    if trainer.epm.routed is not None:
        tensors.update({name: tensor.clone() for name, tensor in trainer.epm.routed.tensors().items()})
    for name, moments in trainer._optimizer.state.items():
        tensors.update({f"{name}#{moment}": tensor.clone() for moment, tensor in moments.items()})
    return tensors


def train(
    rank: int,
    store_path: str,
    *,
    size: int,
    output: str,
    text: str,
    redundant: int,
    steps: int,
    router: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Losses of `steps` steps; the last step is left as a snapshot."""
    config = config_for(Path(output), Path(text), num_ranks=size, **changes)
    trainer = trainer_for(config, even_map(size, redundant=redundant), rank, router=router)
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        trainer.epm.bind(group)
        trainer.bind(group)
        trainer.restore()
        reports = [trainer.step() for _ in range(steps)]
        trainer.snapshot()
    return [report.loss_bits for report in reports], [report.gradient_norm for report in reports]


def train_to_the_end(
    rank: int, store_path: str, *, size: int, output: str, text: str, router: dict[str, Any] | None = None
) -> Any:
    """A whole run up to the checkpoint: (held-out figure, summary of the one that wrote it)."""
    config = config_for(Path(output), Path(text), num_ranks=size, aux_loss_coefficient=0.01)
    trainer = trainer_for(config, even_map(size), rank, router=router)
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        trainer.epm.bind(group)
        trainer.bind(group)
        trainer.restore()
        while not trainer.finished:
            trainer.step()
        bits = trainer.evaluate()
        summary = trainer.finish()
        group.all_gather_ints((1,), timeout_ms=60_000)
        trainer._stale = True  # as a replacement that comes after the end would be
        again = trainer.restore(), trainer.finished
    return bits, summary, again


def lose_a_rank(
    process: int,
    store_path: str,
    *,
    output: str,
    text: str,
    at_step: int,
    where: str,
    router: dict[str, Any] | None = None,
) -> Any:
    """Rank 1 kills itself inside a step; process number 2 takes its place. Steps seen by each, by epoch."""
    num_ranks = 2
    is_replacement = process == num_ranks
    rank = 1 if is_replacement else process
    config = config_for(Path(output), Path(text), num_ranks=num_ranks, aux_loss_coefficient=0.01)
    trainer = trainer_for(config, even_map(num_ranks), rank, router=router)
    untouched = None
    if not is_replacement:
        with join_group(store_path, ranks=range(num_ranks), rank=rank) as group:
            trainer.epm.bind(group)
            trainer.bind(group)
            trainer.restore()
            for _ in range(at_step):
                trainer.step()
            if rank == 1:
                _die_in(trainer, where)
            before, state = live_tensors(trainer), trainer.state
            try:
                trainer.step()
            except GroupFault:
                after = live_tensors(trainer)
                untouched = state == trainer.state and all(torch.equal(before[name], after[name]) for name in before)
    with join_group(store_path, ranks=range(num_ranks), rank=rank, epoch=2, timeout_ms=40_000) as group:
        trainer.epm.bind(group)
        trainer.bind(group)
        restored = trainer.restore()
        losses = []
        while not trainer.finished:
            losses.append(trainer.step().loss_bits)
        trainer.snapshot()
    return untouched, restored, losses


def route_own_texts(rank: int, store_path: str, *, size: int, text: str, routers: dict[str, dict[str, Any]]) -> Any:
    """By router: logits of this rank's own texts, scored whole, and gradients of a step in which all ranks read the
    texts of rank 0: then one process has the same ones.
    """
    if size == 1:
        return {name: _route_own_texts(None, 0, text, options) for name, options in routers.items()}
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        return {name: _route_own_texts(group, rank, text, options) for name, options in routers.items()}


def _route_own_texts(group: EpochGroup | None, rank: int, text: str, router: dict[str, Any]) -> Any:
    size = 1 if group is None else group.size
    config = config_for(Path(text), Path(text), num_ranks=size)
    epm = trainer_for(config, even_map(size, redundant=int(size > 1)), rank, router=router).epm
    epm.bind(group)
    assert epm.routed is not None
    with torch.no_grad(), epm.routed.scoring_whole_texts():
        logits = [
            epm.module(input_ids=own_texts(each), use_cache=False).logits.tolist()
            for each in (range(2) if group is None else [rank])
        ]
    epm.rollback()
    epm.routed.begin(step=0, progress=0.0, group=None)
    torch.autograd.backward(losses(epm, own_texts(0), aux_coefficient=0.0).text / size)
    of = complete_gradients(epm, group, sums=()).of
    return logits, {key: of[key].tolist() for key, _ in epm.dense_parameters()}


def own_texts(rank: int) -> torch.Tensor:
    return torch.randint(0, 256, (3 + rank, 13), generator=torch.Generator().manual_seed(rank))


def serve_like_trained(
    rank: int,
    store_path: str,
    *,
    size: int,
    output: str,
    texts: list[list[int]],
    locality: LocalityConfig | None = None,
) -> Any:
    """Rank 0 reads the texts of a checkpoint in two parts over the serving path: logits of the last token of each, and
    its picks by layer and expert.
    """
    source = ModelSource(path=output)
    epm = ExpertParallelModel.load(source, expert_map=even_map(size), rank=rank, locality=locality)
    ids_BQ = torch.tensor(texts)
    places_BQ = torch.arange(ids_BQ.shape[1]).expand_as(ids_BQ)
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        epm.bind(group)
        cache = epm.new_cache(num_rows=len(texts), max_length=ids_BQ.shape[1])
        for part in (slice(0, -1), slice(-1, None)):
            ids, places = (ids_BQ[:, part], places_BQ[:, part]) if rank == 0 else (None, None)
            logits_BV = epm.forward_tokens(ids, places, range(len(ids_BQ)) if rank == 0 else (), cache)
            epm.commit()
    return logits_BV.tolist(), epm.load_window()


def _die_in(trainer: Trainer, where: str) -> None:
    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "forward":
        trainer.epm.module.model.layers[1].register_forward_pre_hook(die)
    elif where == "backward":
        trainer.epm.module.model.layers[0].register_full_backward_hook(die)
    else:  # gradients are complete, the last exchange has not happened
        original: Callable[..., Any] = vars(loop)["complete_gradients"]

        def after(*arguments: Any, **named: Any) -> Any:
            original(*arguments, **named)
            die()

        vars(loop)["complete_gradients"] = after


def train_undisturbed(
    rank: int, store_path: str, *, size: int, output: str, text: str, router: dict[str, Any] | None = None
) -> list[float]:
    """What `lose_a_rank` is compared with: the same run in which nobody dies."""
    config = config_for(Path(output), Path(text), num_ranks=size, aux_loss_coefficient=0.01)
    trainer = trainer_for(config, even_map(size), rank, router=router)
    losses = []
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        trainer.epm.bind(group)
        trainer.bind(group)
        trainer.restore()
        while not trainer.finished:
            losses.append(trainer.step().loss_bits)
        trainer.snapshot()
    return losses


def train_with_unlike_routers(
    rank: int, store_path: str, *, size: int, output: str, text: str, whats: list[str]
) -> Any:
    """By what is another on every rank: the losses and the routers' tensors at the end, or why not."""
    Unlike.rank = rank
    found: dict[str, Any] = {}
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        for what in whats:
            config = config_for(Path(output) / what, Path(text), num_ranks=size, max_steps=3)
            router = {"type": "Custom", "class_path": "router_cases:Unlike", "options": {"what": what}}
            trainer = trainer_for(config, even_map(size), rank, router=router)
            trainer.epm.bind(group)
            trainer.bind(group)
            assert trainer.epm.routed is not None
            try:
                trainer.restore()
                losses = [trainer.step().loss_bits for _ in range(3)]
                tensors = trainer.epm.routed.tensors()
                found[what] = losses, {name: tensor.tolist() for name, tensor in tensors.items()}
            except InvalidInput as error:
                found[what] = str(error)
    return found


def train_every_router(
    rank: int, store_path: str, *, size: int, output: str, text: str, routers: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """By name: bits of each step, held-out bits, the router's tensors, whether a snapshot brings them back."""
    found: dict[str, Any] = {}
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        for name, router in routers.items():
            folder = Path(output) / name
            folder.mkdir(exist_ok=True)
            config = config_for(folder, Path(text), num_ranks=size, max_steps=4, snapshot_every_steps=2)
            trainer = trainer_for(config, even_map(size, redundant=1), rank, router=router)
            trainer.epm.bind(group)
            trainer.bind(group)
            trainer.restore()
            losses = [trainer.step().loss_bits for _ in range(4)]
            trainer.snapshot()
            assert trainer.epm.routed is not None
            tensors = {key: tensor.detach().clone() for key, tensor in trainer.epm.routed.tensors().items()}
            bits = trainer.evaluate()
            again = trainer_for(config, even_map(size, redundant=1), rank, router=router)
            again.epm.bind(group)
            again.bind(group)
            again.restore()
            assert again.epm.routed is not None
            same = all(torch.equal(tensor, tensors[key]) for key, tensor in again.epm.routed.tensors().items())
            found[name] = (losses, bits, {key: tensor.tolist() for key, tensor in tensors.items()}, same)
    return found
