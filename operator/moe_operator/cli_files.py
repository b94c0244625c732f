"""Files of resources from the command line: read, check, and say what is wrong with each."""

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from moe_core.outcome import InvalidSpec
from moe_core.spec.load import Document, read_documents

EXIT_NOT_AS_WISHED, EXIT_INVALID, EXIT_MISSING = 1, 2, 3


def read_files(names: Sequence[str]) -> list[Document]:
    """Every document of every file. Prints all problems of all files and exits with 2 if there are any."""
    documents: list[Document] = []
    failed = False
    for name in names:
        try:
            documents += read_documents(_text_of(name))
        except InvalidSpec as invalid:
            failed = True
            for problem in invalid.problems:
                typer.echo(f"{name}: {problem}", err=True)
        except (OSError, UnicodeDecodeError) as error:
            failed = True
            reason = error.strerror if isinstance(error, OSError) else "this is not UTF-8 text"
            typer.echo(f"{name}: cannot be read: {reason}", err=True)
    if failed:
        raise typer.Exit(EXIT_INVALID)
    return documents


def validate_files(names: Sequence[str]) -> int:
    for document in read_files(names):
        typer.echo(f"{document.kind}/{document.name} is valid")
    return 0


def _text_of(name: str) -> str:
    return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
