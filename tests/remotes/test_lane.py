"""Threads that may hang, with real threads: each waits on an event of the test."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Canceled, Refused, Unreachable
from proxy.remotes import lane as lane_module
from proxy.remotes.breaker import Breaker, Circuit
from proxy.remotes.lane import Lane
from proxy.runtime.threads import Work, stop_if_abandoned

if TYPE_CHECKING:
    from collections.abc import Iterator


class Server:
    """``hang`` is a system call that returns when the server is back."""

    def __init__(self) -> None:
        self.back = threading.Event()
        self.probes = 0
        self.works = True
        self.effects: list[str] = []

    def hang(self) -> str:
        self.back.wait(20)
        stop_if_abandoned()
        self.effects.append("hung")
        return "late"

    def work(self) -> str:
        self.effects.append("worked")
        return "done"

    async def probe(self) -> None:
        self.probes += 1
        await trio.lowlevel.checkpoint()
        if not self.works:
            raise Unreachable("ETIMEDOUT: no", code="ETIMEDOUT")

    def lane(self, patience: float = 0.15, threads: int = 4, pause: float = 0.05) -> Lane:
        breaker = Breaker("nfs://h:/p", failures=3, pause=pause, longest_pause=pause)
        return Lane(breaker, self.probe, patience=patience, threads=threads)


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.back.set()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "_CANCEL_SECONDS", 0.1)
    monkeypatch.setattr(lane_module, "_END_SECONDS", 0.05)


async def test_results_and_errors_come_through(server: Server) -> None:
    lane = server.lane()

    def fail() -> None:
        raise Refused("EACCES", code="EACCES")

    assert await lane.run(Work.DISK, server.work) == "done"
    with pytest.raises(Refused):
        await lane.run(Work.DISK, fail)
    assert lane.breaker.circuit is Circuit.CLOSED
    assert await lane.wait_idle(1)


async def test_weakness_05_what_hangs_ends_after_the_configured_time(server: Server) -> None:
    """Upstream's `timeout` has no effect, and what timed out is tried again beside itself."""
    lane = server.lane(patience=0.15)
    started = time.monotonic()
    with pytest.raises(Unreachable, match=r"ETIMEDOUT: .* 0.15 s on nfs://h:/p") as caught:
        await lane.run(Work.DISK, server.hang)
    assert 0.14 < time.monotonic() - started < 5
    assert caught.value.code == "ETIMEDOUT"
    assert lane.hangs
    started = time.monotonic()
    with pytest.raises(Unreachable, match="does not answer since"):
        await lane.run(Work.DISK, server.work)
    assert time.monotonic() - started < 0.1
    assert server.effects == []


async def test_nothing_begins_before_what_was_abandoned_has_ended(server: Server) -> None:
    lane = server.lane()
    with pytest.raises(Unreachable):
        await lane.run(Work.DISK, server.hang)
    await trio.sleep(0.1)  # the pause is over, but the thread is not
    with pytest.raises(Unreachable):
        await lane.run(Work.DISK, server.work)
    assert server.probes == 0
    server.back.set()
    assert await lane.wait_idle(5)
    assert await lane.run(Work.DISK, server.work) == "done"
    assert server.probes == 1
    assert server.effects == ["worked"]  # the other one stopped before its effect
    assert lane.breaker.circuit is Circuit.CLOSED


async def test_a_question_that_fails_keeps_it_open(server: Server) -> None:
    lane = server.lane()
    lane.breaker.hangs(Unreachable("x"), trio.current_time())
    server.works = False
    await trio.sleep(0.06)
    for _ in range(2):
        with pytest.raises(Unreachable):
            await lane.run(Work.DISK, server.work)
    assert server.probes == 1
    assert server.effects == []


async def test_failures_in_a_row_open_it(server: Server) -> None:
    lane = server.lane(pause=60)

    def fail() -> None:
        raise Unreachable("ESTALE", code="ESTALE")

    for _ in range(3):
        with pytest.raises(Unreachable):
            await lane.run(Work.DISK, fail)
    with pytest.raises(Unreachable, match="does not answer") as caught:
        await lane.run(Work.DISK, server.work)
    assert caught.value.code == "ESTALE"


async def test_a_cancelled_call_that_ends_soon_has_ended_when_its_undo_begins(
    server: Server,
) -> None:
    lane = server.lane(patience=5)
    undo: list[list[str]] = []
    threading.Timer(0.05, server.back.set).start()
    with trio.move_on_after(0.02) as scope:
        try:
            await lane.run(Work.DISK, server.hang)
            await trio.lowlevel.checkpoint()
        finally:
            undo.append(list(server.effects))
    assert scope.cancelled_caught
    assert undo == [["hung"]]


async def test_a_cancel_is_answered_also_when_the_call_hangs_and_others_wait_for_it(
    server: Server,
) -> None:
    """One run's cancel must not fail the others on the same remote."""
    lane = server.lane(patience=5)
    with trio.move_on_after(0.02) as scope:
        await lane.run(Work.DISK, server.hang)
    assert scope.cancelled_caught
    assert lane.breaker.circuit is Circuit.CLOSED
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run, Work.DISK, server.work)
        await trio.sleep(0.05)
        assert server.effects == []
        assert await lane.run(Work.LOCK, lambda: "refreshed") == "refreshed"  # locks do not wait
        server.back.set()
    assert server.effects == ["worked"]


async def test_what_a_cancelled_call_leaves_running_counts_against_the_patience(
    server: Server,
) -> None:
    lane = server.lane(patience=0.3)
    with trio.move_on_after(0.02):
        await lane.run(Work.DISK, server.hang)
    with pytest.raises(Unreachable):
        await lane.run(Work.DISK, server.work)
    assert lane.breaker.circuit is not Circuit.CLOSED
    assert server.effects == []


async def test_all_threads_hanging_hold_neither_the_loop_nor_another_mount(server: Server) -> None:
    lane, other = server.lane(patience=0.3, threads=2), server.lane(patience=5)
    failed: list[str] = []

    async def use() -> None:
        try:
            await lane.run(Work.DISK, server.hang)
        except Unreachable as error:
            failed.append(error.code)

    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(use)
        await trio.sleep(0.05)
        assert await other.run(Work.DISK, server.work) == "done"
        assert failed == []
    assert failed == ["ETIMEDOUT"] * 6
    assert lane.statistics()["running"] == 2


async def test_the_result_that_nobody_waits_for_is_disposed_of(server: Server) -> None:
    lane = server.lane()
    got: list[str] = []

    def open_late() -> str:
        server.back.wait(20)
        return "descriptor"

    with pytest.raises(Unreachable):
        await lane.run(Work.DISK, open_late, dispose=got.append)
    assert got == []
    server.back.set()
    await lane.wait_idle(5)
    assert got == ["descriptor"]


async def test_an_end_runs_whatever_hangs(server: Server) -> None:
    lane = server.lane(threads=1)
    with pytest.raises(Unreachable):
        await lane.run(Work.DISK, server.hang)
    ended: list[str] = []
    await lane.end(lambda: ended.append("closed"))
    assert ended == ["closed"]
    started = time.monotonic()
    with pytest.raises(Unreachable):
        await lane.end(lambda: ended.append(server.hang()))
    assert time.monotonic() - started < 2
    read, write = os.pipe()
    lane.close(read)
    os.close(write)
    server.back.set()
    assert await lane.wait_idle(5)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


async def test_looks_do_not_fence(server: Server) -> None:
    """A slow answer to `remote.getInfo` is no reason to fail a backup."""
    lane = server.lane(patience=5)
    with trio.move_on_after(0.02):
        await lane.run(Work.DISK, server.hang, abandon=True)
    assert await lane.run(Work.DISK, server.work) == "done"


async def test_an_abandoned_thread_is_told() -> None:
    stop_if_abandoned()  # elsewhere it means nothing
    told: list[str] = []
    server = Server()
    lane = server.lane(patience=0.05)

    def steps() -> None:
        server.back.wait(20)
        try:
            stop_if_abandoned()
        except Canceled as error:
            told.append(error.code)

    with pytest.raises(Unreachable):
        await lane.run(Work.DISK, steps)
    server.back.set()
    await lane.wait_idle(5)
    assert told == ["ECANCELED"]
