"""What the demo's screens show."""

import io

from rich.console import Console

from moe_core.contract.exchange import RankState
from moe_operator.progress import LiveScreen, Screen, View

STAGES = ("train", "serve")


def test_lines_name_the_stage_and_every_news_once() -> None:
    out = io.StringIO()
    screen = Screen(View(STAGES), Console(file=out, width=80))
    with screen:
        screen.stage(1)
        screen.news("all four ranks are active")
        screen.refresh()
    assert [line.partition("s  ")[2] for line in out.getvalue().splitlines()] == [
        "[2/2] serve",
        "all four ranks are active",
    ]


def test_a_drawn_screen_holds_headline_progress_figures_ranks_and_news() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    screen = LiveScreen(View(STAGES), console)
    screen.view.headline, screen.view.fraction = "training, step 12", 0.4
    screen.view.facts["loss"] = "2.71"
    screen.view.sample("loss over time", 2.0)
    screen.view.ranks = [RankState(rank=2, pod_uid="p", phase="Active", memory_bytes=700 << 20, tokens=12345)]
    screen.news("rank 2 is active")
    console.print(screen.render())
    shown = out.getvalue()
    wanted = ("training, step 12", "40 %", "2.71", "loss over time", "700 MiB", "12,345", "rank 2 is active")
    assert [text for text in wanted if text not in shown] == []
