"""Serving, as the step loop drives it: scheduler, model, sampling, desk."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import RuntimeConfig
from moe_core.outcome import InvalidInput
from moe_runtime.engine.cache import StepCache
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.engine.sampling import NoNumbers, sample
from moe_runtime.engine.scheduler import Chunk, Overloaded, Scheduler, TooLong
from moe_runtime.errors import GroupFault
from moe_runtime.membership.group import EpochGroup
from moe_runtime.rank.desk import Desk
from moe_runtime.rank.work import LOOK_EVERY_STEPS, WorkReport, loading, looked_at


class ServeWork:
    """Continuous batching on one rank. The desk is shared with the actor's side, everything else is the loop's."""

    def __init__(self, config: RuntimeConfig, *, rank: int, desk: Desk) -> None:
        if config.serving is None:
            raise ValueError(f"mode {config.mode} has no serving configuration")
        self._config, self._serving, self._rank, self._desk = config, config.serving, rank, desk
        self.report = WorkReport()
        self.epm: ExpertParallelModel | None = None
        self._cache: StepCache | None = None
        self._scheduler = self._new_scheduler()
        self._chunks: tuple[Chunk, ...] = ()
        self._steps = 0
        self._looked_at_step = 0
        self._had_work = False

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(max_sequences=self._serving.max_sequences, max_context=self._serving.max_context)

    def load(self, expert_map: ExpertMap) -> None:
        with loading(self._config.model.path or "the configured shape"):
            self.epm = ExpertParallelModel.load(
                self._config.model,
                expert_map=expert_map,
                rank=self._rank,
                device=self._config.device,
                fallback=self._serving.fallback,
                dispatch=self._config.dispatch,
                locality=self._serving.locality,
            )
            self.epm.module.eval()
            rows, length = self._serving.max_sequences, self._serving.max_context
            self._cache = self.epm.new_cache(num_rows=rows, max_length=length)
            self.epm.slot_digests()  # now, not when the others wait for them

    def _parts(self) -> tuple[ExpertParallelModel, StepCache]:
        assert self.epm is not None and self._cache is not None, "load comes first"
        return self.epm, self._cache

    def enter(self, group: EpochGroup, epoch: int) -> None:  # noqa: ARG002 - training exchanges through it
        self._desk.epoch = epoch
        self._desk.open()

    def prepare(self) -> int:
        _, cache = self._parts()
        new, cancelled = self._desk.take()
        for request_id in cancelled:
            row = self._scheduler.cancel(request_id)
            if row is not None:
                cache.free(row)
        for request in new:
            try:
                self._scheduler.submit(request)
            except Overloaded as error:
                self._desk.end(request.request_id, "overloaded", str(error))
            except TooLong as error:
                self._desk.end(request.request_id, "too_long", str(error))
        self._chunks = self._scheduler.plan()
        return sum(len(chunk.token_ids) for chunk in self._chunks)

    def run(self, tokens_of_rank: Sequence[int]) -> None:
        epm, cache = self._parts()
        self._had_work = any(tokens_of_rank)
        if not self._had_work:
            if self._looked_at_step < self._steps:  # what is told at rest is what was served
                self.report = looked_at(epm, self.report)
                self._looked_at_step = self._steps
            return
        chunks = self._chunks
        if chunks:
            ids_BQ, positions_BQ = _batch(chunks, device=self._config.device)
            rows_B = [chunk.row for chunk in chunks]
            try:
                logits_BV = epm.forward_tokens(ids_BQ, positions_BQ, rows_B, cache, tokens_of_rank=tokens_of_rank)
            except InvalidInput as error:
                self._refuse(chunks, str(error), cache)
                # the others wait in the middle of this step: they are told, and all go on without these requests
                raise GroupFault(f"refused {len(chunks)} requests: {error}") from error
        else:
            logits_BV = epm.forward_tokens(None, None, (), cache, tokens_of_rank=tokens_of_rank)
        before = epm.degraded_tokens()
        is_degraded_B = list(epm.degraded_rows)
        epm.commit()
        after = epm.degraded_tokens()
        self._chunks = ()
        if chunks:
            reasons = [reason for reason, count in after.items() if count > before.get(reason, 0)]
            self._publish(chunks, logits_BV, is_degraded_B, reasons, cache)
        self._note(sum(len(chunk.token_ids) for chunk in chunks), after)

    def _publish(
        self,
        chunks: Sequence[Chunk],
        logits_BV: torch.Tensor,
        is_degraded_B: Sequence[bool],
        reasons: Sequence[str],
        cache: StepCache,
    ) -> None:
        refused = {
            chunk.request_id: "an expert this answer needs has no live copy (fallback: Refuse)"
            for chunk, is_degraded in zip(chunks, is_degraded_B, strict=True)
            if is_degraded and self._serving.fallback == "Refuse"
        }
        sampled: list[int | None] = []
        for chunk, logits_V in zip(chunks, logits_BV, strict=True):
            try:
                sampled.append(self._sample(chunk, logits_V) if chunk.samples else None)
            except NoNumbers as error:
                refused.setdefault(chunk.request_id, f"the model gives no token: {error}")
                sampled.append(0)  # of a request that ends here: nobody reads it
        progress, freed = self._scheduler.commit(chunks, sampled)
        degraded = {
            chunk.request_id: tuple(reasons)
            for chunk, is_degraded in zip(chunks, is_degraded_B, strict=True)
            if is_degraded
        }
        for request_id, why in refused.items():
            self._desk.end(request_id, "refused", why)
            row = self._scheduler.cancel(request_id)
            freed += [] if row is None else [row]
        self._desk.publish([p for p in progress if p.request_id not in refused], degraded)
        for row in freed:
            cache.free(row)

    def _refuse(self, chunks: Sequence[Chunk], why: str, cache: StepCache) -> None:
        """What a user's own router cannot route would end one rank after the other, were it replayed."""
        for chunk in chunks:
            self._desk.end(chunk.request_id, "refused", why)
            row = self._scheduler.cancel(chunk.request_id)
            if row is not None:
                cache.free(row)
        self._chunks = ()

    def _sample(self, chunk: Chunk, logits_V: torch.Tensor) -> int:
        request = self._scheduler.request(chunk.request_id)
        return sample(
            logits_V,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            position=chunk.first_position + len(chunk.token_ids),
        )

    def _note(self, tokens: int, degraded: dict[str, int]) -> None:
        epm, _ = self._parts()
        self._steps += 1
        report = replace(self.report, tokens=self.report.tokens + tokens, degraded_tokens=degraded)
        if self._steps % LOOK_EVERY_STEPS == 1:
            report, self._looked_at_step = looked_at(epm, report), self._steps
        self.report = report

    def rollback(self) -> None:
        if self.epm is not None:
            self.epm.rollback()

    def leave(self, why: str) -> None:
        """Every request goes back to its gateway, which replays it on another rank."""
        self._desk.hand_back(why)
        if self.epm is not None:
            self.epm.rollback()
        if self._cache is not None:
            for row in range(self._serving.max_sequences):
                self._cache.free(row)
        self._scheduler = self._new_scheduler()
        self._chunks = ()

    def idle(self, seconds: float) -> None:
        if not self._had_work:
            self._desk.work.wait(seconds)


def _batch(chunks: Sequence[Chunk], *, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions [B, Q], padded on the right; position -1 marks padding."""
    width = max(len(chunk.token_ids) for chunk in chunks)
    ids_BQ = torch.zeros(len(chunks), width, dtype=torch.long)
    positions_BQ = torch.full((len(chunks), width), -1, dtype=torch.long)
    for i, chunk in enumerate(chunks):
        count = len(chunk.token_ids)
        ids_BQ[i, :count] = torch.tensor(chunk.token_ids)
        positions_BQ[i, :count] = torch.arange(chunk.first_position, chunk.first_position + count)
    return ids_BQ.to(device), positions_BQ.to(device)
