"""What a person sees while the demo runs: a live panel on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_core.contract.exchange import RankState

BARS = "▁▂▃▄▅▆▇█"
PLAIN_EVERY_S = 10.0
_COLOURS = {"Active": "green", "Ready": "cyan", "Loading": "yellow", "Starting": "yellow", "Draining": "magenta"}


@dataclass(slots=True)
class View:
    """Everything on the screen; whoever runs the demo writes it."""

    stages: Sequence[str]
    stage: int = 0
    headline: str = ""
    fraction: float | None = None
    facts: dict[str, str] = field(default_factory=dict)
    series: dict[str, deque[float]] = field(default_factory=dict)
    ranks: Sequence[RankState] = ()
    news: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=9))

    def sample(self, name: str, value: float) -> None:
        self.series.setdefault(name, deque(maxlen=40)).append(value)


class Screen:
    """Lines: one per news, and where things stand every ten seconds. `LiveScreen` draws the same view."""

    def __init__(self, view: View, console: Console) -> None:
        self.view = view
        self.console = console
        self.started_at = time.monotonic()
        self._told_at = self.started_at

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, number: int) -> None:
        self.view.stage, self.view.fraction = number, None
        self.view.facts.clear()
        self.view.series.clear()
        self.news(f"[{number + 1}/{len(self.view.stages)}] {self.view.stages[number]}")

    def news(self, text: str) -> None:
        seconds = time.monotonic() - self.started_at
        self.view.news.append((seconds, text))
        self.show_news(f"{seconds:6.1f} s  {text}")

    def show_news(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def refresh(self) -> None:
        now = time.monotonic()
        if now - self._told_at >= PLAIN_EVERY_S and self.view.headline:
            self._told_at = now
            facts = ", ".join(f"{name} {value}" for name, value in self.view.facts.items())
            self.show_news(f"{now - self.started_at:6.1f} s    {self.view.headline}" + (f": {facts}" if facts else ""))


class LiveScreen(Screen):
    def __init__(self, view: View, console: Console) -> None:
        super().__init__(view, console)
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=5, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)

    def show_news(self, line: str) -> None:
        if line.lstrip().split("  ", 1)[-1].startswith("["):  # a new stage also stays above the panel
            self.console.print(line, highlight=False, markup=False)

    def refresh(self) -> None:
        pass  # drawn on its own clock

    def render(self) -> RenderableType:
        view, parts = self.view, list[RenderableType]()
        road = Text()
        for idx, name in enumerate(view.stages):
            style = "bold green" if idx < view.stage else "bold yellow" if idx == view.stage else "dim"
            mark = "✔" if idx < view.stage else "▶" if idx == view.stage else "·"
            road.append(f" {mark} {name} ", style=style)
        parts += [road, Text(), Text(view.headline, style="bold")]
        if view.fraction is not None:
            done = min(1.0, view.fraction)
            bar = Table.grid(padding=(0, 2))
            bar.add_row(ProgressBar(total=1.0, completed=done, width=64), f"{100 * done:.0f} %")
            parts.append(bar)
        if view.facts or view.series:
            grid = Table.grid(padding=(0, 2))
            for name, value in view.facts.items():
                grid.add_row(Text(name, style="dim"), value)
            for name, values in view.series.items():
                if values:
                    grid.add_row(Text(name, style="dim"), Text(f"{sparkline(values)}  {values[-1]:.4g}", style="cyan"))
            parts.append(grid)
        if view.ranks:
            parts.append(_ranks_table(view.ranks))
        parts.append(Text())
        parts += [Text(f"{seconds:6.1f} s  {text}", style="dim", no_wrap=True) for seconds, text in view.news]
        clock = f"{time.monotonic() - self.started_at:.0f} s"
        return Panel(Group(*parts), title="moerator demo", subtitle=clock, border_style="blue", padding=(1, 2))


def make_screen(stages: Sequence[str], *, plain: bool) -> Screen:
    console = Console(file=sys.stdout)
    view = View(stages)
    return LiveScreen(view, console) if console.is_terminal and not plain else Screen(view, console)


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """
    >>> sparkline([1, 2, 3])
    '▁▅█'
    """
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1) + 1e-9)] for value in values)


def _ranks_table(ranks: Sequence[RankState]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("rank", "phase", "memory", "tokens", ""):
        table.add_column(column, justify="right" if column in ("memory", "tokens") else "left")
    for state in ranks:
        phase = Text(state.phase, style=_COLOURS.get(state.phase, "red"))
        memory = f"{state.memory_bytes / 2**20:.0f} MiB" if state.memory_bytes else ""
        table.add_row(str(state.rank), phase, memory, f"{state.tokens:,}" if state.tokens else "", state.message[:60])
    return table
