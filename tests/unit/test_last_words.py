"""What a child leaves behind for its pod's last line."""

from pathlib import Path

from moe_runtime.host import last_words


def test_an_error_is_left_in_one_line_with_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "rank.log.last-words"
    last_words.leave(file, OSError("no space left\n  on device"))
    assert last_words.told(file) == ": OSError: no space left on device"


def test_a_child_that_was_killed_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "rank.log.last-words"
    last_words.leave(file, ValueError("of the one before"))
    last_words.forget(file)
    last_words.forget(file)
    assert last_words.told(file) == ""
