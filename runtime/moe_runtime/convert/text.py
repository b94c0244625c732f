"""Windows of held-in text as a checkpoint's tokens: what is held out of training is held out here too."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_core.outcome import InvalidInput
from moe_runtime.train.checkpoint import read_summary
from moe_runtime.train.data import Ids_BQ, WindowOrder, load_corpus

BYTES_PER_TOKEN = 8
"""Text that is read for one token of a tokenizer's: more than any language takes."""


def heldin_windows(checkpoint: Path, data: str, *, count: int, length: int) -> torch.Tensor:
    """[count, length] token ids, from all over the text. Raises DataError, InvalidInput, OSError."""
    corpus = load_corpus(data)
    summary = read_summary(checkpoint)
    if summary is not None and summary.tokenizer == "bytes":
        return torch.from_numpy(WindowOrder(corpus.training_N, length=length, seed=0).take(0, count=count))
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        raise InvalidInput(f"{checkpoint} holds no tokenizer.json, nor a moerator.json that says bytes")
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(file))
    order = WindowOrder(corpus.training_N, length=length * BYTES_PER_TOKEN, seed=0)
    rows: list[Ids_BQ] = []
    for row in order.take(0, count=count):
        ids = tokenizer.encode(bytes(row.astype(np.uint8)).decode(errors="ignore"), add_special_tokens=False).ids
        if len(ids) >= length:
            rows.append(np.array(ids[:length], dtype=np.int64))
    if not rows:
        raise InvalidInput(f"no {length * BYTES_PER_TOKEN} bytes of {data} make {length} tokens of {file}")
    return torch.from_numpy(np.stack(rows))
