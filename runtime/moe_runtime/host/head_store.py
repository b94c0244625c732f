"""Copies of the store of Ray's head, as one string of bytes each.

The head keeps nodes, actors and jobs in RocksDB folders, and without them a new head is a stranger to every node of the
cluster. These folders lie in the coordinator's pod and go with it, so whoever has a Ray node keeps a copy of them.

A copy is a line of JSON (`CopyLabel`) and the files' bytes, one after the other, compressed. Not an archive format: a
checked label of names and sizes leaves no link, no device and no mode that a copy could smuggle in.
"""

import lzma
import re
import shutil
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from pydantic import Field

from moe_core.contract.base import WireModel
from moe_core.outcome import InvalidInput

MAX_STORE_BYTES = 256 << 20
"""Unpacked. Seen: 0.2 MB for four nodes, of which 0.1 MB are RocksDB's settings."""
MAX_COPY_BYTES = 8 << 20
"""Compressed, as it travels. Seen: 19 KB for four nodes."""
_MAX_LABEL_BYTES = 1 << 20
_MAX_FILES = 4096
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_PATH = re.compile(rf"{_PART}(/{_PART}){{0,3}}")
_OWN_LOGS = ("LOG", "LOCK")
"""RocksDB's own log and lock: of no use to a new head."""

Listing = Mapping[str, tuple[int, int, int]]
"""Relative path -> size, time of change, inode: equal before and after reading means nothing was written meanwhile."""


class CopyTooLarge(RuntimeError):
    """The store has outgrown what is copied; the message says both sizes."""


class BadCopy(RuntimeError):
    """Bytes that are no copy, or no longer what they were."""


class CopyLabel(WireModel):
    sequence: int = Field(ge=0)
    """Rises with every copy; over every coordinator of a group."""
    digest: str
    """Of the sequence, the files' names and sizes, and the compressed bytes."""
    files: dict[str, int]
    """Relative path -> size. Their bytes follow in the order of the paths."""

    @property
    def seal(self) -> str:
        return f"{self.sequence}-{self.digest}"


def listing(folder: Path) -> Listing:
    """The store's files as they are now; empty while there is no store."""
    found: dict[str, tuple[int, int, int]] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(_OWN_LOGS):
            continue
        try:
            stat = path.lstat()
        except FileNotFoundError:  # replaced between two looks: the next listing will differ
            continue
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def has_store(folder: Path) -> bool:
    """Whether a head has ever opened a store here."""
    return any(folder.glob("**/CURRENT"))


def read_quiet(folder: Path, before: Listing) -> dict[str, bytes] | None:
    """The content of every file, None if anything was written since `before`. Raises CopyTooLarge.

    RocksDB only ever appends to its logs, and replaces `CURRENT`: between two equal listings the files belong together.
    """
    size = sum(entry[0] for entry in before.values())
    if size > MAX_STORE_BYTES:
        raise CopyTooLarge(f"the store of Ray's head has {size} bytes, at most {MAX_STORE_BYTES} are copied")
    try:
        files = {name: (folder / name).read_bytes() for name in before}
    except FileNotFoundError:
        return None
    return files if listing(folder) == before else None


def pack(files: Mapping[str, bytes], *, sequence: int) -> tuple[CopyLabel, bytes]:
    """Raises CopyTooLarge."""
    ordered = dict(sorted(files.items()))
    payload = lzma.compress(b"".join(ordered.values()), preset=1)
    if len(payload) > MAX_COPY_BYTES:
        raise CopyTooLarge(f"a copy of the head's store has {len(payload)} bytes, at most {MAX_COPY_BYTES} are kept")
    sizes = {name: len(content) for name, content in ordered.items()}
    label = CopyLabel(sequence=sequence, digest=_digest(sequence, sizes, payload), files=sizes)
    return label, label.canonical().encode() + b"\n" + payload


def label_of(copy: bytes) -> CopyLabel:
    """The label of bytes that came from outside, checked against them. Raises BadCopy."""
    if len(copy) > MAX_COPY_BYTES + _MAX_LABEL_BYTES:
        raise BadCopy(f"{len(copy)} bytes are more than a copy has")
    head, newline, payload = copy.partition(b"\n")
    if not newline or len(head) > _MAX_LABEL_BYTES:
        raise BadCopy("there is no label")
    try:
        label = CopyLabel.parse(head)
    except InvalidInput as error:
        raise BadCopy(f"the label cannot be read: {error}") from error
    if label.digest != _digest(label.sequence, label.files, payload):
        raise BadCopy(f"copy {label.sequence}: the digest does not hold")
    return label


def unpack(copy: bytes) -> dict[str, bytes]:
    """The files of a copy. Raises BadCopy; never gives a path outside of its folder, nor more bytes than the label."""
    label = label_of(copy)
    wrong = [name for name in label.files if not _PATH.fullmatch(name)]
    size = sum(label.files.values())
    if wrong or len(label.files) > _MAX_FILES or min(label.files.values(), default=0) < 0 or size > MAX_STORE_BYTES:
        raise BadCopy(f"copy {label.sequence}: {len(label.files)} files, {size} bytes, paths refused: {wrong[:3]}")
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=256 << 20)
    try:
        content = decompressor.decompress(copy.partition(b"\n")[2], max_length=size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise BadCopy(f"copy {label.sequence}: {error}") from error
    if len(content) != size:
        raise BadCopy(f"copy {label.sequence}: its label says {size} bytes, there are others")
    files: dict[str, bytes] = {}
    at = 0
    for name, length in sorted(label.files.items()):
        files[name] = content[at : at + length]
        at += length
    return files


def newest(copies: Iterable[bytes]) -> tuple[CopyLabel, dict[str, bytes]] | None:
    """Of all copies that are whole the one with the highest sequence; None when there is none."""
    found: tuple[CopyLabel, dict[str, bytes]] | None = None
    for copy in copies:
        try:
            label, files = label_of(copy), unpack(copy)
        except BadCopy as error:
            print(f"a copy of the head's store is refused: {error}", flush=True)
            continue
        if found is None or (label.sequence, label.digest) > (found[0].sequence, found[0].digest):
            found = label, files
    return found


def restore(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a store where there is none, all or nothing: a pod that dies here leaves no half of one."""
    assert not has_store(folder), f"{folder} holds a store already"
    fresh = folder.with_name(f"{folder.name}.restoring")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, content in files.items():
        (fresh / name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        (fresh / name).write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def _digest(sequence: int, sizes: Mapping[str, int], payload: bytes) -> str:
    names = "\n".join(f"{name} {size}" for name, size in sorted(sizes.items()))
    return sha256(f"{sequence}\n{names}\n\n".encode() + payload).hexdigest()
