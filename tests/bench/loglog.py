"""A picture of how things grow (SVG): both axes logarithmic, so that a line's steepness is the power it grows with."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

PLOT_W, PLOT_H = 400, 340
LEFT, TOP, GAP, LINE = 64, 44, 40, 18
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#882255")
"""Told apart by colour-blind eyes too (Okabe and Ito, and one of Tol's)."""


@dataclass(frozen=True, slots=True)
class Line:
    """points: (x, y), all above 0; a dashed one is measured in something else, which its name says."""

    name: str
    points: tuple[tuple[float, float], ...]
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class _Axis:
    """Whole decades from `low` to `high`, drawn over `length` from `start`; downwards where `length` is negative."""

    low: int
    high: int
    start: float
    length: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, length: float) -> "_Axis":
        low = floor(log10(min(values)))
        return cls(low, max(low + 1, ceil(log10(max(values)))), start, length)

    def at(self, value: float) -> float:
        return self.start + self.length * (log10(value) - self.low) / (self.high - self.low)


def picture(panels: Sequence[Panel]) -> str:
    """The whole document, panels side by side, each with its legend below and a grey guide of slope 1."""
    longest = max(len(panel.lines) for panel in panels)
    width = len(panels) * (LEFT + PLOT_W + GAP)
    height = TOP + PLOT_H + 56 + (longest + 1) * LINE
    drawn = [_panel(panel, LEFT + place * (LEFT + PLOT_W + GAP)) for place, panel in enumerate(panels)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *drawn, "</svg>\n"])


def _panel(panel: Panel, left: int) -> str:
    x_axis = _Axis.over([x for line in panel.lines for x, _ in line.points], left, PLOT_W)
    y_axis = _Axis.over([y for line in panel.lines for _, y in line.points], TOP + PLOT_H, -PLOT_H)
    bottom = TOP + PLOT_H
    parts = [
        _text(left, TOP - 16, panel.title, size=15, anchor="start"),
        *_grid(x_axis, y_axis),
        f'<rect x="{left}" y="{TOP}" width="{PLOT_W}" height="{PLOT_H}" fill="none" stroke="#666"/>',
        _text(left + PLOT_W / 2, bottom + 36, panel.x_label),
        f'<g transform="translate({left - 46} {TOP + PLOT_H / 2}) rotate(-90)">{_text(0, 0, panel.y_label)}</g>',
        _guide(x_axis, y_axis),
    ]
    for place, line in enumerate(panel.lines):
        colour = COLOURS[place % len(COLOURS)]
        dashes = ' stroke-dasharray="5 4"' if line.is_dashed else ""
        where = [(x_axis.at(x), y_axis.at(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        for (x, y), (size, value) in zip(where, line.points, strict=True):
            told = escape(f"{line.name}: {value:.3g} at {size:,.0f}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{told}</title></circle>')
        y_key = bottom + 60 + place * LINE
        parts.append(f'<path d="M{left} {y_key - 4}h24" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts.append(_text(left + 32, y_key, line.name, anchor="start"))
    return "\n".join(parts)


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    """Decades with their number, and fainter lines between them."""
    left, right, bottom, top = x_axis.start, x_axis.start + x_axis.length, y_axis.start, y_axis.start + y_axis.length
    parts = []
    for axis, is_x in ((x_axis, True), (y_axis, False)):
        for decade in range(axis.low, axis.high + 1):
            for step in range(1, 10 if decade < axis.high else 2):
                at = axis.at(step * 10.0**decade)
                path = f"M{at:.1f} {bottom}V{top}" if is_x else f"M{left} {at:.1f}H{right}"
                parts.append(f'<path d="{path}" stroke="{"#ccc" if step == 1 else "#eee"}" stroke-width="1"/>')
            told = f"{10.0**decade:,.0f}" if decade >= 0 else f"{10.0**decade:g}"
            at = axis.at(10.0**decade)
            parts.append(_text(at, bottom + 16, told) if is_x else _text(left - 6, at + 4, told, anchor="end"))
    return parts


def _guide(x_axis: _Axis, y_axis: _Axis) -> str:
    """Through the middle of the panel, as long as it stays inside."""
    middle = (x_axis.low + x_axis.high) / 2, (y_axis.low + y_axis.high) / 2
    reach = min(x_axis.high - middle[0], y_axis.high - middle[1])
    (x1, y1), (x2, y2) = ((x_axis.at(10 ** (middle[0] + d)), y_axis.at(10 ** (middle[1] + d))) for d in (-reach, reach))
    path = f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#999" stroke-width="1.5" stroke-dasharray="2 4"/>'
    return path + _text(x1 + 10, y1 - 4, "slope 1", anchor="start", colour="#777")


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "middle", colour: str = "#222") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {where}>{escape(text)}</text>"
