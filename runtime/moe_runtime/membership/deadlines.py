"""How long ranks wait for each other. Constants: tests of the ranks alone shorten them, nobody else sets them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadlines:
    """In milliseconds.

    Seen on two cores shared by four ranks: a killed peer is noticed in 0.1 s, a next epoch agreed in 10 to 30 ms, or in
    0.43 s beside a stopped peer with probes of 0.4 s; a step takes 20 to 250 ms.
    """

    step_ms: int = 3000
    """One collective inside a step; a rank silent for longer is taken for hung. Ten times the slowest step seen."""
    probe_ms: int = 700
    """A peer's answer to a membership probe: it comes from a thread of its own that a safetensors read may hold up."""
    agree_ms: int = 5000
    """One round of the agreement on a next epoch: several probes, one after the other."""
