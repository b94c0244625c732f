"""A rank's line to the coordinator: what it says of trouble, and that its end is the rank's."""

import queue
import socket
import threading

import pytest

from moe_core.contract.membership import Member
from moe_runtime.rank.link import EXIT_LINK_BROKEN, CoordinatorLink
from moe_runtime.registration import RankReport

REPORT = RankReport(member=Member(rank=0, pod_uid="p", address="h:1"), phase="Ready")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_on_the_line_ends_the_rank() -> None:
    ends: queue.Queue[int] = queue.Queue()

    def make_report() -> RankReport:
        raise KeyError("a mistake of ours")

    CoordinatorLink("http://127.0.0.1:1", "t", end_process=ends.put).start(make_report, heard=lambda _: None)
    assert ends.get(timeout=5) == EXIT_LINK_BROKEN
    for thread in threading.enumerate():
        if thread.name == "coordinator-link":
            thread.join(5)


def test_an_absent_coordinator_is_said_once_and_so_is_its_return() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        asked: queue.Queue[RankReport] = queue.Queue()
        said: list[str] = []
        link = CoordinatorLink(f"http://127.0.0.1:{port}", "t", end_process=lambda _: None, say=said.append)

        def make_report() -> RankReport:
            asked.put(REPORT)
            return REPORT

        link.start(make_report, heard=lambda _: None)
        for _ in range(3):
            asked.get(timeout=5)
        nobody.listen()
        connection, _ = nobody.accept()
        with connection:
            while b"\r\n\r\n" not in connection.recv(1 << 16):
                continue
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            asked.get(timeout=5)
            asked.get(timeout=5)
            link.stop()
    assert "no answer from the coordinator" in said[0]
    assert said[1] == "the coordinator answers again"
