"""Copies of the store of Ray's head: what goes in comes out, and nothing else ever does."""

import asyncio
import json
import lzma
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from moe_runtime.coordinator import head_copies
from moe_runtime.coordinator.head_copies import HeadCopies
from moe_runtime.host import head_keeper, head_store
from moe_runtime.host.head_keeper import HeadKeeper
from moe_runtime.host.head_store import BadCopy, CopyLabel, CopyTooLarge, label_of, listing, newest, pack, unpack

FILES = {"session_name": b"session_1", "kv/CURRENT": b"MANIFEST-000005\n", "kv/000004.log": b"\0" * 1000}


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def copy_of(sequence: int, files: dict[str, bytes] = FILES) -> bytes:
    return pack(files, sequence=sequence)[1]


def forged(files: dict[str, int], content: bytes) -> bytes:
    """A copy whose digest holds though its label says something else than the content."""
    payload = lzma.compress(content)
    label = CopyLabel(sequence=1, digest=head_store._digest(1, files, payload), files=files)
    return label.canonical().encode() + b"\n" + payload


def test_a_store_comes_back_as_it_was(tmp_path: Path) -> None:
    source, target = write(tmp_path / "old"), tmp_path / "new"
    (source / "kv/LOG").write_text("chatter")
    (source / "kv/LOCK").touch()
    files = head_store.read_quiet(source, listing(source))
    assert files == FILES, "RocksDB's own log and lock stay behind"
    target.mkdir()
    head_store.restore(unpack(copy_of(1, files)), target)
    assert {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()} == FILES
    assert head_store.has_store(target)


def test_a_store_that_is_written_to_while_it_is_read_is_no_copy(tmp_path: Path) -> None:
    before = listing(write(tmp_path))
    with (tmp_path / "kv/000004.log").open("ab") as log:
        log.write(b"more")
    assert head_store.read_quiet(tmp_path, before) is None
    (tmp_path / "kv/000004.log").unlink()
    assert head_store.read_quiet(tmp_path, before) is None


def test_a_store_that_has_grown_too_large_is_refused_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_store, "MAX_STORE_BYTES", 1000)
    with pytest.raises(CopyTooLarge, match="1025 bytes, at most 1000"):
        head_store.read_quiet(tmp_path, listing(write(tmp_path)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda copy: copy[:-1],
        lambda copy: copy.replace(b'"sequence":1', b'"sequence":2'),
        lambda copy: copy.replace(b"CURRENT", b"CURRENS"),
        lambda copy: copy.partition(b"\n")[2],
        lambda copy: b"{}\n" + copy,
        lambda copy: b"",
    ],
)
def test_a_copy_that_was_changed_on_its_way_is_refused(spoil: object) -> None:
    assert callable(spoil)
    with pytest.raises(BadCopy):
        unpack(spoil(copy_of(1)))


@pytest.mark.parametrize(
    "name",
    ["../escaped", "/etc/passwd", "kv/../../escaped", "kv//x", ".hidden", "kv/.", "", "a\nb", "kv/", "a/b/c/d/e"],
)
def test_no_file_of_a_copy_lies_outside_of_its_folder(name: str) -> None:
    with pytest.raises(BadCopy, match="paths refused"):
        unpack(forged({name: 1}, b"x"))


def test_a_copy_unpacks_to_no_more_than_its_label_says_and_no_more_than_is_allowed() -> None:
    with pytest.raises(BadCopy, match="says 10 bytes"):
        unpack(forged({"x": 10}, b"\0" * (1 << 20)))
    with pytest.raises(BadCopy, match="says 10 bytes"):
        unpack(forged({"x": 10}, b"\0"))
    with pytest.raises(BadCopy, match="paths refused"):
        unpack(forged({"x": head_store.MAX_STORE_BYTES + 1}, b"\0"))
    with pytest.raises(BadCopy):
        unpack(forged({"x": -1, "y": 2}, b"\0"))


def test_the_newest_whole_copy_is_taken() -> None:
    old, new, broken = copy_of(3), copy_of(7, {"a/CURRENT": b"new"}), copy_of(9)[:-1]
    found = newest([new, broken, old])
    assert found is not None
    assert (found[0].sequence, found[1]) == (7, {"a/CURRENT": b"new"})
    assert newest([broken]) is None
    assert newest([]) is None


def test_a_label_is_json_that_a_person_can_read() -> None:
    label = json.loads(copy_of(5).partition(b"\n")[0])
    assert label["files"] == {name: len(content) for name, content in FILES.items()}
    assert label_of(copy_of(5)).sequence == 5


class Coordinator:
    """One coordinator's copies behind HTTP; `follow` gives the address of another one, as a Service does."""

    def __init__(self, folder: Path) -> None:
        self.copies = HeadCopies(folder)
        self.app = web.Application(client_max_size=2 * head_store.MAX_COPY_BYTES)
        self.copies.add_routes(self.app)
        self.server = TestServer(self.app)

    async def __aenter__(self) -> "Coordinator":
        await self.server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()

    def keeper(self, pod_uid: str) -> HeadKeeper:
        return HeadKeeper(str(self.server.make_url("")), token="t", pod_uid=pod_uid)


@pytest.fixture
async def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Coordinator]:
    monkeypatch.setattr(head_copies, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(head_keeper, "HOLD_S", 0.1)
    async with Coordinator(write(tmp_path / "first")) as coordinator:
        watching = asyncio.create_task(coordinator.copies.watch())
        yield coordinator
        watching.cancel()


async def holds(keeper: HeadKeeper, files: dict[str, bytes]) -> None:
    async with asyncio.timeout(5):
        while not keeper.copy or unpack(keeper.copy) != files:
            await asyncio.sleep(0.01)


async def test_keepers_get_every_new_copy_and_a_new_coordinator_takes_the_newest_back(
    first: Coordinator, tmp_path: Path
) -> None:
    late, early = first.keeper("late"), first.keeper("early")
    early.start()
    await holds(early, FILES)
    await asyncio.to_thread(early.close)
    grown = {**FILES, "kv/000004.log": b"\0" * 2000}
    write(tmp_path / "first", grown)
    late.start()
    await holds(late, grown)
    await asyncio.to_thread(late.close)
    assert label_of(late.copy).sequence > label_of(early.copy).sequence

    async with Coordinator(tmp_path / "second") as second:
        (tmp_path / "second").mkdir()
        keepers = [second.keeper("early"), second.keeper("late")]
        for keeper, old in zip(keepers, (early, late), strict=True):
            keeper.seal, keeper.copy = old.seal, old.copy
            keeper.start()
        assert await second.copies.recover(within_s=5, settle_s=0.5)
        for keeper in keepers:
            await asyncio.to_thread(keeper.close)
        assert listing(tmp_path / "second").keys() == grown.keys()
        assert (tmp_path / "second/kv/000004.log").read_bytes() == b"\0" * 2000


async def test_a_new_coordinator_to_which_nobody_comes_starts_afresh_after_its_bound(tmp_path: Path) -> None:
    async with Coordinator(tmp_path / "store") as coordinator:
        assert not await coordinator.copies.recover(within_s=0.2, settle_s=0)
    assert not (tmp_path / "store").exists()


async def test_a_new_coordinator_to_which_pods_come_empty_handed_does_not_wait_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_copies, "EMPTY_HANDED_S", 0.1)
    monkeypatch.setattr(head_keeper, "HOLD_S", 0.1)
    async with Coordinator(tmp_path / "store") as coordinator:
        empty = coordinator.keeper("p")
        empty.start()
        async with asyncio.timeout(5):
            assert not await coordinator.copies.recover(within_s=3600, settle_s=3600)
        await asyncio.to_thread(empty.close)


async def test_a_coordinator_that_has_its_store_asks_nobody(tmp_path: Path) -> None:
    assert await HeadCopies(write(tmp_path)).recover(within_s=0, settle_s=0)


async def test_a_copy_that_nobody_asked_for_is_refused(first: Coordinator) -> None:
    async with (
        ClientSession() as session,
        session.put(first.server.make_url("/v1/head-store"), data=copy_of(1)) as answer,
    ):
        assert answer.status == 409
