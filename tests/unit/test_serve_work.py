"""What serving makes of a step's logits, without a model."""

import asyncio

import torch

from moe_runtime.engine.cache import StepCache
from moe_runtime.engine.scheduler import GenerationRequest
from moe_runtime.rank.desk import Desk, Poll
from moe_runtime.rank.serve import ServeWork
from serving_config import serving_config


def test_an_answer_whose_logits_are_no_numbers_ends_with_the_place_and_spares_the_others() -> None:
    async def served() -> dict[str, Poll]:
        desk = Desk(asyncio.get_running_loop())
        desk.open()
        config = serving_config()
        assert config.serving is not None
        more = config.serving.model_copy(update={"max_sequences": 2})
        work = ServeWork(config.model_copy(update={"serving": more}), rank=0, desk=desk)
        cache = StepCache(num_rows=2, max_length=64)
        work._parts = lambda: (None, cache)  # type: ignore[assignment,method-assign,return-value]
        for name in ("sound", "broken"):
            desk.submit(GenerationRequest(name, prompt=(1, 2, 3), max_tokens=1))
        assert work.prepare() == 6
        logits_of = {"sound": torch.tensor([0.0, 2.0]), "broken": torch.tensor([0.0, float("nan")])}
        logits_BV = torch.stack([logits_of[chunk.request_id] for chunk in work._chunks])
        work._publish(work._chunks, logits_BV, [False, False], (), cache)
        return {name: await desk.poll(name, have=0, wait_s=1.0) for name in logits_of}

    answers = asyncio.run(served())
    assert (answers["sound"].tokens, answers["sound"].end) == ((1,), "length")
    assert (answers["broken"].tokens, answers["broken"].end) == ((), "refused")
    assert answers["broken"].message == "the model gives no token: the highest logit at position 3 is nan"
