"""A checkpoint's own tokenizer, in pieces: what a stream gives is what the whole answer would be."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from moe_runtime.gateway.tokenizer import CheckpointTokenizer, TokenizerMissing, load_tokenizer

TEXT = "to be, or not to be: naïve 中文 🦜 end"


def of_bytes() -> Tokenizer:
    """As in GPT-2 and its heirs; every byte is a token, so characters fall apart."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def of_words() -> Tokenizer:
    """As in sentencepiece: the first word of whatever is decoded loses its space."""
    words = {f"\N{LOWER ONE EIGHTH BLOCK}{word}" for word in TEXT.split()}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(sorted(words))}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> CheckpointTokenizer:
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id("<end>")}))
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, CheckpointTokenizer)
    return loaded


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("kind", [of_bytes, of_words])
def test_pieces_add_up_to_the_whole_answer(kind: Callable[[], Tokenizer], size: int, tmp_path: Path) -> None:
    tokenizer = saved(kind(), tmp_path)
    (end,) = tokenizer.end_token_ids
    token_ids = (end, *tokenizer.encode(TEXT), end)
    stream = tokenizer.stream()
    pieces = [stream.push(token_ids[i : i + size]) for i in range(0, len(token_ids), size)] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(token_ids) == TEXT
    assert len([piece for piece in pieces if piece]) > 1


def test_a_long_answer_is_not_decoded_again_with_each_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = saved(of_bytes(), tmp_path)
    decoded: list[int] = []
    decode = tokenizer.decode

    def counted(token_ids: Sequence[int]) -> str:
        decoded.append(len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    stream = tokenizer.stream()
    for token_id in tokenizer.encode("a" * 200):
        stream.push((token_id,))
    assert max(decoded) == 2


def test_a_checkpoint_without_a_tokenizer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerMissing, match="save the tokenizer beside the weights"):
        load_tokenizer(tmp_path)
