"""Codes that make up for each other: GPTQ (Frantar et al. 2022, arXiv 2210.17323), with scales that are fixed before.

Columns are rounded one after the other, those that matter most first; what a column loses is taken up by the columns
that are still in full, as far as what they are multiplied with goes together. Fixed scales let columns of any group be
rounded in any order.

Suffixes: N rows out, M columns in, G groups, B columns of a block.
"""

import torch

from moe_core.contract.packing import Packing
from moe_runtime.kernels.quantise import SCALE_DTYPES, Packed, encode, per_column, steps

BLOCK = 128
"""Columns after which the rest of the matrix is brought up to date, in one product."""
DAMPING = 0.01
"""Of the diagonal's mean, added to it (the paper's own): the inverse exists then."""


def gptq(weight_NM: torch.Tensor, moment_MM: torch.Tensor, packing: Packing, *, scales_NG: torch.Tensor) -> Packed:
    """moment_MM: symmetric mean of x x^T over what the matrix is multiplied with; a column that saw nothing is zero."""
    num_columns = weight_NM.shape[-1]
    kept_NG = scales_NG.to(SCALE_DTYPES[packing.precision])
    scale_NM = per_column(kept_NG, packing, num_columns=num_columns).expand_as(weight_NM)
    order_M = moment_MM.diagonal().argsort(descending=True, stable=True)
    left_NM, scale_NM = weight_NM[:, order_M].double(), scale_NM[:, order_M].double()
    upper_MM = _upper(moment_MM.double()[order_M][:, order_M])
    alone = packing.model_copy(update={"group_size": 0})
    taken_NM = torch.zeros_like(weight_NM)
    for first in range(0, num_columns, BLOCK):
        last = min(first + BLOCK, num_columns)
        errors_NB = torch.zeros_like(left_NM[:, first:last])
        for m in range(first, last):
            column = slice(m, m + 1)
            step_N1 = steps(left_NM[:, column].float(), scale_NM[:, column].float(), alone)
            taken_NM[:, order_M[column]] = step_N1
            error_N1 = (left_NM[:, column] - step_N1 * scale_NM[:, column]) / upper_MM[m, m]
            left_NM[:, m + 1 : last] -= error_N1 * upper_MM[m, m + 1 : last]
            errors_NB[:, m - first] = error_N1.squeeze(-1)
        left_NM[:, last:] -= errors_NB @ upper_MM[first:last, last:]
    return Packed(encode(taken_NM, packing), kept_NG)


def _upper(moment_MM: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped moment's inverse: row m says how later columns answer for column m."""
    diagonal_M = moment_MM.diagonal()
    mean = float(diagonal_M.mean()) or 1.0
    damped_MM = moment_MM + torch.diag(torch.where(diagonal_M == 0, mean, DAMPING * mean))
    inverse_MM = torch.cholesky_inverse(torch.linalg.cholesky(damped_MM))
    upper_MM: torch.Tensor = torch.linalg.cholesky(inverse_MM).T.contiguous()
    return upper_MM
