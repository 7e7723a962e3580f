"""How many operations run at once on a remote, and how long one may be silent."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from proxy.errors import Unreachable
from proxy.remotes import opened_remote
from proxy.remotes.bounds import Bounded
from proxy.remotes.faults import Delay, Fail, Faults, Gate
from proxy.remotes.retry import Retry, Told
from proxy.remotes.wrapper import Operation
from proxy.runtime.threads import inline_threads
from tests.remotes.conftest import OPTIONS, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

GONE = Unreachable("the server went away", code="ECONNRESET")


@pytest.fixture
async def faults(root: Path) -> AsyncIterator[Faults]:
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            yield Faults(remote)


@pytest.mark.virtual_clock
async def test_only_so_many_operations_run_at_once(faults: Faults) -> None:
    bounded = Bounded(faults, at_once=3, seconds=0)
    gate = faults.add("stat", Gate(), times=3)
    async with trio.open_nursery() as nursery:
        for _ in range(7):
            nursery.start_soon(bounded.stat, "")
        await trio.testing.wait_all_tasks_blocked()
        assert faults.seen == [("stat", "")] * 3
        gate.release.set()
    assert faults.seen == [("stat", "")] * 7


@pytest.mark.virtual_clock
async def test_an_open_file_takes_no_turn(faults: Faults) -> None:
    """Else as many open files as there are turns would wait for each other for ever."""
    bounded = Bounded(faults, at_once=1, seconds=10)
    async with bounded.create("a") as one, bounded.create("b") as other:
        await one.write(b"1")
        await other.write(b"2")
        await one.commit()
        await other.commit()
    assert [entry.name for entry in await bounded.list("")] == ["a", "b"]


@pytest.mark.virtual_clock
async def test_a_lock_is_refreshed_while_data_queues(faults: Faults) -> None:
    bounded = Bounded(faults, at_once=1, seconds=0)
    await faults.mktree("d")
    gate = faults.add("stat", Gate())
    async with trio.open_nursery() as nursery:
        async with bounded.lock("d", owner="me") as lock:
            nursery.start_soon(bounded.stat, "")
            await gate.reached.wait()
            with trio.fail_after(1):
                await lock.check()
        gate.release.set()


@pytest.mark.virtual_clock
async def test_weakness_5_the_configured_time_ends_a_silent_operation(faults: Faults) -> None:
    """Upstream ignores `remoteOptions.timeout`, and lets six tries of 20 minutes pass."""
    bounded = Bounded(Retry(faults), at_once=4, seconds=60)
    faults.add("list", Delay(1000), times=99)
    with pytest.raises(Unreachable, match="list of 'd' on the remote") as caught:
        await bounded.list("d")
    assert caught.value.code == "ETIMEDOUT"
    assert trio.current_time() == 60
    assert faults.seen == [("list", "d")], "what is over time is not tried again"


@pytest.mark.virtual_clock
async def test_the_time_holds_for_all_tries_together(faults: Faults) -> None:
    bounded = Bounded(Retry(faults), at_once=4, seconds=3)
    faults.add("list", Fail(GONE), times=99)
    with pytest.raises(Unreachable, match="nothing happened for 3 s"):
        await bounded.list("")
    assert trio.current_time() == 3


@pytest.mark.virtual_clock
@pytest.mark.parametrize("verb", ["rmtree", "rename_all"])
async def test_work_of_many_steps_may_take_long(faults: Faults, verb: str) -> None:
    await faults.write_file("d/f", b"x")
    faults.add(verb, Delay(1000))
    bounded = Bounded(faults, at_once=4, seconds=60)
    await (bounded.rmtree("d") if verb == "rmtree" else bounded.rename_all([("d/f", "d/g")]))
    assert trio.current_time() == 1000


@pytest.mark.virtual_clock
async def test_the_wait_for_a_turn_is_no_silence(faults: Faults) -> None:
    faults.add("stat", Delay(40), times=3)
    bounded = Bounded(faults, at_once=1, seconds=60)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(bounded.stat, "")
    assert trio.current_time() == 120


async def test_a_thread_that_hangs_is_let_go(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network mount whose server died: the thread itself cannot be ended."""
    release = threading.Event()
    async with opened(f"file://{root}") as remote:
        bounded = Bounded(remote, at_once=4, seconds=0.05)
        monkeypatch.setattr("proxy.remotes.posix.Root.stat", lambda *_: release.wait(20))
        try:
            with trio.fail_after(5), pytest.raises(Unreachable, match="stat of 'f'"):
                await bounded.stat("f")
        finally:
            release.set()


async def test_every_remote_that_is_opened_is_bounded_and_tried_again(root: Path) -> None:
    """Weakness 6 of upstream (programming errors tried six times) is the retry's own test."""
    async with opened_remote({"url": f"file://{root}"}, options=OPTIONS) as remote:
        assert isinstance(remote, Bounded)
        assert isinstance(remote.inner, Retry)


@pytest.mark.virtual_clock
async def test_a_dead_remote_does_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, object]] = []
    monkeypatch.setattr(
        "proxy.remotes.retry._log.warning", lambda _event, **said: lines.append(said)
    )
    told = Told("nfs://host:/share")
    for _ in range(100):
        told(Operation("list", "d"), GONE)
    await trio.sleep(31)
    told(Operation("stat", "f"), GONE)
    assert [(line["verb"], line["more"]) for line in lines] == [("list", 0), ("stat", 99)]
