"""The gate on a GPU: one pass over the logits, forward and backward.

A program holds the rows of some tokens in registers and takes the best expert K times. Floats are compared as integers
of the same order (their bits, mirrored below zero), which the hardware reduces over a warp in one instruction, and
which order NaN too. Each program counts its picks in registers and adds them up once at its end.

Reads T * E logits, writes T * K picks (12 bytes each) and E counts. Backward reads and writes T * E once.

Suffixes: T tokens, B tokens of a program at a time, G groups and J experts of a group (both rounded up to powers of
two), C = G * J columns, K picks of a token, Q: K rounded up.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.choose import multiprocessors
from moe_runtime.kernels.gate import TINY, GateRule

_TAKEN = tl.constexpr(-(2**31))
_NAN = tl.constexpr(2**31 - 1)
_TINY = tl.constexpr(TINY)


@dataclass(frozen=True, slots=True)
class Launch:
    """How many logits a program holds at a time, and how many programs per multiprocessor share the tokens."""

    columns: int = 2048
    num_warps: int = 4
    programs: int = 8

    @classmethod
    def of(cls, columns: int) -> "Launch":
        """For tokens of so many columns.

        Beyond 128 the warps of a program would trade each pick's results through shared memory (104 barriers a tile at
        512 experts, in what the compiler makes of it): a program is one warp then, as far as its registers go.
        """
        if columns <= 128:
            return cls()
        return cls(columns=max(512, columns), num_warps=max(1, columns // 512), programs=24)


@triton.jit
def _ordered(x):
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes +0
    is_nan = x != x  # noqa: PLR0124
    return tl.where(is_nan, _NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _load_logits(ptr_BC, mask_BC, is_real_C):
    """float32; -inf in columns that nobody can choose, 0 in rows of no token, which so give no NaN."""
    logits_BC = tl.load(ptr_BC, mask=mask_BC, other=0.0).to(tl.float32)
    return tl.where(is_real_C[None, :], logits_BC, float("-inf"))


@triton.jit
def _experts_of_columns(GROUP: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, J: tl.constexpr):
    """(expert of each column, whether there is one)."""
    column_C = tl.arange(0, G * J)
    return column_C // J * GROUP + column_C % J, (column_C % J < GROUP) & (column_C // J < GROUPS)


@triton.jit
def _in_best_groups(
    choice_BC,
    B: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_TOPK: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    G: tl.constexpr,
    J: tl.constexpr,
):
    choice_BGJ = tl.reshape(choice_BC, [B, G, J])
    best_BG = tl.max(choice_BGJ, axis=2)
    if GROUP_BEST == 2:
        at_BGJ = tl.broadcast_to(tl.arange(0, J)[None, None, :], [B, G, J])
        first_BG = tl.min(tl.where(choice_BGJ == best_BG[:, :, None], at_BGJ, J), axis=2)
        best_BG += tl.max(tl.where(at_BGJ == first_BG[:, :, None], float("-inf"), choice_BGJ), axis=2)
    group_BG = tl.broadcast_to(tl.arange(0, G)[None, :], [B, G])
    key_BG = tl.where(group_BG < GROUPS, _ordered(best_BG), _TAKEN)
    for _ in tl.static_range(GROUP_TOPK):
        best_B = tl.max(key_BG, axis=1)
        taken_B = tl.min(tl.where(key_BG == best_B[:, None], group_BG, G), axis=1)
        key_BG = tl.where(group_BG == taken_B[:, None], _TAKEN, key_BG)
    is_in_BG = (key_BG == _TAKEN) & (group_BG < GROUPS)
    return tl.reshape(tl.broadcast_to(is_in_BG[:, :, None], [B, G, J]), [B, G * J])


@triton.jit
def _take_best(key_BC, bits_BC, K: tl.constexpr, B: tl.constexpr, C: tl.constexpr, Q: tl.constexpr):
    """K times the highest key, the leftmost of equals: (keys with _TAKEN there, its column, what bits_BC has there)."""
    column_BC = tl.broadcast_to(tl.arange(0, C)[None, :], [B, C])
    pick_1Q = tl.arange(0, Q)[None, :]
    column_BQ = tl.zeros([B, Q], dtype=tl.int32)
    bits_BQ = tl.zeros([B, Q], dtype=tl.int32)
    for k in tl.static_range(K):
        best_B = tl.max(key_BC, axis=1)
        taken_B = tl.min(tl.where(key_BC == best_B[:, None], column_BC, C), axis=1)
        is_taken_BC = column_BC == taken_B[:, None]
        key_BC = tl.where(is_taken_BC, _TAKEN, key_BC)
        taken_bits_B = tl.sum(tl.where(is_taken_BC, bits_BC, 0), axis=1)
        column_BQ = tl.where(pick_1Q == k, taken_B[:, None], column_BQ)
        bits_BQ = tl.where(pick_1Q == k, taken_bits_B[:, None], bits_BQ)
    return key_BC, column_BQ, bits_BQ


@triton.jit
def _gate(
    logits_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    count_ptr,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_TOPK: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    J: tl.constexpr,
    Q: tl.constexpr,
):
    C: tl.constexpr = G * J
    GROUPED: tl.constexpr = GROUP_TOPK < GROUPS
    expert_C, is_expert_C = _experts_of_columns(E // GROUPS, GROUPS, G, J)
    pick_Q = tl.arange(0, Q)
    is_pick_Q = pick_Q < K
    if HAS_BIAS:
        bias_C = tl.load(bias_ptr + expert_C, mask=is_expert_C, other=0.0).to(tl.float32)
    count_BC = tl.zeros([B, C], dtype=tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, B), tl.num_programs(0)):
        token_B = tile * B + tl.arange(0, B)
        is_token_B = token_B < num_tokens
        mask_BC = is_token_B[:, None] & is_expert_C[None, :]
        row_B = token_B.to(tl.int64)
        logits_BC = _load_logits(logits_ptr + row_B[:, None] * E + expert_C[None, :], mask_BC, is_expert_C)
        if not SIGMOID:
            highest_B = tl.max(logits_BC, axis=1)
            sum_B = tl.sum(tl.exp(logits_BC - highest_B[:, None]), axis=1)

        choice_BC = logits_BC
        if HAS_BIAS or GROUPED:
            choice_BC = tl.sigmoid(logits_BC) if SIGMOID else tl.exp(logits_BC - highest_B[:, None]) / sum_B[:, None]
            if HAS_BIAS:
                choice_BC += bias_C[None, :]
        if GROUPED:
            choice_BC = tl.where(is_expert_C[None, :], choice_BC, float("-inf"))
            is_in_BC = _in_best_groups(choice_BC, B, GROUPS, GROUP_TOPK, GROUP_BEST, G, J)
            choice_BC = tl.where(is_in_BC, choice_BC, float("-inf"))

        key_BC = tl.where(is_expert_C[None, :], _ordered(choice_BC), _TAKEN)
        key_BC, column_BQ, bits_BQ = _take_best(key_BC, logits_BC.to(tl.int32, bitcast=True), K, B, C, Q)
        count_BC += ((key_BC == _TAKEN) & mask_BC).to(tl.int32)

        chosen_BQ = tl.where(is_pick_Q[None, :], bits_BQ.to(tl.float32, bitcast=True), float("-inf"))
        if OVER_CHOSEN:
            chosen_BQ -= tl.max(chosen_BQ, axis=1)[:, None]
            weight_BQ = tl.exp(chosen_BQ)
            weight_BQ /= tl.sum(weight_BQ, axis=1)[:, None]
        elif SIGMOID:
            weight_BQ = tl.sigmoid(chosen_BQ)
        else:
            weight_BQ = tl.exp(chosen_BQ - highest_B[:, None]) / sum_B[:, None]
        if RENORMALISE:
            weight_BQ /= tl.sum(weight_BQ, axis=1)[:, None] + _TINY
        mask_BQ = is_token_B[:, None] & is_pick_Q[None, :]
        offset_BQ = row_B[:, None] * K + pick_Q[None, :]
        expert_BQ = column_BQ // J * (E // GROUPS) + column_BQ % J
        tl.store(expert_ptr + offset_BQ, expert_BQ.to(tl.int64), mask=mask_BQ)
        tl.store(weight_ptr + offset_BQ, weight_BQ * scale, mask=mask_BQ)
    total_C = tl.sum(count_BC, axis=0)
    tl.atomic_add(count_ptr + expert_C, total_C.to(tl.int64), mask=is_expert_C & (total_C > 0), sem="relaxed")


@triton.jit
def _gate_backward(
    logits_ptr,
    expert_ptr,
    grad_ptr,
    grad_logits_ptr,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    RENORMALISE: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
):
    """Chosen scores p, weights w = scale * v: dp by the division, then through softmax or sigmoid."""
    expert_C = tl.arange(0, C)
    pick_Q = tl.arange(0, Q)
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, B), tl.num_programs(0)):
        token_B = tile * B + tl.arange(0, B)
        row_B = token_B.to(tl.int64)
        mask_BC = (token_B < num_tokens)[:, None] & (expert_C < E)[None, :]
        mask_BQ = (token_B < num_tokens)[:, None] & (pick_Q < K)[None, :]
        offset_BQ = row_B[:, None] * K + pick_Q[None, :]
        expert_BQ = tl.load(expert_ptr + offset_BQ, mask=mask_BQ, other=0).to(tl.int32)
        grad_BQ = tl.load(grad_ptr + offset_BQ, mask=mask_BQ, other=0.0) * scale
        chosen_ptr = logits_ptr + row_B[:, None] * E + expert_BQ
        chosen_BQ = _load_logits(chosen_ptr, mask_BQ, pick_Q < K)
        offset_BC = row_B[:, None] * E + expert_C[None, :]
        grad_BC = tl.zeros([B, C], dtype=tl.float32)
        if OVER_CHOSEN:
            p_BQ = tl.exp(chosen_BQ - tl.max(chosen_BQ, axis=1)[:, None])
            p_BQ /= tl.sum(p_BQ, axis=1)[:, None]
            grad_BQ = p_BQ * (grad_BQ - tl.sum(grad_BQ * p_BQ, axis=1)[:, None])
        else:
            if SIGMOID:
                p_BQ = tl.sigmoid(chosen_BQ)
            else:
                logits_BC = _load_logits(logits_ptr + offset_BC, mask_BC, expert_C < E)
                highest_B = tl.max(logits_BC, axis=1)
                p_BC = tl.exp(logits_BC - highest_B[:, None])
                sum_B = tl.sum(p_BC, axis=1)
                p_BC /= sum_B[:, None]
                p_BQ = tl.exp(chosen_BQ - highest_B[:, None]) / sum_B[:, None]
            if RENORMALISE:
                total_B = tl.sum(p_BQ, axis=1) + _TINY
                dot_B = tl.sum(grad_BQ * p_BQ, axis=1) / total_B
                grad_BQ = (grad_BQ - dot_B[:, None]) / total_B[:, None]
            if SIGMOID:
                grad_BQ *= p_BQ * (1.0 - p_BQ)
            else:
                grad_BC -= tl.sum(grad_BQ * p_BQ, axis=1)[:, None]
        for k in tl.static_range(K):
            is_k_BQ = tl.broadcast_to(pick_Q[None, :] == k, [B, Q])
            expert_B = tl.sum(tl.where(is_k_BQ, expert_BQ, 0), axis=1)
            grad_B = tl.sum(tl.where(is_k_BQ, grad_BQ, 0.0), axis=1)
            grad_BC += tl.where(expert_C[None, :] == expert_B[:, None], grad_B[:, None], 0.0)
        if not SIGMOID and not OVER_CHOSEN:
            grad_BC *= p_BC
        tl.store(grad_logits_ptr + offset_BC, grad_BC.to(grad_logits_ptr.dtype.element_ty), mask=mask_BC)


def _grid(launch: Launch, num_tokens: int, tokens: int, device: torch.device) -> tuple[int]:
    return (min(launch.programs * multiprocessors(device), triton.cdiv(num_tokens, tokens)),)


def gate_forward(
    logits_TE: torch.Tensor, rule: GateRule, bias_E: torch.Tensor | None, *, launch: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equals `gate.gate_reference`, without a graph."""
    logits_TE = logits_TE.contiguous()
    num_tokens, num_experts = logits_TE.shape
    expert_TK = torch.empty((num_tokens, rule.top_k), dtype=torch.int64, device=logits_TE.device)
    weight_TK = torch.empty((num_tokens, rule.top_k), dtype=torch.float32, device=logits_TE.device)
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=logits_TE.device)
    # without a limit on groups the experts are one group
    num_groups = rule.num_groups if rule.is_grouped else 1
    groups, of_group = (triton.next_power_of_2(n) for n in (num_groups, num_experts // num_groups))
    launch = launch or Launch.of(groups * of_group)
    tokens = max(1, launch.columns // (groups * of_group))
    if num_tokens:
        _gate[_grid(launch, num_tokens, tokens, logits_TE.device)](
            logits_TE,
            logits_TE if bias_E is None else bias_E.contiguous(),
            expert_TK,
            weight_TK,
            count_E,
            num_tokens,
            rule.scale,
            E=num_experts,
            K=rule.top_k,
            SIGMOID=rule.function == "Sigmoid",
            OVER_CHOSEN=rule.over_chosen,
            RENORMALISE=rule.renormalise,
            HAS_BIAS=bias_E is not None,
            GROUPS=num_groups,
            GROUP_TOPK=rule.group_topk if rule.is_grouped else 1,
            GROUP_BEST=rule.group_best,
            B=tokens,
            G=groups,
            J=of_group,
            Q=triton.next_power_of_2(rule.top_k),
            num_warps=launch.num_warps,
        )
    return expert_TK, weight_TK, count_E


def gate_backward(
    grad_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    expert_TK: torch.Tensor,
    rule: GateRule,
    *,
    launch: Launch | None = None,
) -> torch.Tensor:
    """[T, E] gradient of the logits, in their type."""
    logits_TE = logits_TE.contiguous()
    num_tokens, num_experts = logits_TE.shape
    grad_logits_TE = torch.empty_like(logits_TE)
    columns = triton.next_power_of_2(num_experts)
    launch = launch or Launch.of(columns)
    tokens = max(1, launch.columns // columns)
    if num_tokens:
        _gate_backward[_grid(launch, num_tokens, tokens, logits_TE.device)](
            logits_TE,
            expert_TK.contiguous(),
            grad_TK.contiguous(),
            grad_logits_TE,
            num_tokens,
            rule.scale,
            E=num_experts,
            K=rule.top_k,
            SIGMOID=rule.function == "Sigmoid",
            OVER_CHOSEN=rule.over_chosen,
            RENORMALISE=rule.renormalise,
            B=tokens,
            C=columns,
            Q=triton.next_power_of_2(rule.top_k),
            num_warps=launch.num_warps,
        )
    return grad_logits_TE
