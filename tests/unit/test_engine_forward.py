"""Which way a family is driven is asked of the model: what it gives in parts must be what it gives at once."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_runtime.dispatch.plan import DispatchPlan
from moe_runtime.dispatch.step import StepContext
from moe_runtime.engine.forward import RowForward, choose_forward
from moe_runtime.experts.families import UnsupportedModel

VOCAB = 16


class Recurrent:
    """A family whose logits are the running sum of what it has read: its state is a number, no keys, no values."""

    def __init__(self, *, loses_state_over: int = 99) -> None:
        self._loses_state_over = loses_state_over
        layer = SimpleNamespace(sliding_window=None)
        self.config = SimpleNamespace(
            model_type="recurrent", vocab_size=VOCAB, layer_types=["linear_attention"], per_layer_config=[layer]
        )
        self.config.get_text_config = lambda **_: self.config

    def __call__(self, *, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> SimpleNamespace:
        forgets = input_ids.shape[1] > self._loses_state_over
        start = torch.zeros(VOCAB) if past_key_values is None or forgets else past_key_values
        logits = start + torch.nn.functional.one_hot(input_ids[0], VOCAB).cumsum(0)
        return SimpleNamespace(logits=logits.unsqueeze(0), past_key_values=logits[-1])


def context() -> StepContext:
    return StepContext(plan=DispatchPlan((0,), 0, 1, ()), group=None, num_experts=1)


@pytest.mark.parametrize(("loses_state_over", "in_parts"), [(99, True), (1, False)])
def test_a_state_that_parts_would_lose_is_read_token_by_token(loses_state_over: int, in_parts: bool) -> None:
    way = choose_forward(Recurrent(loses_state_over=loses_state_over), context(), "cpu")
    assert isinstance(way, RowForward)
    assert way._in_parts is in_parts


def test_a_family_whose_cached_steps_are_wrong_in_every_way_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="token by token is not what it gives at once") as refusal:
        choose_forward(Recurrent(loses_state_over=0), context(), "cpu")
    assert refusal.value.family == "recurrent"


def test_experts_take_part_again_once_the_model_was_asked() -> None:
    asked = context()
    choose_forward(Recurrent(), asked, "cpu")
    assert asked.experts_off is False
