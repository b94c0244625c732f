"""The single-process transformers models that the numerics tests compare with, computed once per session."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import numerics_tasks as tasks


@dataclass(frozen=True)
class Generated:
    """One prompt's greedy continuation: tokens [n], logits [n][V]."""

    tokens: list[int]
    logits: list[np.ndarray]


@dataclass
class Reference:
    family: str
    folder: Path
    model: torch.nn.Module
    _generated: list[list[Generated]] = field(default_factory=list)

    @classmethod
    def make(cls, family: str, folder: Path) -> "Reference":
        model = tasks.reference_model(family)
        model.save_pretrained(folder)  # type: ignore[operator]
        return cls(family, folder, model)

    def logits_and_gradients(self, world: int) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
        """Each rank's logits, and the gradients summed over all ranks' batches."""
        self.model.zero_grad()
        logits: list[np.ndarray] = []
        for rank in range(world):
            output = self.model(input_ids=tasks.batch_of_rank(rank, world)).logits
            (output * tasks.probe_of(output)).sum().backward()
            logits.append(output.detach().numpy())
        zero = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.model.named_parameters()}
        return logits, zero

    def generated(self) -> list[list[Generated]]:
        """[rank][prompt]: transformers' own generate, one prompt at a time."""
        if not self._generated:
            self._generated = [
                [self._generate(prompt) for prompt in tasks.prompts_of_rank(rank)]
                for rank in range(len(tasks.PROMPT_LENGTHS))
            ]
        return self._generated

    def forced(self) -> list[list[list[int]]]:
        return [[prompt.tokens for prompt in of_rank] for of_rank in self.generated()]

    def _generate(self, prompt: torch.Tensor) -> Generated:
        output = self.model.generate(  # type: ignore[operator]
            prompt.unsqueeze(0),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tasks.NEW_TOKENS,
            min_new_tokens=tasks.NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
        return Generated(tokens, [step[0].numpy() for step in output.logits])
