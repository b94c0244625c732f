"""A service of packed experts: what it answers and says, that it heals, that it refuses what is damaged."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from integration.serving_pods import Pods, spread_map, until
from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_core.contract.packing import Packing
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.convert.quantise import quantise
from packed_reference import put_back
from tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(280)]
NUM_RANKS, NUM_TOKENS = 2, 60
PACKING = Packing.of("Int4", 8)
PROMPT = "four bits a number"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint in full and packed."""
    folder = tmp_path_factory.mktemp("packed")
    full = write_checkpoint(folder / "full")
    quantise(full, folder / "packed", PACKING)
    return full, folder / "packed"


def greedy(folders: tuple[Path, Path]) -> str:
    """One process of transformers alone, on the same numbers in full."""
    from transformers import AutoModelForCausalLM

    model: Any = put_back(AutoModelForCausalLM.from_pretrained(folders[0], local_files_only=True).eval(), folders[1])
    ids = torch.tensor([list(PROMPT.encode())])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False)
    return bytes(output[0, ids.shape[1] :].tolist()).decode(errors="replace")


def wish() -> RuntimeWish:
    return RuntimeWish(generation=1, ranks=tuple(range(NUM_RANKS)), expert_map=spread_map(NUM_RANKS))


def is_whole(state: RuntimeState) -> bool:
    return state.wish_generation == 1 and state.coverage is not None and state.coverage.is_full


def test_packed_experts_serve_and_heal_as_the_same_numbers_in_full_would_answer(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    expected = greedy(folders)
    with Pods(tmp_path / "run", num_ranks=NUM_RANKS, source=ModelSource(path=str(folders[1]))) as pods:
        pods.start_all()
        pods.put_wish(wish())
        state = pods.wait_state("all ranks are active", is_whole, within_s=180)
        assert state.expert_packing == "Int4 in groups of 8"
        # gate and up [32, 32], down [32, 16]: half a byte a number, two bytes a group
        assert state.expert_bytes == (32 * 32 + 32 * 16) // 2 + 2 * (32 * 32 + 32 * 16) // 8
        until("the gateway has ranks", pods.healthy, within_s=20)

        chunks = pods.stream(PROMPT, max_tokens=NUM_TOKENS)
        text = "".join(next(chunks)["choices"][0]["text"] for _ in range(5))
        os.kill(pods.pods["rank-1"].rank_pid, signal.SIGKILL)
        text += "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == expected

        pods.start("rank", "rank-1-again", rank=1)
        pods.wait_state("the rank is back", lambda s: is_whole(s) and len(s.member_uids) == NUM_RANKS, within_s=180)
        assert pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"] == expected
        metrics = pods.call("GET", "/metrics", token="none")[1].decode()
        assert "moe_digest_mismatches_total 0.0" in metrics


def test_a_damaged_expert_ends_the_service_with_its_file_and_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    quantise(folders[0], damaged, PACKING)
    file = damaged / "packed-experts-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with Pods(tmp_path / "run", num_ranks=NUM_RANKS, source=ModelSource(path=str(damaged))) as pods:
        pods.start_all(gateways=0)
        pods.put_wish(wish())
        state = pods.wait_state("the failure is told", lambda s: bool(s.failure), within_s=120)
    assert f"{file.name}: expert 11 of model.layers.1.mlp.experts is not what was written" in state.failure
