"""Text to train on: which files, which of them are held out, and which bytes a step reads.

Tokens are bytes. Files are joined with one NUL (it does not occur in text and marks where a file starts). A file is
held out when the hash of its relative path says so: the split needs no list, is the same on every rank, and does not
change when files come or go. Test folders of the standard library are left out: many distributions ship without them.

Window order is a pure function of (seed, cursor), where the cursor counts windows taken by all ranks so far: a restored
run reads exactly what the lost steps would have read, also with another number of ranks.

Shapes: N bytes, B windows, Q sequence length.
"""

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moe_core.contract.router import RouterConfig
from moe_runtime.experts.routed import RouterRequest

Bytes_N = npt.NDArray[np.uint8]
Ids_BQ = npt.NDArray[np.int64]

STDLIB = "stdlib"
SEPARATOR = 0
HELDOUT_SHARE = 10
"""One file of so many is held out."""
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
)


class DataError(ValueError):
    """The text named in the configuration cannot be used; the message says what was found there."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text, each one array of bytes that starts with a separator."""

    training_N: Bytes_N
    heldout_N: Bytes_N
    training_files: tuple[str, ...]
    heldout_files: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Names the text, so that a snapshot is only continued on the text it was trained on."""
        sha = hashlib.sha256(self.training_N.tobytes())
        sha.update(self.heldout_N.tobytes())
        return sha.hexdigest()[:16]


def is_held_out(relative_path: str) -> bool:
    """Whether the file belongs to the held-out part.

    >>> is_held_out("argparse.py") == is_held_out("argparse.py")
    True
    """
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % HELDOUT_SHARE == 0


def text_files(root: Path, *, suffix: str = "", skip: frozenset[str] = frozenset()) -> list[str]:
    """Files under `root` by their relative paths, in order; hidden ones and folders named in `skip` are left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        # Not gone into at all: beside the standard library's files lie ten times as many of installed packages.
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted(path.relative_to(root).as_posix() for path in found if path.is_file())


@lru_cache(maxsize=4)
def load_corpus(data: str) -> Corpus:
    """The text that `TrainingConfig.data` names: `stdlib` or a folder. Raises DataError when either part is empty."""
    if data == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = text_files(root, suffix=".py", skip=SKIPPED_FOLDERS)
    else:
        root = Path(data)
        if not root.is_dir():
            raise DataError(f"training.data.path must be a folder of text files: {data!r} is none")
        found = text_files(root)
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    names: dict[bool, list[str]] = {True: [], False: []}
    for name in found:
        text = (root / name).read_bytes()
        if not text or SEPARATOR in text:  # empty or not text
            continue
        held_out = is_held_out(name)
        parts[held_out].append(bytes([SEPARATOR]) + text)
        names[held_out].append(name)
    if not parts[True] or not parts[False]:
        raise DataError(
            f"text needs at least one training and one held-out file: {root} gave {len(names[False])} and "
            f"{len(names[True])} of {len(found)} files (one file of {HELDOUT_SHARE} is held out, by hash of its path)"
        )
    training_N, heldout_N = (np.frombuffer(b"".join(parts[part]), dtype=np.uint8) for part in (False, True))
    return Corpus(training_N, heldout_N, tuple(names[False]), tuple(names[True]))


def asked_router(config: RouterConfig, corpus: Corpus) -> RouterRequest:
    """The router for a model that is trained on this text."""
    counts_V = np.bincount(corpus.training_N, minlength=256)
    return RouterRequest(config, torch.from_numpy(counts_V))


class WindowOrder:
    """Windows of the training text without repetition within an epoch, in an order that (seed, epoch) fixes.

    Every epoch cuts the text at another offset, so that no byte is always the first of its window.
    """

    def __init__(self, training_N: Bytes_N, *, length: int, seed: int) -> None:
        """`length` counts input and target: sequence length plus one."""
        self._text_N = training_N
        self._length = length
        self._seed = seed
        self.windows_per_epoch = (len(training_N) - length) // length
        if self.windows_per_epoch < 1:
            raise DataError(f"training text of {len(training_N)} bytes is shorter than two windows of {length}")
        self._epoch = -1
        self._starts_W: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def _starts_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.PCG64((self._seed, epoch)))
            offset = int(rng.integers(self._length))
            self._starts_W = offset + self._length * rng.permutation(self.windows_per_epoch)
            self._epoch = epoch
        return self._starts_W

    def take(self, cursor: int, *, count: int) -> Ids_BQ:
        """[count][length] bytes of the windows number cursor .. cursor + count - 1."""
        rows = []
        for number in range(cursor, cursor + count):
            epoch, idx = divmod(number, self.windows_per_epoch)
            start = int(self._starts_of(epoch)[idx])
            rows.append(self._text_N[start : start + self._length])
        return np.stack(rows).astype(np.int64)
