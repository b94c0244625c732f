"""The text a run reads and the yardstick counted on it."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.train.data import SKIPPED_FOLDERS, DataError, WindowOrder, is_held_out, load_corpus
from moe_runtime.train.evaluate import sample
from moe_runtime.train.order2 import _TUNING_BLOCK, DISCOUNTS, Order2Model

LENGTH = 17


def _text(text: str | bytes) -> np.ndarray:
    return np.frombuffer(text if isinstance(text, bytes) else text.encode(), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(60):
        path = tmp_path / f"part{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text number {number}\n" * 5)
    return tmp_path


def test_no_file_is_both_training_and_held_out(folder: Path) -> None:
    corpus = load_corpus(str(folder))
    assert not set(corpus.training_files) & set(corpus.heldout_files)
    assert len(corpus.training_files) + len(corpus.heldout_files) == 60


def test_the_split_follows_the_path_alone(folder: Path) -> None:
    corpus = load_corpus(str(folder))
    assert all(is_held_out(name) for name in corpus.heldout_files)
    assert not any(is_held_out(name) for name in corpus.training_files)


def test_another_file_moves_no_file_across_the_split(folder: Path) -> None:
    before = load_corpus(str(folder))
    load_corpus.cache_clear()
    (folder / "newcomer.txt").write_text("one more")
    after = load_corpus(str(folder))
    assert set(before.heldout_files) <= set(after.heldout_files)
    assert set(before.training_files) <= set(after.training_files)
    assert before.digest != after.digest


def test_the_standard_librarys_tests_are_left_out() -> None:
    corpus = load_corpus("stdlib")
    names = corpus.training_files + corpus.heldout_files
    assert len(names) > 300
    assert not [name for name in names if SKIPPED_FOLDERS & set(name.split("/")[:-1])]


def test_hidden_files_and_folders_are_no_text(folder: Path) -> None:
    before = load_corpus(str(folder))
    load_corpus.cache_clear()
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden as well")
    assert load_corpus(str(folder)).digest == before.digest


def test_files_with_a_nul_are_no_text(folder: Path) -> None:
    (folder / "binary.bin").write_bytes(b"a\0b")
    corpus = load_corpus(str(folder))
    assert "binary.bin" not in corpus.training_files + corpus.heldout_files


def test_text_without_a_held_out_file_is_refused_with_counts(tmp_path: Path) -> None:
    name = next(name for name in (f"f{i}" for i in itertools.count()) if not is_held_out(name))
    (tmp_path / name).write_text("only one")
    with pytest.raises(DataError, match="gave 1 and 0 of 1 files"):
        load_corpus(str(tmp_path))


def test_a_folder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        load_corpus(str(tmp_path / "nowhere"))


def test_windows_of_one_epoch_do_not_repeat() -> None:
    text = np.arange(1000, dtype=np.int64).astype(np.uint8)
    order = WindowOrder(text, length=LENGTH, seed=1)
    rows = order.take(0, count=order.windows_per_epoch)
    assert len({row.tobytes() for row in rows}) == order.windows_per_epoch


def test_ranks_read_what_one_rank_would_read() -> None:
    order = WindowOrder(_text("abcdefgh" * 100), length=LENGTH, seed=3)
    whole = order.take(40, count=12)
    parts = [WindowOrder(_text("abcdefgh" * 100), length=LENGTH, seed=3).take(40 + 4 * p, count=4) for p in range(3)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_order_depends_on_the_seed() -> None:
    text = _text(bytes(range(256)) * 8)
    assert not np.array_equal(
        WindowOrder(text, length=LENGTH, seed=0).take(0, count=8),
        WindowOrder(text, length=LENGTH, seed=1).take(0, count=8),
    )


def test_windows_go_on_in_the_next_epoch() -> None:
    order = WindowOrder(_text("abcdefgh" * 20), length=LENGTH, seed=0)
    rows = order.take(order.windows_per_epoch - 1, count=3)
    assert rows.shape == (3, LENGTH)


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="10 bytes"):
        WindowOrder(_text("0123456789"), length=LENGTH, seed=0)


# ---------------------------------------------------------------- order 2


def test_order2_probabilities_sum_to_one_in_seen_and_unseen_contexts() -> None:
    model = Order2Model.counted(_text("the cat sat on the mat"), discount2=0.4, discount1=0.6)
    every = np.arange(256)
    for context in (b"th", b"at", b"zt", b"\xff\xfe"):
        a, b = (np.full(256, value) for value in context)
        assert model.probability(a, b, every).sum() == pytest.approx(1.0, abs=1e-12)


def test_order2_equals_a_small_example_by_hand() -> None:
    # "ababac": triples aba, bab, aba, bac. Bytes counted from the third on: a 2, b 1, c 1.
    model = Order2Model.counted(_text("ababac"), discount2=0.5, discount1=0.5)
    p0 = (1 + 1) / (4 + 256)  # c
    p1 = (1 - 0.5) / 2 + 0.5 * 2 / 2 * p0  # after a: b once, c once
    p2 = (1 - 0.5) / 2 + 0.5 * 2 / 2 * p1  # after ba: b once, c once
    got = model.probability(np.array([ord("b")]), np.array([ord("a")]), np.array([ord("c")]))
    assert got[0] == pytest.approx(p2)


def test_order2_learns_text_that_two_bytes_decide() -> None:
    text = _text("abc" * 3000)
    assert Order2Model.fitted(text).bits_per_byte(text) < 0.01


def test_order2_takes_the_discounts_that_are_best_on_the_part_set_aside() -> None:
    text = np.random.default_rng(3).choice(np.frombuffer(b"abcd", dtype=np.uint8), 60_000, p=[0.6, 0.25, 0.1, 0.05])
    aside = np.arange(len(text)) // _TUNING_BLOCK % 10 == 9
    rest = {
        pair: Order2Model.counted(text[~aside], discount2=pair[0], discount1=pair[1]).bits_per_byte(text[aside])
        for pair in itertools.product(DISCOUNTS, DISCOUNTS)
    }
    model = Order2Model.fitted(text)
    assert rest[model.discount2, model.discount1] == pytest.approx(min(rest.values()), abs=1e-12)


def test_order2_scores_only_the_marked_bytes() -> None:
    model = Order2Model.counted(_text("abcabcabcabd"), discount2=0.5, discount1=0.5)
    text = _text("abcabd")
    last = np.array([False] * 5 + [True])
    assert model.bits_per_byte(text, scored_N=last) > model.bits_per_byte(text, scored_N=~last)


def test_no_held_out_byte_is_scored_twice() -> None:
    chosen = sample(_text(b"x" * 5000), length=64, num_bytes=100_000)
    assert int(chosen.mask(5000).sum()) == chosen.num_bytes
    assert chosen.num_bytes <= 5000


def test_scored_bytes_are_the_ones_the_mask_names() -> None:
    text = _text(bytes(i % 251 for i in range(2000)))
    chosen = sample(text, length=32, num_bytes=320)
    predicted = chosen.windows(text)[:, -chosen.scored :].reshape(-1)
    assert np.array_equal(predicted, text[chosen.mask(len(text))].astype(np.int64))
