"""The demo's closing table, and the same as JSON."""

import json
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from moe_core.contract.exchange import Recovery, RuntimeState, TrainingProgress
from moe_operator.load_generator import Tally


@dataclass(frozen=True, slots=True)
class Loss:
    """What the death of one rank takes: per layer, experts with a copy elsewhere and experts without."""

    copied: tuple[tuple[int, int], ...]
    uncopied: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Quality:
    """Held-out bits per byte on the same bytes: whole, with the generalist for the lost experts, with them dropped."""

    full: float
    generalist: float | None
    drop: float | None
    order2: float

    @classmethod
    def parse(cls, text: str) -> Self:
        said = json.loads(text)
        return cls(said["full"], said["generalist"], said["drop"], said["order2"])

    @property
    def generalist_is_better(self) -> bool:
        return self.generalist is not None and self.drop is not None and self.generalist < self.drop


@dataclass(slots=True)
class Figures:
    """Everything that was measured. Times in seconds, memory in bytes."""

    parts_s: dict[str, float] = field(default_factory=dict)
    training: TrainingProgress | None = None
    training_tokens_per_s: float = 0.0
    calm_tokens_per_s: float = 0.0
    healed_tokens_per_s: float = 0.0
    tally: Tally | None = None
    drill: Mapping[str, Any] = field(default_factory=dict)
    recoveries: tuple[Recovery, ...] = ()
    requests_continued: int = 0
    degraded_tokens: Mapping[str, int] = field(default_factory=dict)
    covered: bool = False
    rank_memory_bytes: tuple[int, ...] = ()
    loss: Loss | None = None
    quality: Quality | None = None

    def note_training(self, training: TrainingProgress) -> None:
        self.training = training
        if not training.done and training.tokens_per_s:
            self.training_tokens_per_s = training.tokens_per_s

    def note_drill(self, thing: Mapping[str, Any]) -> None:
        self.drill = {name: value for name, value in thing["status"].items() if name not in ("conditions", "memory")}

    def note_service(self, thing: Mapping[str, Any], state: RuntimeState | None) -> None:
        conditions = {c["type"]: c["status"] for c in thing["status"]["conditions"]}
        self.covered = conditions.get("ExpertCoverage") == "True" and conditions.get("Ready") == "True"
        if state is not None:
            self.recoveries = state.recoveries
            self.rank_memory_bytes = tuple(rank.memory_bytes for rank in state.ranks)
            if state.serving is not None:
                self.requests_continued = state.serving.requests_replayed
                self.degraded_tokens = dict(state.serving.degraded_tokens)

    def note_load(self, tally: Tally) -> None:
        self.tally = tally

    @property
    def kept_its_promise(self) -> bool:
        return not self.broken_promises()

    def broken_promises(self) -> list[str]:
        """In words; empty when the demo may end with 0."""
        broken = []
        if self.tally is None or self.tally.ok == 0:
            broken.append("no request was answered")
        elif self.tally.failed:
            broken.append(f"{self.tally.failed} requests failed: {dict(self.tally.failures)}")
        if not self.covered:
            broken.append("not every expert has a live copy again")
        if self.drill.get("verdict") != "Passed":
            broken.append(f"the drill did not pass: {self.drill.get('message', 'it never ended')}")
        if self.quality is None or not self.quality.generalist_is_better:
            broken.append("the generalist did not beat dropping")
        training = self.training
        if training is None or training.heldout_bits_per_byte is None or training.order2_bits_per_byte is None:
            broken.append("the training reported no held-out figures")
        elif training.heldout_bits_per_byte >= training.order2_bits_per_byte:
            broken.append("the model is no better than an order-2 byte model")
        return broken

    def as_json(self) -> dict[str, Any]:
        tally = self.tally or Tally()
        recovery = next((r for r in self.recoveries if r.lost_ranks), None)
        return {
            "kept_its_promise": self.kept_its_promise,
            "broken_promises": self.broken_promises(),
            "seconds": {name: round(value, 2) for name, value in self.parts_s.items()},
            "training": {
                **(self.training.model_dump(mode="json") if self.training else {}),
                "tokens_per_s": round(self.training_tokens_per_s, 1),
            },
            "serving": {
                "requests_sent": tally.sent,
                "requests_ok": tally.ok,
                "requests_failed": tally.failed,
                "requests_streamed": tally.streamed,
                "requests_continued_on_another_rank": self.requests_continued,
                "failures": dict(tally.failures),
                "tokens": tally.tokens,
                "tokens_per_s_before": round(self.calm_tokens_per_s, 1),
                "tokens_per_s_after": round(self.healed_tokens_per_s, 1),
                "latency_s_median": round(statistics.median(tally.latencies_s), 3) if tally.latencies_s else None,
                "latency_s_max": round(max(tally.latencies_s), 3) if tally.latencies_s else None,
                "longest_silence_of_a_stream_s": round(tally.longest_silence_s, 3),
                "degraded_tokens": dict(self.degraded_tokens),
                "rank_memory_bytes": list(self.rank_memory_bytes),
            },
            "failure": {
                **self.drill,
                "experts_with_a_copy": len(self.loss.copied) if self.loss else None,
                "experts_without": len(self.loss.uncopied) if self.loss else None,
                "recovery_ms": _split_ms(recovery),
            },
            "heldout_bits_per_byte": {
                "full": self.quality.full,
                "generalist": self.quality.generalist,
                "dropped": self.quality.drop,
                "order2": self.quality.order2,
            }
            if self.quality
            else None,
            "machine": {"cpus": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        }


def _split_ms(recovery: Recovery | None) -> dict[str, float] | None:
    """Detection to agreement, agreement to rebuilt groups, rebuilt to the first step."""
    if recovery is None:
        return None
    return {
        "agree": round(1000 * (recovery.agreed_at - recovery.detected_at), 1),
        "rebuild": round(1000 * (recovery.rebuilt_at - recovery.agreed_at), 1),
        "step": round(1000 * (recovery.resumed_at - recovery.rebuilt_at), 1),
    }


def write_json(figures: Figures, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures.as_json(), indent=2) + "\n")


def print_table(figures: Figures, console: Console) -> None:
    table = Table(title="moerator demo", show_header=False, title_justify="left", padding=(0, 2))
    for section in _rows(figures):
        for name, value in section:
            table.add_row(name, value)
        table.add_section()
    console.print(table)
    for broken in figures.broken_promises():
        console.print(f"[red]✘ {broken}[/red]", highlight=False)
    if figures.kept_its_promise:
        console.print("[green]✔ no request failed, every expert has a live copy again, the generalist beat dropping")


def _rows(figures: Figures) -> list[list[tuple[str, str]]]:
    tally = figures.tally or Tally()
    said = figures.as_json()
    rows: list[list[tuple[str, str]]] = []
    if training := figures.training:
        rows.append(
            [
                ("training steps", f"{training.step} in {training.seconds:.0f} s"),
                ("training tokens/s", f"{figures.training_tokens_per_s:,.0f}"),
                ("training loss", _number(training.loss)),
                ("held-out bits per byte", _number(training.heldout_bits_per_byte)),
                ("  of an order-2 byte model", _number(training.order2_bits_per_byte)),
            ]
        )
    serving = said["serving"]
    rows.append(
        [
            ("requests sent / failed", f"{tally.sent} / {tally.failed} ({tally.streamed} streaming)"),
            ("  continued on another rank", str(figures.requests_continued)),
            (
                "tokens/s before / after the fault",
                f"{figures.calm_tokens_per_s:.0f} / {figures.healed_tokens_per_s:.0f}",
            ),
            ("latency, median / longest", f"{serving['latency_s_median']} s / {serving['latency_s_max']} s"),
            ("longest silence of a stream", f"{tally.longest_silence_s:.2f} s"),
            ("tokens degraded (routed picks)", _counts(figures.degraded_tokens)),
        ]
    )
    if loss := figures.loss:
        split = said["failure"]["recovery_ms"]
        parts = ", ".join(f"{name} {value:.0f} ms" for name, value in split.items()) if split else "not seen"
        rows.append(
            [
                ("experts the rank held", f"{len(loss.copied)} with a copy elsewhere, {len(loss.uncopied)} without"),
                ("time to detect", _seconds(figures.drill.get("detectedSeconds"))),
                ("time to degraded but serving", f"{_seconds(figures.drill.get('degradedSeconds'))} ({parts})"),
                ("time to restored", _seconds(figures.drill.get("restoredSeconds"))),
            ]
        )
    if quality := figures.quality:
        rows.append(
            [
                ("held-out bits per byte, full model", f"{quality.full:.4f}"),
                ("  generalist for the lost experts", _number(quality.generalist, digits=4)),
                ("  their tokens dropped", _number(quality.drop, digits=4)),
            ]
        )
    memory = figures.rank_memory_bytes
    rows.append(
        [
            ("memory per rank", f"{max(memory) / 2**20:.0f} MiB at most" if any(memory) else "not reported"),
            ("wall time", ", ".join(f"{name} {value:.0f} s" for name, value in figures.parts_s.items())),
        ]
    )
    return rows


def _counts(by_reason: Mapping[str, int]) -> str:
    return ", ".join(f"{count} by {reason}" for reason, count in sorted(by_reason.items()) if count) or "none"


def _number(value: float | None, *, digits: int = 3) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _seconds(text: str | None) -> str:
    return "not seen" if text is None else f"{float(text):.2f} s"
