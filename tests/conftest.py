"""For every tier: property tests draw at random on a desk and repeat themselves in CI, where the change is judged;
Triton kernels run in its interpreter.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("local", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# Before anything imports triton, whose own functions are bound to compiler or interpreter then. Only the tier `gpu` has
# a device; it sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN and the largest integers."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
