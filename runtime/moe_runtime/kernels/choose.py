"""Which of the two runs: Triton on a GPU's tensors, the plain torch reference everywhere else.

The one place that decides it, so that a CPU pod never imports triton.
"""

from functools import cache
from typing import Any

import torch


def runs_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


@cache
def properties(device: torch.device) -> Any:
    """Of a GPU. Asking the driver at each launch would show."""
    return torch.cuda.get_device_properties(device)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere, in Triton's interpreter."""
    return int(properties(device).multi_processor_count) if device.type == "cuda" else 1
