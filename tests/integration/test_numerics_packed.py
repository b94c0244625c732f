"""Packed experts over real ranks: they answer as the same numbers do in full, move as codes, are checked as codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import numerics_tasks as tasks
from gloo_ranks import run_ranks
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.packing import Packing
from moe_core.contract.runtime_config import DispatchConfig, ModelShape, ModelSource
from moe_core.outcome import InvalidInput
from moe_runtime.convert.calibrate import Calibration
from moe_runtime.convert.quantise import quantise
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts import store
from moe_runtime.experts.build import build
from moe_runtime.experts.families import read_facts
from moe_runtime.experts.packed_config import read_packed
from moe_runtime.kernels import mixture
from numerics_families import equal_families, save_tiny
from numerics_reference import Reference
from packed_reference import put_back

pytestmark = pytest.mark.integration

TOLERANCE = 1e-4
INT4 = Packing.of("Int4", 16)
ONE_RANK = ((9,), (3, 1, 0, 2, 4, 7, 6, 5, 0))
TWO_RANKS = ((5, 5), (0, 2, 4, 6, 1, 1, 3, 5, 7, 0))
SHAPE = ModelShape(
    family="qwen3_moe",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    vocab_size=64,
    max_position_embeddings=64,
)
OTHER_TWO_RANKS = ((5, 5), (0, 2, 4, 7, 3, 1, 3, 5, 6, 2))


def expert_map(folder: Path, layout: tuple[tuple[int, ...], tuple[int, ...]], *, generation: int = 1) -> ExpertMap:
    facts = read_facts(ModelSource(path=str(folder)))
    return ExpertMap(
        generation=generation,
        num_logical_experts=facts.num_experts,
        slots_of_rank=layout[0],
        logical_of_slot=(layout[1],) * facts.num_layers,
    )


def packed(reference: Reference, packing: Packing, folder: Path) -> tuple[Path, Reference]:
    """The reference's checkpoint packed, and the model that it is then."""
    destination = folder / "packed"
    quantise(reference.folder, destination, packing)
    model = put_back(tasks.reference_model(reference.family), destination)
    return destination, Reference(reference.family, destination, model)


@pytest.mark.parametrize(
    "packing", [INT4, Packing.of("Int4", 24), Packing.of("Int8"), Packing.of("Float8", 8)], ids=str
)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_two_ranks_of_packed_experts_equal_one_process_with_the_same_numbers_in_full(
    family: str, packing: Packing, references: dict[str, Reference], tmp_path: Path
) -> None:
    folder, reference = packed(references[family], packing, tmp_path)
    results = run_ranks(
        tasks.serve,
        num_ranks=2,
        store_path=str(tmp_path / "store"),
        folder=str(folder),
        expert_map=expert_map(folder, TWO_RANKS),
        world=2,
        forced=reference.forced(),
    )

    expected = reference.generated()
    for rank in range(2):
        for step, logits in enumerate(results[rank]["steps"]):
            for row, prompt in enumerate(expected[rank]):
                assert np.abs(logits[row] - prompt.logits[step]).max() <= TOLERANCE


@pytest.mark.parametrize("family", equal_families())
def test_every_family_answers_as_with_the_same_numbers_in_full(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "full")
    quantise(tmp_path / "full", tmp_path / "packed", Packing.of("Int4", 8))
    ids = torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(12))
    with torch.no_grad():
        theirs = put_back(model, tmp_path / "packed")(input_ids=ids).logits
        ours = load(tmp_path / "packed").module(input_ids=ids).logits
    assert float((ours - theirs).abs().max()) <= TOLERANCE


def test_a_matrix_whose_input_cannot_be_read_is_packed_without_text_and_said_so(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    """muse_spark normalises what its second matrix gives."""
    folder = references["muse_spark"].folder
    converted = quantise(folder, tmp_path / "packed", INT4, calibration=calibrated(folder))
    assert [layer["ways"]["nearest, unread"] for layer in converted.layers] == [8] * len(converted.layers)


def load(folder: Path, *, packing: Packing | None = None) -> ExpertParallelModel:
    source = ModelSource(path=str(folder), packing=packing)
    return ExpertParallelModel.load(source, expert_map=expert_map(folder, ONE_RANK), rank=0)


def logits_of(epm: ExpertParallelModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = epm.module(input_ids=tasks.batch_of_rank(0, 1)).logits
    return logits


def test_experts_packed_while_loading_are_those_of_a_packed_checkpoint_of_the_same_codes(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    packing = Packing.of("BFloat16")
    folder, reference = packed(references["qwen3_moe"], packing, tmp_path)
    from_full, from_packed = load(references["qwen3_moe"].folder, packing=packing), load(folder)
    assert from_full.slot_digests() == from_packed.slot_digests()
    ids = tasks.batch_of_rank(0, 1)
    with torch.no_grad():
        theirs = reference.model(input_ids=ids).logits
    assert float((logits_of(from_full) - theirs).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("packing", [INT4, Packing.of("Int8"), Packing.of("BFloat16")], ids=str)
def test_a_slot_takes_the_bytes_of_its_codes(
    packing: Packing, references: dict[str, Reference], tmp_path: Path
) -> None:
    folder, _ = packed(references["qwen3_moe"], packing, tmp_path)
    epm = load(folder)
    assert epm.expert_bytes() == packing.matrix_bytes(32, 32) + packing.matrix_bytes(32, 16)
    experts = next(module for name, module in epm.module.named_modules() if name.endswith("mlp.experts"))
    assert {parameter.untyped_storage().nbytes() for parameter in experts.parameters()} == {4}


def test_more_slots_than_are_unpacked_at_a_time_answer_alike(
    references: dict[str, Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = packed(references["gpt_oss"], INT4, tmp_path)
    epm = load(folder)
    at_once = logits_of(epm)
    monkeypatch.setattr(store, "UNPACKED_BYTES", 1)
    assert float((logits_of(epm) - at_once).abs().max()) <= TOLERANCE


def test_experts_move_as_codes_and_arrive_with_their_digests(references: dict[str, Reference], tmp_path: Path) -> None:
    folder, reference = packed(references["qwen3_moe"], INT4, tmp_path)
    maps = [expert_map(folder, TWO_RANKS), expert_map(folder, OTHER_TWO_RANKS, generation=2)]
    source = ModelSource(path=str(folder))
    ranks = [ExpertParallelModel.load(source, expert_map=maps[0], rank=rank) for rank in range(2)]
    before = {(0, e): ranks[rank].slot_digest(0, e) for rank in range(2) for e in range(8) if ranks[rank].holds(0, e)}
    for rank in ranks:
        staged = rank.stage(maps[1])
        assert rank.commit_map(staged) == 2 * rank.num_layers * rank.expert_bytes()  # 7 and 3, or 6 and 2
        rank.bind(None)
        rank.slot_digests(fresh=True)
        for e in range(8):
            if rank.holds(0, e):
                assert rank.slot_digest(0, e) == before[0, e] == rank.source_digest(0, e)

    results = run_ranks(
        tasks.move_between_steps,
        num_ranks=2,
        store_path=str(tmp_path / "store"),
        folder=str(folder),
        maps=maps,
        world=2,
    )
    whole = reference.model(input_ids=tasks.batch_of_rank(0, 1)).logits.detach().numpy()
    for rank_idx in range(2):
        for step, last in zip(results[rank_idx]["steps"], (4, 6, 8), strict=True):
            assert np.abs(step - whole[:, last]).max() <= TOLERANCE


def calibrated(folder: Path) -> Calibration:
    """On random tokens: whatever the model makes of them is what its experts are asked."""
    source, facts = ModelSource(path=str(folder)), read_facts(ModelSource(path=str(folder)))
    emap = expert_map(folder, ((facts.num_experts,), tuple(range(facts.num_experts))))
    built = build(source, expert_map=emap, rank=0, device="cpu", seed=0, dispatch=DispatchConfig())
    calibration = Calibration(built, rows_per_expert=128)
    calibration.read(torch.randint(0, 60, (48, 16), generator=torch.Generator().manual_seed(1)))
    return calibration


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_codes_chosen_by_what_experts_give_err_less_on_rows_that_only_score_than_the_nearest_codes(
    family: str, references: dict[str, Reference], tmp_path: Path
) -> None:
    reference, packing = references[family], Packing.of("Int4", 8)
    calibration = calibrated(reference.folder)
    converted = quantise(reference.folder, tmp_path / "chosen", packing, calibration=calibration)

    assert all("nearest, unread" not in layer["ways"] for layer in converted.layers)
    assert all(layer["output_error_chosen"] < layer["output_error_nearest"] for layer in converted.layers)
    assert all(layer["ways"]["gptq"] > 0 for layer in converted.layers)


def test_a_packed_checkpoint_says_what_its_codes_were_chosen_by(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    folder = references["qwen3_moe"].folder
    quantise(folder, tmp_path / "chosen", INT4, calibration=calibrated(folder))
    said = read_packed(tmp_path / "chosen")
    assert said is not None
    assert said.calibration == "768 tokens of text"


def flip_a_bit(folder: Path, *, of_layer: int) -> Path:
    file = folder / f"packed-experts-{of_layer:05}.safetensors"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    return file


def test_a_damaged_expert_is_refused_by_file_and_name(references: dict[str, Reference], tmp_path: Path) -> None:
    folder, _ = packed(references["qwen3_moe"], INT4, tmp_path)
    file = flip_a_bit(folder, of_layer=1)
    with pytest.raises(InvalidInput, match=f"{file.name}: expert 7 of model.layers.1.mlp.experts is not what was"):
        load(folder)


def test_a_truncated_file_is_refused_by_name(references: dict[str, Reference], tmp_path: Path) -> None:
    folder, _ = packed(references["qwen3_moe"], INT4, tmp_path)
    file = folder / "packed-experts-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match=f"{file.name} is not a readable safetensors file"):
        load(folder)


def test_codes_of_another_packing_than_config_json_says_are_refused(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    folder, _ = packed(references["qwen3_moe"], INT4, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["experts"]["group_size"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=r"scales has shape \[8, 32, 2\], the model wants \[8, 32, 4\]"):
        load(folder)


def test_another_packing_than_the_checkpoints_own_is_refused(references: dict[str, Reference], tmp_path: Path) -> None:
    folder, _ = packed(references["qwen3_moe"], INT4, tmp_path)
    with pytest.raises(InvalidInput, match="packed as Int4 in groups of 16 already, not as Int8 by row"):
        load(folder, packing=Packing.of("Int8"))


def test_packed_experts_cannot_be_trained(references: dict[str, Reference], tmp_path: Path) -> None:
    folder, _ = packed(references["qwen3_moe"], INT4, tmp_path)
    epm = load(folder)
    with pytest.raises(InvalidInput, match="they answer, they cannot be trained"):
        epm.expert_parameters()
    with pytest.raises(InvalidInput, match="they answer, they cannot be trained"):
        epm.module(input_ids=tasks.batch_of_rank(0, 1))


def test_a_packed_checkpoint_is_not_packed_again(references: dict[str, Reference], tmp_path: Path) -> None:
    folder, _ = packed(references["qwen3_moe"], INT4, tmp_path)
    with pytest.raises(InvalidInput, match="is packed already"):
        quantise(folder, tmp_path / "again", INT4)


def test_nothing_is_left_of_a_conversion_that_fails(references: dict[str, Reference], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((references["qwen3_moe"].folder / "config.json").read_text())
    tensors = load_file(str(references["qwen3_moe"].folder / "model.safetensors"))
    name = next(name for name in reversed(tensors) if "experts" in name)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, str(source / "model.safetensors"))
    with pytest.raises(InvalidInput, match="finite"):
        quantise(source, tmp_path / "packed", INT4)
    assert list((tmp_path / "packed").iterdir()) == []


def test_transformers_alone_refuses_packed_experts_rather_than_filling_them_at_random(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = packed(references["qwen3_moe"], INT4, tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("packing", [Packing.of("Int4", 32), Packing.of("Float8")], ids=str)
def test_where_kernels_multiply_codes_the_answer_is_that_of_unpacked_experts(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter; tests/gpu holds the kernels themselves on a device."""
    emap = ExpertMap(generation=0, num_logical_experts=8, slots_of_rank=(8,), logical_of_slot=(tuple(range(8)),) * 2)
    epm = ExpertParallelModel.load(ModelSource(shape=SHAPE, packing=packing), expert_map=emap, rank=0)
    unpacked = logits_of(epm)
    monkeypatch.setattr(mixture, "packed_runs_here", lambda *_: True)
    monkeypatch.setattr(store.PackedStore, "_run_unpacked", None)
    assert float((logits_of(epm) - unpacked).abs().max()) <= TOLERANCE * float(unpacked.abs().max())
