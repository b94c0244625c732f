"""Where weights come from: seeds that do not know the layout, checkpoints of all namings, and refusals that say why."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import numerics_tasks as tasks
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_core.outcome import InvalidInput
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.families import UnsupportedModel, read_facts
from numerics_reference import Reference

pytestmark = pytest.mark.integration

SHAPE = ModelShape(
    family="qwen3_moe",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    vocab_size=256,
    max_position_embeddings=64,
)


def emap(
    slots_of_rank: tuple[int, ...], row: tuple[int, ...], *, num_layers: int = 2, num_experts: int = 4
) -> ExpertMap:
    return ExpertMap(
        generation=0,
        num_logical_experts=num_experts,
        slots_of_rank=slots_of_rank,
        logical_of_slot=(row,) * num_layers,
    )


def from_shape(expert_map: ExpertMap, rank: int, *, seed: int = 7) -> ExpertParallelModel:
    return ExpertParallelModel.load(ModelSource(shape=SHAPE), expert_map=expert_map, rank=rank, seed=seed)


def test_a_seed_gives_every_rank_the_same_dense_weights_and_every_layout_the_same_experts() -> None:
    whole = from_shape(emap((4,), (0, 1, 2, 3)), 0)
    part = from_shape(emap((1, 3), (3, 2, -1, 0)), 1)
    for (name, ours), (_, theirs) in zip(part.dense_parameters(), whole.dense_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for ours_e, theirs_e in zip(part.expert_parameters(), whole.expert_parameters(), strict=True):
        assert torch.equal(ours_e.parameter[0], theirs_e.parameter[2])
        assert torch.equal(ours_e.parameter[1], torch.zeros_like(ours_e.parameter[1]))
        assert torch.equal(ours_e.parameter[2], theirs_e.parameter[0])


def test_another_seed_gives_other_weights_of_the_familys_own_spread() -> None:
    one, other = (from_shape(emap((4,), (0, 1, 2, 3)), 0, seed=seed) for seed in (1, 2))
    first, second = one.expert_parameters()[0].parameter, other.expert_parameters()[0].parameter
    assert not torch.equal(first, second)
    assert float(first.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_facts_of_a_checkpoint_are_read_without_weights(family: str, references: dict[str, Reference]) -> None:
    facts = read_facts(ModelSource(path=str(references[family].folder)))
    assert (facts.family, facts.num_layers, facts.num_experts, facts.top_k, facts.vocab_size) == (
        family,
        tasks.num_moe_layers(family),
        8,
        2,
        64,
    )


def test_a_rank_reads_the_tensors_of_its_own_experts_only(
    references: dict[str, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_runtime.experts import weights

    read: list[str] = []
    original = weights.CheckpointWeights.tensor

    def recording(self: weights.CheckpointWeights, key: str) -> torch.Tensor:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(weights.CheckpointWeights, "tensor", recording)
    source = ModelSource(path=str(references["mixtral"].folder))
    ExpertParallelModel.load(source, expert_map=emap((2, 6), tuple(range(8)), num_layers=3, num_experts=8), rank=0)
    experts_read = {key.split(".experts.")[1].split(".")[0] for key in read if ".experts." in key}
    assert experts_read == {"0", "1"}


def test_a_sharded_checkpoint_is_read_like_a_single_file(references: dict[str, Reference], tmp_path: Path) -> None:
    reference = references["qwen3_moe"]
    model: Any = reference.model
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole = emap((8,), tuple(range(8)), num_layers=3, num_experts=8)
    epm = ExpertParallelModel.load(ModelSource(path=str(tmp_path)), expert_map=whole, rank=0)
    ids = tasks.batch_of_rank(0, 1)
    with torch.no_grad():
        assert torch.equal(epm.module(input_ids=ids).logits, reference.model(input_ids=ids).logits)


def test_a_map_for_another_model_is_refused_with_both_sizes() -> None:
    with pytest.raises(InvalidInput, match=r"3 layers of 4 experts, the qwen3_moe model 2 of 4"):
        from_shape(emap((4,), (0, 1, 2, 3), num_layers=3), 0)


def test_layers_whose_slots_stay_are_staged_without_a_copy() -> None:
    epm = from_shape(emap((2, 2), (0, 1, 2, 3)), 0)
    swapped = ExpertMap(
        generation=1, num_logical_experts=4, slots_of_rank=(2, 2), logical_of_slot=((0, 1, 2, 3), (1, 0, 2, 3))
    )
    before = [parameter.parameter.data_ptr() for parameter in epm.expert_parameters()]
    epm.commit_map(epm.stage(swapped))
    after = [parameter.parameter.data_ptr() for parameter in epm.expert_parameters()]
    half = len(before) // 2
    assert after[:half] == before[:half] and not set(after[half:]) & set(before[half:])


def test_binding_a_map_whose_slots_are_not_loaded_is_refused() -> None:
    epm = from_shape(emap((4,), (0, 1, 2, 3)), 0)
    with pytest.raises(InvalidInput, match="stage and commit the map first"):
        epm.bind(None, expert_map=emap((4,), (3, 1, 2, 0)))


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("unlimited_ocr_text", "no causal language model"),
        ("jamba", "2 layers of 4 experts has 1 layers of 4; give a checkpoint"),
        ("zaya", "num_experts_per_tok=1"),
        ("llama", "marks no module with ep_dispatch_experts"),
        ("ernie4_5_vl_moe", "composite and needs more numbers"),
        ("no_such_family", "transformers knows no such model type"),
        ("deepseek_v3", "latent attention needs more numbers than a shape has"),
    ],
)
def test_a_family_that_cannot_run_is_refused_with_its_reason(family: str, why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why) as refusal:
        read_facts(ModelSource(shape=SHAPE.model_copy(update={"family": family})))
    assert refusal.value.family == family


def test_a_quantised_checkpoint_is_refused(references: dict[str, Reference], tmp_path: Path) -> None:
    config = (references["qwen3_moe"].folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    with pytest.raises(UnsupportedModel, match="quantised"):
        read_facts(ModelSource(path=str(tmp_path)))


def test_a_truncated_or_missing_weight_file_is_refused_by_name(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    source = references["qwen3_moe"].folder
    whole = emap((8,), tuple(range(8)), num_layers=3, num_experts=8)
    with pytest.raises(OSError, match=r"config\.json"):
        read_facts(ModelSource(path=str(tmp_path)))
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ExpertParallelModel.load(ModelSource(path=str(tmp_path)), expert_map=whole, rank=0)
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InvalidInput, match="not a readable safetensors file"):
        ExpertParallelModel.load(ModelSource(path=str(tmp_path)), expert_map=whole, rank=0)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(references: dict[str, Reference], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = references["qwen3_moe"].folder
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    whole = emap((8,), tuple(range(8)), num_layers=3, num_experts=8)
    with pytest.raises(InvalidInput, match=r"lacks 1 tensors, first model\.norm\.weight"):
        ExpertParallelModel.load(ModelSource(path=str(tmp_path)), expert_map=whole, rank=0)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model.norm.weight", float("nan"), "model.norm.weight holds 1 values"),
        ("model.layers.1.mlp.experts.5.down_proj.weight", float("-inf"), "expert 5 of model.layers.1.mlp.experts.down"),
    ],
    ids=["dense", "expert"],
)
def test_a_checkpoint_that_holds_what_is_no_number_is_refused_by_name(
    references: dict[str, Reference], tmp_path: Path, key: str, value: float, named: str
) -> None:
    from safetensors.torch import load_file, save_file

    source = references["qwen3_moe"].folder
    tensors = load_file(source / "model.safetensors")
    tensors[key].view(-1)[3] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    whole = emap((8,), tuple(range(8)), num_layers=3, num_experts=8)
    with pytest.raises(InvalidInput, match=named):
        ExpertParallelModel.load(ModelSource(path=str(tmp_path)), expert_map=whole, rank=0)


def test_a_model_brings_no_optimisers_of_scipy_along() -> None:
    code = (
        "import sys; from transformers.utils import is_scipy_available as known\n"
        "from moe_core.contract.runtime_config import ModelShape, ModelSource\n"
        "from moe_runtime.experts.families import read_facts\n"
        f"read_facts(ModelSource(shape=ModelShape(**{SHAPE.model_dump()!r})))\n"
        "from transformers.utils import is_scipy_available as now\n"
        "print('scipy.optimize' in sys.modules, 'transformers.loss.loss_utils' in sys.modules, now is known)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
