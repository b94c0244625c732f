"""Which of the two runs: Triton on a GPU's tensors, the plain torch reference everywhere else.

The one place that decides it, so that a CPU pod never imports triton.
"""

import torch


def runs_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda
