"""The experts on a GPU equal plain torch in float64, whatever the spread of the picks."""

import pytest
import torch

from moe_runtime.kernels.mixture import mixture, mixture_reference

# T, K, S, D, F
SHAPES = [(1, 1, 4, 64, 32), (37, 2, 5, 200, 72), (300, 4, 16, 512, 384), (4096, 8, 64, 1024, 256)]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Gate, up and what comes back from `down` are rounded once each; a single weight's gradient shows it."""


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("spread", ["even", "skewed", "some without a slot"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mixture_and_its_gradients_equal_plain_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, spread: str
) -> None:
    num_tokens, top_k, num_slots, d, f = shape
    torch.manual_seed(0)
    score_TS = torch.rand(num_tokens, num_slots, device="cuda")
    if spread == "skewed":
        score_TS = score_TS + torch.linspace(1, 0, num_slots, device="cuda")
    slot_TK = score_TS.topk(top_k).indices
    if spread == "some without a slot":
        slot_TK = torch.where(torch.rand_like(slot_TK, dtype=torch.float32) < 0.3, -1, slot_TK)
    given = [
        torch.randn(num_tokens, d, device="cuda"),
        torch.rand(num_tokens, top_k, device="cuda"),
        torch.randn(num_slots, 2 * f, d, device="cuda") * d**-0.5,
        torch.randn(num_slots, d, f, device="cuda") * f**-0.5,
    ]
    given = [t if place == 1 else t.to(dtype) for place, t in enumerate(given)]
    d_out_TD = torch.randn(num_tokens, d, device="cuda").to(dtype)
    torch.use_deterministic_algorithms(True)  # new memory is NaN: an element that a kernel leaves out shows
    leaves = [t.clone().requires_grad_() for t in given]
    out_TD = mixture(leaves[0], slot_TK, *leaves[1:])
    grads = torch.autograd.grad(out_TD, leaves, d_out_TD)
    torch.use_deterministic_algorithms(False)
    exact = [t.double().requires_grad_() for t in given]
    expected_TD = mixture_reference(exact[0], slot_TK, *exact[1:])
    expected = torch.autograd.grad(expected_TD, exact, d_out_TD.double())
    errors = [relative(a.detach(), e.detach()) for a, e in zip([out_TD, *grads], [expected_TD, *expected], strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors
