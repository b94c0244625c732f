"""The learning rate over a run, and how far the run is: bounded by steps, by seconds, or by whichever is nearer."""

from moe_core.contract.runtime_config import TrainingConfig

DECAY_SHARE = 0.7
"""Last part of the run over which the learning rate falls linearly to zero."""


def progress(config: TrainingConfig, *, step: int, seconds: float) -> float:
    """Share of the run that is done, 0..1, by the nearer bound."""
    shares = [0.0]
    if config.max_steps is not None:
        shares.append(step / config.max_steps)
    if config.max_seconds is not None:
        shares.append(seconds / config.max_seconds)
    return min(1.0, max(shares))


def rate_share(config: TrainingConfig, *, step: int, done: float) -> float:
    """Share of the learning rate for `step` (from 0) when `done` of the run is over: warm-up, plateau, fall to zero."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return warm * min(1.0, (1.0 - done) / DECAY_SHARE)
