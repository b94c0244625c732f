"""What Prometheus reads of coordinator and gateways: parsed as it parses them."""

from prometheus_client.parser import text_string_to_metric_families

from moe_core.contract.exchange import RankPhase, TrainingProgress
from moe_core.contract.membership import Member
from moe_core.contract.step_time import StepTime
from moe_runtime.coordinator.book import Book
from moe_runtime.metrics import CoordinatorMetrics, GatewayMetrics, RankCounts
from moe_runtime.registration import GatewayReport, RankReport


def rank(uid: str, tokens: int, phase: RankPhase = "Active") -> RankReport:
    return RankReport(member=Member(rank=1, pod_uid=uid, address="h:1"), phase=phase, tokens=tokens)


def scrape(book: Book, *, with_experts: bool = False) -> dict[tuple[str, str], float]:
    text = (
        CoordinatorMetrics()
        .render(book.state(), None, counts=book.counts.of_ranks(), with_experts=with_experts)
        .decode()
    )
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(s.name, ",".join(f"{k}={v}" for k, v in sorted(s.labels.items()))): s.value for s in samples}
    assert len(found) == len(samples), "Prometheus refuses a scrape that holds one series twice"
    return found


def test_two_pods_of_one_rank_are_one_series_that_never_falls() -> None:
    now = [0.0]
    book = Book(lambda: now[0], is_serving=True)
    book.note_rank(rank("old", 70))
    book.note_rank(rank("new", 5, phase="Loading"))
    assert scrape(book)["moe_rank_tokens_total", "rank=1"] == 75
    for _ in range(8):
        now[0] += 1.0
        book.tick()
        book.note_rank(rank("new", 6))
    assert [r.pod_uid for r in book.state().ranks] == ["new"]
    assert scrape(book)["moe_rank_tokens_total", "rank=1"] == 76


def test_a_gateway_that_was_started_again_in_its_pod_keeps_what_it_had_counted() -> None:
    book = Book(lambda: 0.0, is_serving=True)
    for ok, failed in ((5, 1), (8, 1), (2, 0)):
        book.note_gateway(GatewayReport(pod_uid="g", requests_ok=ok, requests_failed=failed))
    serving = book.state().serving
    assert serving is not None
    assert (serving.requests_ok, serving.requests_failed) == (10, 1)


def test_what_routers_lose_and_drop_in_training_is_scraped_by_name() -> None:
    book = Book(lambda: 0.0, is_serving=False)
    told = TrainingProgress(step=3, router_losses={"aux": 0.25}, router_counts={"dropped": 7})
    book.note_rank(rank("a", 5).model_copy(update={"training": told}))
    scraped = scrape(book)
    assert scraped["moe_router_loss", "loss=aux"] == 0.25
    assert scraped["moe_router_picks_total", "outcome=dropped"] == 7


def test_no_name_has_two_sources() -> None:
    def names(text: bytes) -> set[str]:
        return {family.name for family in text_string_to_metric_families(text.decode())}

    book = Book(lambda: 0.0, is_serving=True)
    coordinator = CoordinatorMetrics().render(book.state(), None, counts=RankCounts({0: 1}))
    assert names(coordinator) & names(GatewayMetrics().render()) == set()
    assert "moe_requests" in names(GatewayMetrics().render())


def test_what_a_dead_rank_has_counted_stays_counted() -> None:
    now = [0.0]
    book = Book(lambda: now[0], is_serving=True)
    sent = {"self": 10, "network": 300}
    old = rank("old", 1).model_copy(update={"dispatch_bytes": sent, "moved_bytes": 64, "load": ((4, 0), (1, 3))})
    book.note_rank(old)
    for _ in range(8):
        now[0] += 1.0
        book.tick()
        book.note_rank(rank("new", 1).model_copy(update={"dispatch_bytes": {"network": 5}, "load": ((1, 1), (1, 1))}))
    found = scrape(book, with_experts=True)
    assert found["moe_dispatch_bytes_total", "scope=network"] == 305
    assert found["moe_dispatch_bytes_total", "scope=self"] == 10
    assert found["moe_rebalance_moved_bytes_total", ""] == 64
    assert found["moe_expert_tokens_total", "expert=1,layer=1"] == 4
    assert found["moe_digest_mismatches_total", ""] == 0


def test_series_of_single_experts_are_for_who_asks() -> None:
    book = Book(lambda: 0.0, is_serving=True)
    book.note_rank(rank("p", 1).model_copy(update={"load": ((4, 0),)}))
    assert not any(name == "moe_expert_tokens_total" for name, _ in scrape(book))


def test_what_fewer_bits_lose_is_one_figure_for_each_leg_whatever_the_number_of_ranks() -> None:
    book = Book(lambda: 0.0, is_serving=False)
    for uid, error in (("a", 0.03), ("b", 0.04)):
        book.note_rank(rank(uid, 1).model_copy(update={"wire_error": {"dispatch": error}}))
    found = scrape(book)
    assert found["moe_dispatch_wire_error", "leg=dispatch"] == 0.0354
    assert [name for name, _ in found].count("moe_dispatch_wire_error") == 1


def test_time_of_steps_is_told_by_part_and_by_the_rank_that_was_waited_for() -> None:
    book = Book(lambda: 0.0, is_serving=False)
    for uid, waited in (("a", {1: 3_000_000}), ("b", {})):
        time = StepTime(steps=2, compute_us=5_000_000, exchange_us=1_000_000, waited_us=waited)
        book.note_rank(rank(uid, 1).model_copy(update={"step_time": time, "recent_step_time": time}))
    found = scrape(book)
    assert {part: found["moe_step_seconds_total", f"part={part}"] for part in ("compute", "exchange", "wait")} == {
        "compute": 10,
        "exchange": 2,
        "wait": 3,
    }
    assert found["moe_waited_seconds_total", "rank=1"] == 3
    told = book.state().step_time
    assert told is not None
    assert told.most_waited_for == 1
