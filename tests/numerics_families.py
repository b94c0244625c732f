"""A tiny config for every MoE family of transformers: numbers by the names that configs know, and the few facts that a
family insists on.
"""

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_experts_per_tok": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 128,
    "n_group": 2,
    "topk_group": 1,
    "sliding_window": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 6,
    "d_rel": 4,
    "rel_extent": 16,
    "index_topk": 4,
    "index_n_heads": 8,
    "index_head_dim": 8,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hc_lowrank": 8,
    "o_lora_rank": 8,
    "moe_hidden_size": 24,
    "share_expert_dim": 16,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "unpadded_vocab_size": 60,
    # towers for pictures and sound
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "projector_hidden_size": 32,
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 32,
    "output_proj_dims": 32,
    "downsample_hidden_size": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "output_dim": 32,
    "image_size": 28,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
}
"""Each config takes the numbers that it knows, its sub-configs too."""
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_SECTIONED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
FACTS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT | _MIXED | {"n_group": 1},
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "head_dim": None, "mlp_layer_types": ["dense"] + ["sparse"] * 3},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 12,
        "shared_experts_intermediate_size": 16,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [0, 0, 4, 4], "num_experts_per_tok": 2},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 12],
        "rope_parameters": _SECTIONED | {"mrope_section": [1, 1, 2]},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "pad_token_id": 0,
    },
    "glm4_moe_lite": _LATENT,
    "glm4v_moe_text": {"rope_parameters": _SECTIONED | {"partial_rotary_factor": 1.0}},
    "glm5_next_text": {"num_key_value_heads": 4, "head_dim": 0, "qk_rope_head_dim": 0, "index_kpool": 2},
    "glm_moe_dsa": _LATENT,
    "granitemoehybrid": _MIXED | {"mamba_n_heads": 4},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 8, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LATENT | _MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax_m3_vl_text": {
        "index_n_heads": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "rotary_dim": 4,
    },
    "mistral4": {"num_key_value_heads": 4},
    "mistral_large4_text": _LATENT,
    "step3p5": {"pad_token_id": 0, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "inkling_vision": {"n_layers": 4, "patch_size": 4},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1]},
    "qwen3_omni_moe_text": {"rope_parameters": _SECTIONED},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 60},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 1],
            "partial_rotary_factor": 0.75,
        },
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family insists on, and layer types of both kinds where four layers have but one by default."""

NO_HEAD = "no causal language model"
REFUSED = {
    "deepseek_ocr2_text": NO_HEAD,
    "diffusion_gemma": NO_HEAD,
    "diffusion_gemma_text": NO_HEAD,
    "dots3_note_vision_encoder": NO_HEAD,
    "ernie4_5_vl_moe_text": NO_HEAD,
    "glm4v_moe_text": NO_HEAD,
    "glm5_next_text": NO_HEAD,
    "mistral_large4_text": NO_HEAD,
    "muse_spark_text": NO_HEAD,
    "openai_privacy_filter": NO_HEAD,
    "qwen3_omni_moe_talker_text": NO_HEAD,
    "qwen3_omni_moe_text": NO_HEAD,
    "qwen3_vl_moe_text": NO_HEAD,
    "step3p5": NO_HEAD,
    "unlimited_ocr": "reference_sliding_attention layers treat a prompt otherwise than the tokens generated after it",
    "unlimited_ocr_text": NO_HEAD,
}
"""Family -> why it cannot run. Most are halves of composite models, which transformers only runs whole."""


def tiny_config(family: str) -> Any:
    """The family's config with tiny numbers. Raises whatever the family's own validation raises."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**_numbers(CONFIG_MAPPING[family]()))


def _numbers(default: Any) -> dict[str, Any]:
    plain = default.to_dict()
    numbers: dict[str, Any] = {name: value for name, value in SIZES.items() if plain.get(name) is not None}
    numbers |= {name: value for name, value in SPECIAL.items() if name in plain}
    for name in getattr(type(default), "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            numbers[name] = {"model_type": part.model_type, **_numbers(part)}
    return numbers | FACTS.get(default.model_type, {})


def moe_families() -> list[str]:
    """Every model type whose plan, or whose text part's plan, marks experts to dispatch, and that has a text model."""
    from transformers import CONFIG_MAPPING

    return sorted(family for family in CONFIG_MAPPING if _dispatches(CONFIG_MAPPING[family]))


def equal_families() -> list[str]:
    """Those of them that run."""
    return [family for family in moe_families() if family not in REFUSED]


def _dispatches(config_class: Any) -> bool:
    text = getattr(config_class, "sub_configs", {}).get("text_config", config_class)
    plan = getattr(text, "base_model_ep_plan", None) or {}
    return "ep_dispatch_experts" in plan.values()


def save_tiny(family: str, folder: Path) -> Any:
    """The tiny model, saved."""
    model = tiny_model(family)
    model.save_pretrained(folder)
    return model


def tiny_model(family: str) -> Any:
    """The single-process model, with weights large enough that routing and every expert matter."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = tiny_config(family)
    auto: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name or "sinks" in name:
                parameter.normal_(std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model
