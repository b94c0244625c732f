"""Choosing the next token: greedy, or seeded by (seed, position), so that a replay on another rank draws the same.

Not torch's generators: their stream depends on the batch a sequence happens to share, which a replay does not repeat.
"""

import math
from hashlib import blake2b

import torch


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that only depends on its arguments.

    >>> uniform(1, 5) == uniform(1, 5), uniform(1, 5) == uniform(1, 6)
    (True, False)
    """
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


class NoNumbers(ArithmeticError):
    """Logits that are inf or nan say nothing about the next token."""


def sample(logits_V: torch.Tensor, *, temperature: float, top_p: float, seed: int, position: int) -> int:
    """The token at `position` of its sequence. temperature 0: the highest logit, of equals the lowest id.

    Otherwise the smallest set of most probable tokens whose probability reaches top_p, by inverse transform.
    Raises NoNumbers; single tokens may be excluded by -inf.
    """
    best = int(torch.argmax(logits_V))  # device sync: the token goes to the reader and into the next step
    if not math.isfinite(highest := float(logits_V[best])):  # nan counts as the highest
        raise NoNumbers(f"the highest logit at position {position} is {highest}")
    if temperature <= 0.0:
        return best
    probabilities_V = torch.softmax((logits_V.double() - highest) / temperature, dim=-1)
    sorted_V, order_V = torch.sort(probabilities_V, descending=True, stable=True)
    cumulative_V = torch.cumsum(sorted_V, dim=-1)
    keep = int(torch.searchsorted(cumulative_V, min(top_p, 1.0) * float(cumulative_V[-1]))) + 1
    keep = min(keep, len(cumulative_V))
    target = uniform(seed, position) * float(cumulative_V[keep - 1])
    chosen = min(int(torch.searchsorted(cumulative_V, target, right=True)), keep - 1)
    return int(order_V[chosen])
