"""A plan as a picture (SVG): a row for each rank, a square for each slot of a layer, coloured by the slot's load."""

from html import escape

import numpy as np

from moe_core.contract.expert_map import EMPTY_SLOT
from moe_core.preview.outlook import Outlook

SQUARE, GAP, MARGIN, LABEL, BAR = 14, 2, 16, 64, 120
MOST_SLOTS = 400
"""Squares in one row; the layers beyond them are not drawn, which the picture says."""


def picture(found: Outlook) -> str:
    """The whole document. A hot slot is red, a cold one blue; the bar ends a row with the rank's share of the load."""
    expert_map = found.expert_map
    widest = max(1, *expert_map.slots_of_rank)
    num_layers = min(expert_map.num_layers, max(1, MOST_SLOTS // widest))
    weight_LS = found.load_of_slot
    hottest = float(weight_LS.max(initial=0.0)) or 1.0
    width = LABEL + num_layers * (widest * (SQUARE + GAP) + MARGIN) + BAR + 2 * MARGIN
    parts = []
    for layer in range(num_layers):
        left = MARGIN + LABEL + layer * (widest * (SQUARE + GAP) + MARGIN)
        parts.append(_text(left, MARGIN + 8, f"layer {layer}"))
    parts.append(_text(width - BAR - MARGIN, MARGIN + 8, "load of the rank"))
    most = max(found.load_of_rank, default=0.0) or 1.0
    for rank in range(expert_map.num_ranks):
        top = MARGIN * 2 + rank * (SQUARE + GAP)
        parts.append(_text(MARGIN, top + SQUARE - 3, f"rank {rank}"))
        for layer in range(num_layers):
            left = MARGIN + LABEL + layer * (widest * (SQUARE + GAP) + MARGIN)
            for place, slot in enumerate(expert_map.slot_range(rank)):
                logical = expert_map.logical_of_slot[layer][slot]
                x = left + place * (SQUARE + GAP)
                if logical == EMPTY_SLOT:
                    parts.append(_square(x, top, "none", f"layer {layer}, slot {slot}: empty"))
                    continue
                told = f"layer {layer}, slot {slot}: expert {logical}, load {weight_LS[layer, slot]:.4g}"
                parts.append(_square(x, top, _colour(float(weight_LS[layer, slot]) / hottest), told))
        share = found.load_of_rank[rank] / most if rank < len(found.load_of_rank) else 0.0
        x = width - BAR - MARGIN
        parts.append(f'<rect x="{x}" y="{top}" width="{BAR * share:.1f}" height="{SQUARE}" fill="#888"/>')
    height = MARGIN * 3 + expert_map.num_ranks * (SQUARE + GAP)
    left_out = expert_map.num_layers - num_layers
    if left_out:
        parts.append(_text(MARGIN, height - 4, f"{left_out} more layers are not drawn"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>\n"])


def _colour(heat: float) -> str:
    """Blue over grey to red."""
    cold, middle, hot = np.array([66, 110, 180]), np.array([225, 225, 225]), np.array([190, 40, 40])
    mixed = cold + (middle - cold) * heat * 2 if heat < 0.5 else middle + (hot - middle) * (heat * 2 - 1)
    return "#" + "".join(f"{round(value):02x}" for value in mixed.tolist())


def _square(x: int, y: int, fill: str, told: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{SQUARE}" height="{SQUARE}" fill="{fill}" stroke="#bbb" stroke-width="0.5">'
        f"<title>{escape(told)}</title></rect>"
    )


def _text(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="10" fill="#333">{escape(text)}</text>'
