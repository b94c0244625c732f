"""Continuous batching: what runs in a step, what a failed step leaves, what a committed one moves."""

import pytest

from moe_runtime.engine.scheduler import GenerationRequest, Overloaded, Scheduler, TooLong


def request(name: str, prompt: int = 3, max_tokens: int = 4, stops: tuple[int, ...] = ()) -> GenerationRequest:
    return GenerationRequest(name, tuple(range(1, prompt + 1)), max_tokens, stop_token_ids=frozenset(stops))


def step(scheduler: Scheduler, token: int = 9) -> list[tuple[str, int | None, str | None]]:
    chunks = scheduler.plan()
    progress, _ = scheduler.commit(chunks, [token if c.samples else None for c in chunks])
    return [(p.request_id, p.token_id, p.finish_reason) for p in progress]


def test_a_long_prompt_is_read_in_chunks_and_samples_only_at_its_end() -> None:
    scheduler = Scheduler(max_sequences=1, max_context=64, max_chunk=4)
    scheduler.submit(request("a", prompt=10))
    seen = []
    for _ in range(3):
        (chunk,) = scheduler.plan()
        seen.append((chunk.first_position, len(chunk.token_ids), chunk.samples))
        scheduler.commit((chunk,), [9 if chunk.samples else None])
    assert seen == [(0, 4, False), (4, 4, False), (8, 2, True)]


def test_planning_again_after_a_rollback_gives_the_same_step() -> None:
    scheduler = Scheduler(max_sequences=2, max_context=64)
    scheduler.submit(request("a"))
    step(scheduler)
    scheduler.submit(request("b", prompt=5))
    assert scheduler.plan() == scheduler.plan()


def test_decoding_sequences_are_not_starved_by_a_long_prompt() -> None:
    scheduler = Scheduler(max_sequences=3, max_context=400, max_chunk=64, max_step_tokens=65)
    scheduler.submit(request("long", prompt=300))
    scheduler.submit(request("short", prompt=1, max_tokens=9))
    step(scheduler)
    sizes = {c.request_id: len(c.token_ids) for c in scheduler.plan()}
    assert sizes == {"long": 64, "short": 1}


def test_a_sequence_ends_by_length_and_frees_its_row_for_the_next() -> None:
    scheduler = Scheduler(max_sequences=1, max_context=64)
    scheduler.submit(request("a", max_tokens=2))
    scheduler.submit(request("b", max_tokens=1))
    assert [step(scheduler) for _ in range(3)] == [
        [("a", 9, None)],
        [("a", 9, "length")],
        [("b", 9, "length")],
    ]
    assert not scheduler.has_work


def test_a_stop_token_ends_the_sequence_and_is_not_shown() -> None:
    scheduler = Scheduler(max_sequences=1, max_context=64)
    scheduler.submit(request("a", stops=(9,)))
    assert step(scheduler) == [("a", None, "stop")]


def test_a_full_queue_says_so_instead_of_growing() -> None:
    scheduler = Scheduler(max_sequences=1, max_context=64, max_queue=1)
    scheduler.submit(request("a"))
    scheduler.plan()
    scheduler.submit(request("b"))
    with pytest.raises(Overloaded, match="1 sequences run and 1 wait"):
        scheduler.submit(request("c"))


@pytest.mark.parametrize(("prompt", "max_tokens"), [(60, 5), (0, 1)])
def test_a_request_that_cannot_fit_is_refused(prompt: int, max_tokens: int) -> None:
    with pytest.raises(TooLong):
        Scheduler(max_sequences=1, max_context=64).submit(request("a", prompt, max_tokens))


def test_cancelling_frees_the_row_and_a_step_under_way_forgets_the_sequence() -> None:
    scheduler = Scheduler(max_sequences=1, max_context=64)
    scheduler.submit(request("a"))
    chunks = scheduler.plan()
    assert scheduler.cancel("a") == 0
    assert scheduler.commit(chunks, [9]) == ([], [])
    assert scheduler.cancel("a") is None


def test_more_sequences_than_a_step_holds_all_get_their_turn() -> None:
    scheduler = Scheduler(max_sequences=300, max_context=100)
    for i in range(300):
        scheduler.submit(GenerationRequest(f"r{i}", (1,), max_tokens=90))
    stepped: dict[str, int] = {}
    for _ in range(12):
        chunks = scheduler.plan()
        assert sum(len(chunk.token_ids) for chunk in chunks) <= scheduler.max_step_tokens
        for chunk in chunks:
            stepped[chunk.request_id] = stepped.get(chunk.request_id, 0) + 1
        scheduler.commit(chunks, [7] * len(chunks))
    assert len(stepped) == 300
    assert max(stepped.values()) - min(stepped.values()) <= 1


def test_a_prompt_is_read_though_more_sequences_decode_than_a_step_holds() -> None:
    scheduler = Scheduler(max_sequences=300, max_context=300)
    for i in range(299):
        scheduler.submit(GenerationRequest(f"r{i}", (1,), max_tokens=290))
    scheduler.commit(chunks := scheduler.plan(), [7] * len(chunks))
    scheduler.submit(GenerationRequest("long", (1,) * 128, max_tokens=10))
    read = 0
    for _ in range(4):
        chunks = scheduler.plan()
        read += sum(len(chunk.token_ids) for chunk in chunks if chunk.request_id == "long")
        scheduler.commit(chunks, [7 if chunk.samples else None for chunk in chunks])
    assert read >= 128
