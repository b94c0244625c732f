"""Random draws of routers: from the moment's generator only, so that a step that is run again takes the same way."""

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import Moment


def _generator(moment: Moment) -> torch.Generator:
    if moment.generator is None:
        raise InvalidInput("a router that draws in training needs moment.generator (got None)")
    return moment.generator


def uniform(moment: Moment, *shape: int, device: torch.device) -> torch.Tensor:
    """float32 in [0, 1). Raises InvalidInput without a generator."""
    generator = _generator(moment)
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def normal(moment: Moment, *shape: int, device: torch.device) -> torch.Tensor:
    """float32, standard normal. Raises InvalidInput without a generator."""
    generator = _generator(moment)
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def jitter(x_TD: torch.Tensor, eps: float, moment: Moment) -> torch.Tensor:
    """x times a factor uniform in [1 - eps, 1 + eps) per element (Switch Transformer, 2101.03961)."""
    factor_TD = 1.0 - eps + 2.0 * eps * uniform(moment, *x_TD.shape, device=x_TD.device)
    return (x_TD.float() * factor_TD).to(x_TD.dtype)


def seeded(seed: int, layer_idx: int) -> torch.Generator:
    """For what is drawn once: the same on all ranks, another in each layer."""
    return torch.Generator().manual_seed(seed * 1_000_003 + layer_idx)
