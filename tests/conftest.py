"""For every tier: property tests draw at random on a desk and repeat themselves in CI, where the change is judged;
Triton kernels run in its interpreter.
"""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("local", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# Before anything imports triton, whose own functions are bound to compiler or interpreter then. Only the tier `gpu` has
# a device; it sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")
