"""A checkpoint small enough for any test: a random Qwen3-MoE of bytes.

Its weights are large, so that logits lie wide enough apart for rounding never to change the greedy choice.
"""

import json
from pathlib import Path

NUM_EXPERTS, NUM_LAYERS = 12, 2
"""Twelve experts fall evenly to 1, 2, 3 and 4 ranks."""


def write_checkpoint(folder: Path) -> Path:
    """Write it into `folder`, which is made if need be; readable by everybody."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(7)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    (folder / "moerator.json").write_text(json.dumps({"tokenizer": "bytes"}))
    for file in folder.iterdir():  # safetensors writes for its owner only, and a pod is somebody else
        file.chmod(0o644)
    return folder
