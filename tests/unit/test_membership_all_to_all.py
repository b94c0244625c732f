"""What becomes of an all-to-all when some members are near each other: threads stand in for ranks and their backend."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_group import MemoryGroup, together
from moe_runtime.membership import near_memory
from moe_runtime.membership.all_to_all import AllToAll, Far, Heard
from moe_runtime.membership.near_memory import NearMemory
from moe_runtime.membership.near_words import NearWords, Word

LARGE = 5000
"""Rows of four floats: more than a page."""
WAIT_S = 10.0


class Member:
    """One rank: real memory files and pipes; what goes to the backend goes through the group of threads."""

    def __init__(self, group: MemoryGroup) -> None:
        self.group, ranks = group, [10 + p for p in range(group.size)]
        self.near = NearMemory.meet(group.all_gather_ints, ranks=ranks, position=group.position)
        self.exchanges = AllToAll(position=group.position, near=self.near)
        self.far_bytes = 0

    def begin(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> Callable[[], torch.Tensor]:
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        exchange = self.exchanges.begin(out, rows, receive, send)
        if (far := exchange.far) is not None:
            self.far_bytes += far.sent.nbytes
            far.received.view(-1).view(torch.uint8).copy_(self._through_the_backend(far))

        def end() -> torch.Tensor:
            exchange.end(time.monotonic() + WAIT_S)
            return out

        return end

    def _through_the_backend(self, far: Far) -> torch.Tensor:
        """In bytes, as Gloo counts: one end of a pair may send rows of floats where the other expects bytes."""
        sent = far.sent.clone().view(-1).view(torch.uint8)
        there, back = (1 if rows.dtype == torch.uint8 else 16 for rows in (far.sent, far.received))
        return self.group.all_to_all(sent, [n * there for n in far.send_counts], [n * back for n in far.receive_counts])

    def all_to_all(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        return self.begin(rows, send, receive)()

    def tell(self, rows: torch.Tensor, send: list[int], told_GC: torch.Tensor) -> Heard:
        return self.exchanges.tell(rows, send, told_GC)(time.monotonic() + WAIT_S)


def table(size: int, seed: int, most: int) -> list[list[int]]:
    """[sender][receiver] rows."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, most, (size, size), generator=numbers).tolist()


def rows_of(counts: list[int], sender: int) -> torch.Tensor:
    """Every row says who sent it, to whom, and as what."""
    return torch.tensor([(sender, to, i, 7) for to, n in enumerate(counts) for i in range(n)]).float().view(-1, 4)


def expected(counts: list[list[int]], receiver: int) -> torch.Tensor:
    rows = [(sender, receiver, i, 7) for sender, row in enumerate(counts) for i in range(row[receiver])]
    return torch.tensor(rows).float().view(-1, 4)


def column(counts: list[list[int]], receiver: int) -> list[int]:
    return [row[receiver] for row in counts]


@pytest.mark.parametrize("most", [1, 3, 2 * LARGE], ids=["nothing", "few_rows", "many_rows"])
def test_every_row_comes_to_its_place_over_many_exchanges(most: int) -> None:
    def task(group: MemoryGroup) -> None:
        member = Member(group)
        for turn in range(6):
            counts, me = table(group.size, turn, most), group.position
            came = member.all_to_all(rows_of(counts[me], me), counts[me], column(counts, me))
            assert torch.equal(came, expected(counts, me))

    together(task, 3)


@pytest.mark.parametrize("most", [1, 3, 2 * LARGE], ids=["nothing", "few_rows", "many_rows"])
def test_rows_whose_number_nobody_knew_come_with_what_was_told_beside_them(most: int) -> None:
    def task(group: MemoryGroup) -> None:
        member = Member(group)
        for turn in range(6):
            counts, me = table(group.size, turn, most), group.position
            told_GC = torch.tensor([[turn, me, to] for to in range(group.size)])
            heard = member.tell(rows_of(counts[me], me), counts[me], told_GC)
            assert torch.equal(heard.rows, expected(counts, me))
            assert heard.counts == column(counts, me)
            assert heard.told_GC.tolist() == [[turn, sender, me] for sender in range(group.size)]

    together(task, 3)


@pytest.mark.parametrize("shape", [(1,), (2, 5), (1000, 3)], ids=["fewer_than_members", "uneven", "many"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_a_sum_is_the_same_bits_on_all_members(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    numbers = torch.Generator().manual_seed(1)
    given = [(torch.randn(shape, generator=numbers) * 100).to(kind) for _ in range(3)]

    def task(group: MemoryGroup) -> torch.Tensor:
        member, total = Member(group), given[group.position].clone()
        across = total.expand(2, *shape).transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
        member.exchanges.sum(total, until=time.monotonic() + WAIT_S)
        member.exchanges.sum(across, until=time.monotonic() + WAIT_S)
        assert torch.equal(across, total.expand(2, *shape))
        return total

    found = together(task, 3)
    assert all(torch.equal(total, found[0]) for total in found)
    torch.testing.assert_close(found[0].double(), sum(one.double() for one in given), atol=2, rtol=1e-2)


def test_nothing_goes_to_the_backend_where_all_are_near() -> None:
    def task(group: MemoryGroup) -> bool:
        member = Member(group)
        out = torch.zeros(2 * LARGE, 4)
        exchange = member.exchanges.begin(out, torch.zeros(2 * LARGE, 4), [LARGE, LARGE], [LARGE, LARGE])
        exchange.end(time.monotonic() + WAIT_S)
        return exchange.far is None and member.exchanges.is_near

    assert together(task, 2) == [True, True]


def test_rows_of_an_exchange_under_way_stay_while_the_next_begin() -> None:
    def task(group: MemoryGroup) -> None:
        member, counts = Member(group), [LARGE, LARGE]
        ends = [member.begin(torch.full((2 * LARGE, 4), float(turn)), counts, counts) for turn in range(3)]
        for turn, end in enumerate(ends):
            assert (end() == turn).all()

    together(task, 2)


def test_exchanges_may_end_in_another_order_than_they_began() -> None:
    def task(group: MemoryGroup) -> None:
        member, counts = Member(group), [LARGE, LARGE]
        for _ in range(3):
            ends = [member.begin(torch.full((2 * LARGE, 4), float(turn)), counts, counts) for turn in range(3)]
            for turn in (2, 0, 1) if group.position else (1, 2, 0):
                assert (ends[turn]() == turn).all()

    together(task, 2)


def test_what_a_late_reader_has_not_read_is_not_written_over() -> None:
    late = threading.Event()

    def task(group: MemoryGroup) -> None:
        member, counts = Member(group), [LARGE, LARGE]
        end = member.begin(torch.full((2 * LARGE, 4), 1.0), counts, counts)
        if group.position == 0:
            end()
            ends = [member.begin(torch.full((2 * LARGE, 4), 2.0), counts, counts)]
            late.set()
        else:
            assert late.wait(WAIT_S)
            assert (end() == 1).all()
            ends = [member.begin(torch.full((2 * LARGE, 4), 2.0), counts, counts)]
        assert (ends[0]() == 2).all()

    together(task, 2)


def test_memory_is_used_again() -> None:
    def task(group: MemoryGroup) -> int:
        member = Member(group)
        for _ in range(20):
            member.all_to_all(torch.zeros(2 * LARGE, 4), [LARGE, LARGE], [LARGE, LARGE])
        assert member.near is not None
        return max(end for _, end in member.near._own._held.values())

    assert max(together(task, 2)) < 4 * LARGE * 16


def test_a_member_whose_memory_nobody_sees_gets_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    real = near_memory._OwnFile
    made: list[Any] = []

    def only_two() -> Any:
        with lock:
            if len(made) == 2:
                raise OSError("no memory files here")
            made.append(real())
            return made[-1]

    monkeypatch.setattr(near_memory, "_OwnFile", only_two)

    def task(group: MemoryGroup) -> tuple[int, bool]:
        member = Member(group)
        for turn in range(3):
            counts, me = table(group.size, turn, LARGE), group.position
            came = member.all_to_all(rows_of(counts[me], me), counts[me], column(counts, me))
            assert torch.equal(came, expected(counts, me))
        return len(member.near.members) if member.near else 0, member.exchanges.is_near

    found = together(task, 3)
    assert sorted(near for near, _ in found) == [0, 1, 1]
    assert not any(is_near for _, is_near in found)


def test_who_reads_another_and_is_not_read_by_it_is_not_near(monkeypatch: pytest.MonkeyPatch) -> None:
    real = near_memory._open
    files: list[int] = []

    def the_first_is_unseen(told: Sequence[int]) -> Any:
        return None if told[1] == min(files) else real(told)

    monkeypatch.setattr(near_memory, "_open", the_first_is_unseen)

    def task(group: MemoryGroup) -> int:
        def gather(row: Sequence[int]) -> list[list[int]]:
            rows = group.all_gather_ints(row)
            if len(row) > group.size:
                files[:] = [told[1] for told in rows]
            return rows

        near = NearMemory.meet(gather, ranks=range(group.size), position=group.position)
        return len(near.members) if near is not None else 0

    assert sorted(together(task, 3)) == [0, 1, 1]


def test_one_that_is_near_two_who_are_far_from_each_other_takes_part_in_what_those_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    who = threading.local()
    real = NearWords.open

    def the_ends_are_far(words: NearWords, position: int, **told: Any) -> bool:
        return {who.position, position} != {0, 2} and real(words, position, **told)

    monkeypatch.setattr(NearWords, "open", the_ends_are_far)

    def task(group: MemoryGroup) -> tuple[int, bool]:
        who.position = group.position
        member = Member(group)
        for turn in range(3):
            counts, me = table(group.size, turn, LARGE), group.position
            came = member.all_to_all(rows_of(counts[me], me), counts[me], column(counts, me))
            assert torch.equal(came, expected(counts, me))
        assert member.near is not None
        return len(member.near.members), member.exchanges.is_near

    assert together(task, 3) == [(1, False), (2, False), (1, False)]


def words_of_two() -> tuple[NearWords, NearWords]:
    both = [NearWords((10, 11), position=position) for position in range(2)]
    addresses = [words.address for words in both]
    for position, words in enumerate(both):
        other = 1 - position
        assert words.open(other, pid=os.getpid(), told=addresses[other], own_position=position)
    for position, words in enumerate(both):
        words.keep([1 - position])
    return both[0], both[1]


def test_the_end_of_a_member_is_heard_after_its_last_word_and_named() -> None:
    mine, its = words_of_two()
    its.say(0, Word(0, 64, 8, 0))
    its.close()

    assert mine.hear(1, 0, until=time.monotonic() + WAIT_S).place == 64
    with pytest.raises(RuntimeError, match="rank 11 is gone"):
        mine.hear(1, 1, until=time.monotonic() + WAIT_S)
    with pytest.raises(RuntimeError, match="rank 11 is gone"):
        mine.say(1, Word(1, 0, 0, 0))


def test_a_member_that_says_nothing_is_named_at_the_deadline() -> None:
    mine, its = words_of_two()

    with pytest.raises(RuntimeError, match="rank 11 has not come in time"):
        mine.hear(1, 0, until=time.monotonic() + 0.05)
    its.close()


def test_nothing_stays_open_when_words_and_files_are_closed() -> None:
    def task(group: MemoryGroup) -> None:
        member = Member(group)
        member.all_to_all(torch.zeros(2, 4), [1, 1], [1, 1])
        member.exchanges.close()

    together(task, 2)  # what threads and torch open once is open now
    before = len(list(Path("/proc/self/fd").iterdir()))
    together(task, 2)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_pipe_that_is_not_the_one_told_of_is_not_written_to() -> None:
    mine, its = NearWords((0, 1), position=0), NearWords((0, 1), position=1)
    end, inode = its.address[:2]

    assert not mine.open(1, pid=os.getpid(), told=(end, inode + 1, -1, 0), own_position=0)
    with Path(os.devnull).open("w") as other:
        told = (other.fileno(), os.fstat(other.fileno()).st_ino, -1, 0)
        assert not mine.open(1, pid=os.getpid(), told=told, own_position=0)
    mine.close()
    its.close()


def test_a_file_that_holds_another_secret_is_not_read() -> None:
    own = near_memory._OwnFile()
    pid, fd, first, second = own.address

    assert near_memory._open((pid, fd, first, second)) is not None
    assert near_memory._open((pid, fd, first, second ^ 1)) is None


def test_what_is_no_memory_file_is_not_opened() -> None:
    with Path(os.devnull).open() as other:
        assert near_memory._open((os.getpid(), other.fileno(), 1, 2)) is None
    assert near_memory._open((0, 0, 0, 0)) is None
