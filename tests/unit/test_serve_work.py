"""What serving makes of a step's logits, without a model."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moe_core.outcome import InvalidInput
from moe_runtime.engine.cache import StepCache
from moe_runtime.engine.scheduler import GenerationRequest
from moe_runtime.errors import GroupFault
from moe_runtime.rank.desk import Desk, Poll
from moe_runtime.rank.serve import ServeWork
from serving_config import serving_config


class Model:
    """What a step asks of a model; its router knows nothing of these tokens."""

    def forward_tokens(self, *_: Any, **__: Any) -> torch.Tensor:
        raise InvalidInput("class_path mine:Mine: KeyError: 7")


@dataclass
class Lab:
    """A rank's serving with two requests of three tokens each, planned."""

    work: ServeWork
    cache: StepCache
    desk: Desk

    @classmethod
    def make(cls) -> "Lab":
        desk = Desk(asyncio.get_running_loop())
        desk.open()
        config = serving_config()
        assert config.serving is not None
        two = config.serving.model_copy(update={"max_sequences": 2})
        work, cache = (
            ServeWork(config.model_copy(update={"serving": two}), rank=0, desk=desk),
            StepCache(num_rows=2, max_length=64),
        )
        work._parts = lambda: (Model(), cache)  # type: ignore[method-assign,return-value,assignment]
        for name in NAMES:
            desk.submit(GenerationRequest(name, prompt=(1, 2, 3), max_tokens=1))
        assert work.prepare() == 6
        return cls(work, cache, desk)

    async def answers(self) -> dict[str, Poll]:
        return {name: await self.desk.poll(name, have=0, wait_s=1.0) for name in NAMES}


NAMES = ("sound", "broken")


def test_an_answer_whose_logits_are_no_numbers_ends_with_the_place_and_spares_the_others() -> None:
    async def served() -> dict[str, Poll]:
        lab = Lab.make()
        logits_of = {"sound": torch.tensor([0.0, 2.0]), "broken": torch.tensor([0.0, float("nan")])}
        chunks = lab.work._chunks
        logits_BV = torch.stack([logits_of[chunk.request_id] for chunk in chunks])
        lab.work._publish(chunks, logits_BV, [False, False], (), lab.cache)
        return await lab.answers()

    answers = asyncio.run(served())
    assert (answers["sound"].tokens, answers["sound"].end) == ((1,), "length")
    assert (answers["broken"].tokens, answers["broken"].end) == ((), "refused")
    assert answers["broken"].message == "the model gives no token: the highest logit at position 3 is nan"


def test_what_a_router_cannot_route_is_refused_and_the_step_is_made_again_without_it() -> None:
    async def served() -> tuple[dict[str, Poll], int]:
        lab = Lab.make()
        with pytest.raises(GroupFault, match="refused 2 requests: class_path mine:Mine: KeyError: 7"):
            lab.work.run([6, 0])
        return await lab.answers(), lab.work.prepare()

    answers, left = asyncio.run(served())
    assert {(a.end, a.message) for a in answers.values()} == {("refused", "class_path mine:Mine: KeyError: 7")}
    assert left == 0
