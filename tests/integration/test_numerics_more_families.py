"""Families that nothing in the runtime names: slots, cache and masks equal transformers' own generate all the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.families import read_facts

pytestmark = pytest.mark.integration

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "moe_k": 2,
    "n_shared_experts": 1,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 128,
    "n_group": 2,
    "topk_group": 1,
    "sliding_window": 6,
    "first_k_dense_replace": 1,
}
"""Each family takes the numbers that its config knows."""
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
FAMILIES = (
    "qwen2_moe",
    "granitemoe",
    "phimoe",
    "glm4_moe",
    "minimax_m2",
    "flex_olmo",
    "ernie4_5_moe",
    "exaone_moe",
    "cohere2_moe",
    "mimo_v2_flash",
)


def save_tiny(family: str, folder: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    default = CONFIG_MAPPING[family]()
    known = {name: value for name, value in SIZES.items() if getattr(default, name, None) is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**known, **SPECIAL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_nothing_names_decodes_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    source = ModelSource(path=str(tmp_path))
    facts = read_facts(source)
    emap = ExpertMap(
        generation=0,
        num_logical_experts=facts.num_experts,
        slots_of_rank=(facts.num_experts + 1,),
        logical_of_slot=((*reversed(range(facts.num_experts)), 0),) * facts.num_layers,
    )
    epm = ExpertParallelModel.load(source, expert_map=emap, rank=0)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )

    cache = epm.new_cache(num_rows=3, max_length=20)
    for step, expected in enumerate(generated.logits):
        first = 12 + step - 1 if step else 0
        inputs = generated.sequences[:, first : 12 + step]
        positions = torch.arange(first, 12 + step).repeat(2, 1)
        logits = epm.forward_tokens(inputs, positions, (2, 0), cache)
        epm.commit()
        assert float((logits - expected).abs().max()) <= 1e-4
    assert cache.lengths == [15, 0, 15]
