"""Whether a router's answer is one: always asked of a user's own router, and of ours in tests."""

from collections.abc import Mapping

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import NO_EXPERT, Routing, Tokens


def checked(routing: object, tokens: Tokens, *, num_experts: int) -> Routing:
    """The routing itself. Raises InvalidInput that names the first field with a wrong shape, type or value."""
    if not isinstance(routing, Routing):
        raise InvalidInput(f"a router answers with a Routing (got {type(routing).__name__})")
    num_tokens = tokens.x_TD.shape[0]
    expert_TK, weight_TK = routing.expert_TK, routing.weight_TK
    _tensor("expert_TK", expert_TK, torch.int64, (num_tokens, None))
    _tensor("weight_TK", weight_TK, torch.float32, (num_tokens, expert_TK.shape[1]))
    if expert_TK.numel():
        low, high = int(expert_TK.min()), int(expert_TK.max())  # device sync
        if low < NO_EXPERT or high >= num_experts:
            wrong = low if low < NO_EXPERT else high
            raise InvalidInput(f"expert_TK holds ids from 0 to {num_experts - 1}, or {NO_EXPERT} (got {wrong})")
        if bool(((expert_TK == NO_EXPERT) & (weight_TK != 0)).any()):
            raise InvalidInput(f"weight_TK is 0 where expert_TK is {NO_EXPERT}")
        order_TK = expert_TK.sort(dim=-1).values
        twice_Tk = (order_TK[:, 1:] == order_TK[:, :-1]) & (order_TK[:, 1:] != NO_EXPERT)
        if bool(twice_Tk.any()):
            token_idx = int(twice_Tk.any(dim=-1).nonzero()[0])
            raise InvalidInput(
                f"expert_TK names an expert twice for token {token_idx}: {expert_TK[token_idx].tolist()}"
            )
    _finite("weight_TK", weight_TK)
    if routing.probability_TE is not None:
        _tensor("probability_TE", routing.probability_TE, torch.float32, (num_tokens, num_experts))
        _finite("probability_TE", routing.probability_TE)
    for name, loss in routing.losses.items():
        _tensor(f"losses[{name!r}]", loss, torch.float32, ())
        _finite(f"losses[{name!r}]", loss)
    _counts(routing.counts)
    if routing.soft is not None:
        mix_TP = routing.soft.mix_TP
        _tensor("soft.mix_TP", mix_TP, torch.float32, (num_tokens, None))
        _tensor("soft.share_TP", routing.soft.share_TP, torch.float32, (num_tokens, mix_TP.shape[1]))
        if mix_TP.shape[1] % num_experts or expert_TK.shape[1]:
            raise InvalidInput(
                f"soft rows are a multiple of {num_experts} experts, without picks beside them (got {mix_TP.shape[1]} "
                f"rows, {expert_TK.shape[1]} picks per token)"
            )
        _finite("soft.mix_TP", mix_TP)
        _finite("soft.share_TP", routing.soft.share_TP)
    if routing.pass_TK is not None:
        _tensor("pass_TK", routing.pass_TK, torch.int64, (num_tokens, expert_TK.shape[1]))
        _passes(routing.pass_TK, routing.passes)
    return routing


def _passes(pass_TK: torch.Tensor, passes: int) -> None:
    if passes < 1:
        raise InvalidInput(f"passes must be at least 1 (got {passes})")
    if pass_TK.numel() and not 0 <= int(pass_TK.min()) <= int(pass_TK.max()) < passes:
        raise InvalidInput(f"pass_TK holds passes from 0 to {passes - 1}")


def _counts(counts: Mapping[str, object]) -> None:
    for name, count in counts.items():
        if not isinstance(count, int):
            raise InvalidInput(f"counts[{name!r}] must be an int (got {type(count).__name__})")


def _tensor(name: str, value: object, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    if not isinstance(value, torch.Tensor):
        raise InvalidInput(f"{name} must be a tensor (got {type(value).__name__})")
    fits = len(shape) == value.ndim and all(w is None or w == g for w, g in zip(shape, value.shape, strict=True))
    if not fits or value.dtype != dtype:
        wanted = [size if size is not None else "any" for size in shape]
        raise InvalidInput(f"{name} must be {dtype} of shape {wanted} (got {value.dtype} of {list(value.shape)})")


def _finite(name: str, value: torch.Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise InvalidInput(f"{name} holds {int((~value.isfinite()).sum())} values that are not finite")
