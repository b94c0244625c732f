"""The error by which a child ended, in one line, for its pod's own last line: `kubectl get` shows no other."""

from pathlib import Path

_MAX_CHARS = 400


def leave(path: Path, error: BaseException) -> None:
    """Told by the child that is about to end."""
    text = " ".join(str(error).split()) or "no reason given"
    path.write_text(f"{type(error).__name__}: {text}"[:_MAX_CHARS], encoding="utf-8")


def forget(path: Path) -> None:
    """Before another child starts."""
    path.unlink(missing_ok=True)


def told(path: Path) -> str:
    """To go behind `it ended`; empty when the child was killed from outside."""
    try:
        return f": {path.read_text(encoding='utf-8')}"
    except FileNotFoundError:
        return ""
