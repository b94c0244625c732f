"""What the data plane does with a step's tokens and a planner has to know beforehand."""

SMALL_STEP_TOKENS = 64
"""A step without gradients and with at most this many tokens on the fullest rank dispatches by token: two exchanges per
layer instead of three, and more bytes."""
