"""Rows as float8 on a GPU: a row is read twice, the second time from the cache.

Suffixes: R rows, M columns, W columns at a time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.quantise import LARGEST_FLOAT8

_WIDTH = 2048


@triton.jit
def _float8_rows(x_ptr, codes_ptr, scale_ptr, M, LARGEST: tl.constexpr, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at_W = tl.arange(0, W)
    extreme_W = tl.zeros([W], dtype=tl.float32)
    for first in range(0, M, W):
        x_W = tl.load(x_ptr + row * M + first + at_W, mask=first + at_W < M, other=0.0).to(tl.float32)
        extreme_W = tl.maximum(extreme_W, tl.abs(x_W))
    scale = tl.max(extreme_W, axis=0) / LARGEST
    tl.store(scale_ptr + row, scale)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    for first in range(0, M, W):
        mask_W = first + at_W < M
        x_W = tl.load(x_ptr + row * M + first + at_W, mask=mask_W, other=0.0).to(tl.float32)
        steps_W = tl.minimum(tl.maximum(x_W / divisor, -LARGEST), LARGEST)
        tl.store(codes_ptr + row * M + first + at_W, steps_W.to(tl.float8e4nv), mask=mask_W)


def float8_rows_triton(x_RM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equals `float8.float8_rows_reference`."""
    x_RM = x_RM.contiguous()
    num_rows, num_columns = x_RM.shape
    codes_RM = torch.empty_like(x_RM, dtype=torch.float8_e4m3fn)
    scale_R = x_RM.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        width = min(_WIDTH, int(triton.next_power_of_2(num_columns)))
        _float8_rows[(num_rows,)](x_RM, codes_RM, scale_R, num_columns, LARGEST=LARGEST_FLOAT8, W=width)
    return codes_RM, scale_R
