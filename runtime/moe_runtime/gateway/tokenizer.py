"""Text to token ids and back, without torch: bytes, or the checkpoint's own tokenizer."""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class TextStream(Protocol):
    """Turns the tokens of one answer into text as they come; never gives out half a character."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is certain now."""

    def finish(self) -> str:
        """What was held back."""


class Tokenizer(Protocol):
    vocabulary_size: int | None
    end_token_ids: frozenset[int]

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text."""

    def stream(self) -> TextStream:
        """A new decoder for one answer."""


class TokenizerMissing(RuntimeError):
    """The checkpoint has no tokenizer that can be used."""


class ByteTokenizer:
    """UTF-8 bytes are the tokens. Ids past 255 (a model's padding of its vocabulary) decode to the replacement sign."""

    def __init__(self, end_token_ids: frozenset[int] = frozenset()) -> None:
        self.vocabulary_size: int | None = 256
        self.end_token_ids = end_token_ids

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def stream(self) -> TextStream:
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        # 0xFF never occurs in UTF-8, so an id that is no byte shows as a replacement sign.
        return self._decoder.decode(bytes(i if i < 256 else 0xFF for i in token_ids))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class CheckpointTokenizer:
    """The checkpoint's tokenizer.json by the `tokenizers` library: transformers would bring torch along."""

    def __init__(self, path: Path, end_token_ids: frozenset[int]) -> None:
        from tokenizers import Tokenizer as Fast

        self._fast: Any = Fast.from_file(str(path))
        self.vocabulary_size: int | None = int(self._fast.get_vocab_size())
        self.end_token_ids = end_token_ids

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._fast.encode(text).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._fast.decode(list(token_ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        return _CheckpointStream(self)


class _CheckpointStream:
    """Decodes only the newest tokens, behind those that were given out last: what a token looks like may depend on the
    one before it (a leading space), not on the whole answer. Holds back an unfinished character."""

    def __init__(self, tokenizer: CheckpointTokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        """From the piece given out last on."""
        self._given = 0
        """Tokens of that piece."""

    def push(self, token_ids: Sequence[int]) -> str:
        self._token_ids += token_ids
        fresh = self._fresh()
        if not fresh or fresh.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        del self._token_ids[: self._given]
        self._given = len(self._token_ids)
        return fresh

    def finish(self) -> str:
        return self._fresh()

    def _fresh(self) -> str:
        before = self._tokenizer.decode(self._token_ids[: self._given])
        return self._tokenizer.decode(self._token_ids)[len(before) :]


def load_tokenizer(checkpoint: Path | None) -> Tokenizer:
    """`moerator.json` {"tokenizer": "bytes"} or no checkpoint: bytes; else tokenizer.json. Raises TokenizerMissing."""
    if checkpoint is None:
        return ByteTokenizer()
    ours = _read_json(checkpoint / "moerator.json")
    ends = _end_token_ids(checkpoint)
    if ours.get("tokenizer") == "bytes":
        return ByteTokenizer()
    fast = checkpoint / "tokenizer.json"
    if not fast.is_file():
        raise TokenizerMissing(
            f"{checkpoint} holds neither tokenizer.json nor a moerator.json with {{'tokenizer': 'bytes'}}; "
            "save the tokenizer beside the weights (AutoTokenizer.save_pretrained writes tokenizer.json)"
        )
    return CheckpointTokenizer(fast, ends)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(value, dict):
        raise TokenizerMissing(f"{path} must hold a JSON object")
    return value


def _end_token_ids(checkpoint: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        value = _read_json(checkpoint / name).get("eos_token_id")
        if isinstance(value, int):
            return frozenset({value})
        if isinstance(value, list):
            return frozenset(int(v) for v in value)
    return frozenset()
