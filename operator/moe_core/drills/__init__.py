"""Failure drills: what was injected, what was then seen, and the verdict. Values only; decide.drill acts on them."""
