"""Every MoE family of the installed transformers: slots, caches and masks equal its own single process, or it is
refused with the reason below. Families are enumerated, not listed, so that a new transformers shows what it brings.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.families import NEEDS_CHECKPOINT, SERVED, why_refused
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_core.facts import ModelFact
from moe_operator.cluster.local_model import _shape
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.families import UnsupportedModel, build_meta_model, facts_of, find_experts, read_facts
from numerics_families import REFUSED, equal_families, save_tiny, tiny_config

pytestmark = pytest.mark.integration

TOLERANCE = 1e-4
PROMPTS = [torch.randint(0, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 7)]
NEW_TOKENS = 4
SHAPE = ModelShape(
    family="",
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    vocab_size=64,
    max_position_embeddings=64,
)


def loaded(folder: Path) -> ExpertParallelModel:
    """All experts on one rank, in reverse, the first in two copies."""
    source = ModelSource(path=str(folder))
    facts = read_facts(source)
    emap = ExpertMap(
        generation=0,
        num_logical_experts=facts.num_experts,
        slots_of_rank=(facts.num_experts + 1,),
        logical_of_slot=((*reversed(range(facts.num_experts)), 0),) * facts.num_layers,
    )
    return ExpertParallelModel.load(source, expert_map=emap, rank=0)


@pytest.mark.parametrize("family", equal_families())
def test_a_family_equals_its_single_process_in_logits_gradients_and_cached_steps(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    epm = loaded(tmp_path)
    batch = torch.stack([PROMPTS[0][:7], PROMPTS[1]])
    theirs, ours = model(input_ids=batch).logits, epm.module(input_ids=batch).logits
    assert float((ours - theirs).detach().abs().max()) <= TOLERANCE
    probe = torch.linspace(-1, 1, theirs.numel()).view(theirs.shape)
    (theirs * probe).sum().backward()
    (ours * probe).sum().backward()
    epm.commit()
    assert_gradients_equal(epm, dict(model.named_parameters()))

    expected = [generated(model, prompt) for prompt in PROMPTS]
    for row, steps in enumerate(stepwise(epm, [tokens for tokens, _ in expected])):
        for ours_V, theirs_V in zip(steps, expected[row][1], strict=True):
            assert float((ours_V - theirs_V).abs().max()) <= TOLERANCE


def assert_gradients_equal(epm: ExpertParallelModel, parameters: dict[str, torch.nn.Parameter]) -> None:
    for name, parameter in epm.dense_parameters():
        assert gradient_error(parameter.grad, parameters[name].grad) <= TOLERANCE, name
    for entry in epm.expert_parameters():
        whole = torch.zeros_like(parameters[entry.name])
        if entry.parameter.grad is not None:
            whole.index_add_(0, torch.tensor(entry.logical_of_slot), entry.parameter.grad)
        assert gradient_error(whole, parameters[entry.name].grad) <= TOLERANCE, entry.name


def gradient_error(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """Largest difference, relative where gradients are large; None is zero (towers that text does not reach)."""
    if theirs is None:
        return 0.0 if ours is None else float(ours.abs().max())
    ours = torch.zeros_like(theirs) if ours is None else ours
    return float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))


def generated(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """transformers' own tokens (prompt and continuation) and logits of each new one."""
    output = model.generate(
        prompt.unsqueeze(0),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0], [step[0] for step in output.logits]


def stepwise(epm: ExpertParallelModel, tokens: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Logits after each prompt and each new token. The first prompt is read in two parts, the second beside its second
    part; every step is first run with wrong tokens and rolled back.
    """
    cache = epm.new_cache(num_rows=3, max_length=20)
    ends = [len(prompt) for prompt in PROMPTS]
    spans = [[(0, 5), (0, 0)], [(5, ends[0]), (0, ends[1])]]
    spans += [[(end + step, end + step + 1) for end in ends] for step in range(NEW_TOKENS - 1)]
    logits: list[list[torch.Tensor]] = [[], []]
    for number, span in enumerate(spans):
        taking = [row for row in range(2) if span[row][1]]
        width = max(end - first for first, end in span)
        ids, positions = torch.zeros(len(taking), width, dtype=torch.long), torch.full((len(taking), width), -1)
        for i, row in enumerate(taking):
            first, end = span[row]
            ids[i, : end - first], positions[i, : end - first] = tokens[row][first:end], torch.arange(first, end)
        rows = [(2, 0)[row] for row in taking]
        epm.forward_tokens((ids + 1) % 60, positions, rows, cache)
        epm.rollback()
        output = epm.forward_tokens(ids, positions, rows, cache)
        epm.commit()
        if number:
            for i, row in enumerate(taking):
                logits[row].append(output[i])
    assert cache.lengths == [ends[1] + NEW_TOKENS - 1, 0, ends[0] + NEW_TOKENS - 1]
    return logits


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_run_is_refused_from_its_config_alone(family: str) -> None:
    with pytest.raises(UnsupportedModel, match=REFUSED[family]) as refusal:
        build_meta_model(tiny_config(family))
    assert refusal.value.family == family


def test_the_operator_knows_without_transformers_which_families_run_and_how_many_layers_have_experts() -> None:
    """What it refuses, it refuses before a pod is made; what it plans, the ranks can load."""
    assert set(equal_families()) == SERVED
    for family in equal_families():
        model: Any = build_meta_model(tiny_config(family))
        facts = facts_of(model.config, find_experts(model))
        config = model.config.to_dict()
        assert _shape(config.get("text_config", config), family) == ModelFact(
            facts.num_experts, facts.num_layers, family
        )
    for family in REFUSED:
        assert why_refused(family), family


def test_sixty_families_or_more_are_held_equal() -> None:
    assert len(equal_families()) >= 60


@pytest.mark.parametrize("family", sorted(SERVED - NEEDS_CHECKPOINT - {"zaya"}))
def test_a_shape_suffices_for_every_family_whose_jobs_are_accepted(family: str) -> None:
    facts = read_facts(ModelSource(shape=SHAPE.model_copy(update={"family": family})))
    assert (facts.num_layers, facts.num_experts, facts.top_k, facts.vocab_size) == (4, 8, 2, 64)


def test_a_shape_suffices_for_no_family_whose_jobs_are_refused() -> None:
    for family in NEEDS_CHECKPOINT:
        with pytest.raises(UnsupportedModel):
            read_facts(ModelSource(shape=SHAPE.model_copy(update={"family": family})))


def test_a_prompt_is_read_token_by_token_where_parts_would_lose_the_state(tmp_path: Path) -> None:
    """jamba's recurrence starts anew with every part of several tokens; the model is asked, not its name."""
    save_tiny("jamba", tmp_path)
    epm = loaded(tmp_path)
    reads: list[int] = []
    cache = epm.new_cache(num_rows=1, max_length=20)
    epm.module.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for first, end in ((0, 6), (6, 10)):
        epm.forward_tokens(PROMPTS[0][None, first:end], torch.arange(first, end)[None], (0,), cache)
        epm.commit()
    assert reads == [6, 1, 1, 1, 1]
    assert cache.lengths == [10]
