"""What is read of a checkpoint's config.json, with the names transformers' families use."""

import json
from pathlib import Path

import pytest

from moe_core.contract.packing import PackedConfig, Packing
from moe_core.facts import ModelFact
from moe_operator.cluster.local_model import read_model


@pytest.mark.parametrize(
    ("config", "experts", "layers"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 4}, 8, 4),
        ({"model_type": "olmoe", "num_experts": 16, "num_hidden_layers": 2}, 16, 2),
        (
            {
                "model_type": "qwen3_moe",
                "num_experts": 16,
                "num_hidden_layers": 6,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [1],
            },
            16,
            2,
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 64, "num_hidden_layers": 5, "first_k_dense_replace": 3},
            64,
            2,
        ),
        ({"model_type": "lfm2_moe", "num_experts": 8, "num_hidden_layers": 6, "num_dense_layers": 2}, 8, 4),
        (
            {
                "model_type": "jamba",
                "num_experts": 16,
                "num_hidden_layers": 8,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
            },
            16,
            4,
        ),
        (
            {
                "model_type": "nemotron_h",
                "n_routed_experts": 8,
                "layers_block_type": ["mamba", "moe", "attention", "moe"],
            },
            8,
            2,
        ),
        (
            {
                "model_type": "ernie4_5_moe",
                "moe_num_experts": 8,
                "num_hidden_layers": 6,
                "moe_layer_start_index": 1,
                "moe_layer_end_index": 4,
                "moe_layer_interval": 2,
            },
            8,
            2,
        ),
    ],
)
def test_experts_and_layers_are_found_under_each_familys_names(
    tmp_path: Path, config: dict[str, object], experts: int, layers: int
) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model(tmp_path) == ModelFact(experts, layers, str(config["model_type"]))


def test_a_checkpoint_of_packed_experts_says_how(tmp_path: Path) -> None:
    packed = PackedConfig(experts=Packing.of("Int4", 32), calibration="")
    config = {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_hidden_layers": 4,
        "quantization_config": packed.model_dump(),
    }
    (tmp_path / "packed-dense-00000.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model(tmp_path) == ModelFact(8, 4, "mixtral", packing=Packing.of("Int4", 32))


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generalist.safetensors").touch()
    assert read_model(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "config.json"),
        ("[]", "no JSON object"),
        ("{}", "not an MoE model"),
        ('{"num_experts": "many"}', "num_experts must be a whole number up to 65536 (got 'many')"),
        ('{"num_experts": -3}', "num_experts must be"),
        ('{"num_experts": 8, "num_hidden_layers": 1000000000}', "num_hidden_layers must be"),
        ('{"num_experts": 8, "num_hidden_layers": 4, "mlp_only_layers": 5}', "config.json"),
        ('{"text_config": 5}', "config.json"),
        (
            '{"model_type": "llama4", "num_local_experts": 8, "num_hidden_layers": 4}',
            "model family llama4 is not supported",
        ),
        ('{"model_type": "unlimited_ocr", "num_experts": 8}', "no request could be replayed"),
        ('{"model_type": "mixtral", "num_local_experts": 8, "quantization_config": {"bits": 4}}', "quantised"),
        (
            '{"model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 4, "quantization_config": '
            '{"quant_method": "moerator", "experts": {"precision": "Int3"}}}',
            "PackedConfig.experts.precision",
        ),
    ],
)
def test_a_config_that_cannot_be_served_says_why(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(text)
    found = read_model(tmp_path)
    assert found is not None
    assert word in found.problem


def test_a_folder_with_pickled_weights_only_is_refused_by_their_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 2}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    fact = read_model(tmp_path)
    assert fact is not None
    assert fact.problem.endswith("weights are read from safetensors only, and there is pytorch_model.bin")
