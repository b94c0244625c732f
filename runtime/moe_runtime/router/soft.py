"""Soft MoE (Puigcerver 2023, 2308.00951): experts get mixtures of a sequence's tokens instead of tokens.

Every expert has `rows` mixtures per sequence. With logits = x phi, a mixture's weights are a softmax over the
sequence's tokens, and a token's output is a softmax over all mixtures of the experts' results. All of it is
differentiable, nothing is dropped, load is even. Normalised (their eq. 4, for wide models): x and the columns of phi
have length 1, phi a learned scale.

A mixture holds later tokens. Where tokens do not compete, every token is a sequence of its own: then every mixture is
the token itself, and it takes every expert with the sum of its mixtures' weights: exact, and as dear as a dense model.
"""

import torch

from moe_runtime.router.face import Moment, SoftRows, Tokens
from moe_runtime.router.noise import seeded
from moe_runtime.router.picks import Kind, Picks


class SoftMoE(Kind):
    looks_ahead = True

    def __init__(self, *, num_experts: int, dim: int, rows: int, normalised: bool, layer_idx: int, seed: int) -> None:
        super().__init__()
        self.num_experts, self.rows, self.normalised = num_experts, rows, normalised
        drawn_DP = torch.randn(dim, num_experts * rows, generator=seeded(seed, layer_idx))
        self.phi_DP = torch.nn.Parameter(drawn_DP / dim**0.5)
        self.scale = torch.nn.Parameter(torch.ones(())) if normalised else None

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        x_TD = tokens.x_TD.to(torch.promote_types(tokens.x_TD.dtype, torch.float32))
        phi_DP = self.phi_DP.to(x_TD.dtype)
        if self.scale is not None:
            x_TD = torch.nn.functional.normalize(x_TD, dim=1)
            phi_DP = self.scale.to(x_TD.dtype) * torch.nn.functional.normalize(phi_DP, dim=0)
        logits_TP = x_TD @ phi_DP
        share_TP = logits_TP.softmax(dim=1)
        num_tokens = x_TD.shape[0]
        if not moment.looks_at_batch:
            weight_TE = share_TP.view(num_tokens, self.num_experts, self.rows).sum(dim=-1)
            every_TE = torch.arange(self.num_experts, device=x_TD.device).expand(num_tokens, -1)
            return Picks(every_TE, weight_TE.detach(), lambda expert_TK: weight_TE.gather(1, expert_TK))
        nobody_T0 = torch.empty(num_tokens, 0, dtype=torch.int64, device=x_TD.device)
        return Picks(
            expert_TK=nobody_T0,
            score_TE=logits_TP.new_zeros(num_tokens, self.num_experts),
            weigh=lambda expert_TK: logits_TP.new_zeros(expert_TK.shape),
            soft=self._mix(logits_TP, share_TP, tokens.sequence_T),
        )

    def _mix(self, logits_TP: torch.Tensor, share_TP: torch.Tensor, sequence_T: torch.Tensor | None) -> SoftRows:
        """Rows ordered by expert, then sequence: a token mixes with those of its own sequence only."""
        if sequence_T is None or sequence_T.numel() == 0:
            return SoftRows(mix_TP=logits_TP.softmax(dim=0), share_TP=share_TP)
        num_tokens, num_sequences = logits_TP.shape[0], int(sequence_T.max()) + 1  # device sync: sizes the rows
        own_TS = sequence_T[:, None] == torch.arange(num_sequences, device=sequence_T.device)
        own_TESR = own_TS.view(num_tokens, 1, num_sequences, 1)
        shape = (num_tokens, self.num_experts, num_sequences, self.rows)
        # a sequence without tokens has rows of nothing: its softmax over no token must not be NaN
        others = logits_TP.new_tensor(float("-inf")).where(own_TS.any(dim=0), logits_TP.new_tensor(0.0))
        logits_TESR = logits_TP.view(num_tokens, self.num_experts, 1, self.rows)
        mix_TESR = torch.where(own_TESR, logits_TESR, others.view(1, 1, -1, 1)).softmax(dim=0) * own_TESR
        share_TESR = share_TP.view(num_tokens, self.num_experts, 1, self.rows) * own_TESR
        return SoftRows(mix_TESR.expand(shape).flatten(1), share_TESR.flatten(1))
