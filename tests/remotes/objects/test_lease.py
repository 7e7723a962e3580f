"""Locks on object stores: who has it, how it is lost, what a slow or lost answer does.

Upstream has none (its ninth weakness): two writers clean and merge one directory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
import trio.testing

from proxy.errors import Busy, Unreachable
from proxy.remotes.holding import ourselves
from proxy.remotes.interface import Lock
from proxy.remotes.objects import lease as module
from proxy.remotes.objects.lease import LEASE_SECONDS, REFRESH_SECONDS
from proxy.remotes.objects.remote import ObjectRemote
from proxy.remotes.objects.retrying import RetryingStore
from tests.remotes.objects.memory import MemoryStore

pytestmark = pytest.mark.virtual_clock

KEY = "dir/vm.lock"
CONDITIONAL = pytest.mark.parametrize("conditional", [True, False])


def hold(
    store: MemoryStore, owner: str = "run-1", wait: float = 0
) -> AbstractAsyncContextManager[Lock]:
    remote = ObjectRemote(RetryingStore(store), "dir", url="s3://x")
    return remote.lock("vm", owner=owner, wait=wait)


def record_of_another(**other: Any) -> bytes:
    """The record of a live process of another machine."""
    fields = {**ourselves(), "host": "elsewhere", "boot": "other", "owner": "run-9"}
    return json.dumps({**fields, "since": time.time(), "nonce": "n", "number": 1, **other}).encode()


async def loses(store: MemoryStore, spoil: Callable[[], None], **how: Any) -> str:
    """Hold the lock, spoil it, wait for the loss; what it says."""
    with pytest.raises(Busy) as caught:  # noqa: PT012
        async with hold(store, **how):
            spoil()
            await trio.sleep(120)
            pytest.fail("the body went on")
    return caught.value.message


@CONDITIONAL
async def test_weakness_9_two_who_want_it_at_once_have_one_winner(*, conditional: bool) -> None:
    store = MemoryStore(conditional=conditional)
    held: list[str] = []
    refused: list[str] = []

    async def want(owner: str) -> None:
        try:
            async with hold(store, owner):
                held.append(owner)
                await trio.sleep(5)
        except Busy as error:
            refused.append(error.message)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(want, f"run-{number}")
    assert len(held) == 1
    assert len(refused) == 4
    assert all(f"held by {held[0]} (process" in message for message in refused)
    assert store.objects == {}


async def test_the_refusal_names_host_process_run_and_time() -> None:
    store = MemoryStore()
    store.keep(KEY, record_of_another(since=0, pid=4242))
    with pytest.raises(Busy) as caught:
        async with hold(store):
            pass
    assert "by run-9 (process 4242 on elsewhere) since 1970-01-01T00:00:00Z" in str(caught.value)
    assert caught.value.code == "ELOCKED"
    assert caught.value.data["holder"]["host"] == "elsewhere"
    assert KEY in store.objects


@CONDITIONAL
async def test_a_lease_that_does_not_move_for_its_time_is_taken_over(*, conditional: bool) -> None:
    store = MemoryStore(conditional=conditional)
    store.keep(KEY, record_of_another())
    started = trio.current_time()
    async with hold(store, wait=300):
        assert trio.current_time() - started >= LEASE_SECONDS
        assert json.loads(store.objects[KEY][0])["owner"] == "run-1"
    assert store.objects == {}


async def test_a_live_lease_is_never_taken_over_whatever_the_clocks_say() -> None:
    store = MemoryStore()

    async def refresh() -> None:
        for number in range(1000):
            store.keep(KEY, record_of_another(since=0, number=number))
            await trio.sleep(REFRESH_SECONDS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refresh)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Busy):
            async with hold(store, wait=200):
                pass
        nursery.cancel_scope.cancel()


async def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once() -> None:
    store = MemoryStore()
    store.keep(KEY, record_of_another(**{**ourselves(), "pid": 2**22 + 1}))
    started = trio.current_time()
    async with hold(store):
        assert trio.current_time() - started < 1


async def test_a_lease_is_waited_for() -> None:
    store = MemoryStore()
    order: list[str] = []

    async def first() -> None:
        async with hold(store, "run-1"):
            order.append("first")
            await trio.sleep(100)
            order.append("first ends")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        async with hold(store, "run-2", wait=200):
            order.append("second")
    assert order == ["first", "first ends", "second"]


@CONDITIONAL
async def test_a_lease_that_somebody_took_stops_the_body_at_once(*, conditional: bool) -> None:
    store = MemoryStore(conditional=conditional)

    def take() -> None:
        store.keep(KEY, record_of_another())

    message = await loses(store, take)
    assert "run-9" in message
    assert "what was being done was stopped" in message
    assert json.loads(store.objects[KEY][0])["owner"] == "run-9", "theirs is left alone"


@CONDITIONAL
async def test_a_lease_that_is_gone_is_lost(*, conditional: bool) -> None:
    store = MemoryStore(conditional=conditional)
    assert "its object is gone" in await loses(store, store.objects.clear)
    assert store.objects == {}


async def test_a_store_that_goes_away_is_a_lost_lease_before_others_may_take_it() -> None:
    store = MemoryStore()
    started = trio.current_time()

    async def gone(_verb: str, _key: str) -> None:
        raise Unreachable("gone")

    def cut() -> None:
        store.before = gone

    assert "could not be refreshed" in await loses(store, cut)
    assert trio.current_time() - started < LEASE_SECONDS + 12  # the release is tried, too


async def test_a_short_failure_loses_nothing() -> None:
    store = MemoryStore()
    failing = [True]

    async def flaky(_verb: str, _key: str) -> None:
        if failing[0]:
            raise Unreachable("gone")

    async with hold(store) as lock:
        store.before = flaky
        await trio.sleep(REFRESH_SECONDS + 5)
        failing[0] = False
        await trio.sleep(100)
        await lock.check()
    assert store.objects == {}


async def test_the_check_fences_with_a_write_of_its_own() -> None:
    """After it nobody takes the lease over for as long as one lasts."""
    store = MemoryStore()
    refused = 0
    with pytest.raises(Busy, match="run-9"):  # noqa: PT012
        async with hold(store) as lock:
            before = store.objects[KEY]
            await lock.check()
            assert store.objects[KEY][1] != before[1]
            store.keep(KEY, record_of_another())
            for _ in range(2):
                try:
                    await lock.check()
                except Busy:
                    refused += 1
    assert refused == 2


@pytest.mark.parametrize("verb", ["put", "delete"])
async def test_an_answer_that_is_lost_is_not_taken_for_somebody_else(verb: str) -> None:
    """The write had its effect: its repetition meets it."""
    store = MemoryStore()
    lost = [0]

    async def after(asked: str, _key: str) -> None:
        lost[0] += 1
        if asked == verb and lost[0] % 2:
            raise Unreachable("the answer is lost", code="ECONNRESET")

    store.after = after
    async with hold(store) as lock:
        await trio.sleep(100)
        await lock.check()
    assert store.objects == {}
    assert lost[0] > 5


@pytest.mark.parametrize("stop", range(12))
async def test_a_cancel_at_any_moment_of_taking_it_leaves_nothing(stop: int) -> None:
    store = MemoryStore()
    steps = 0
    with trio.CancelScope() as scope:

        async def cut(_verb: str, _key: str) -> None:
            nonlocal steps
            steps += 1
            if steps == stop:
                scope.cancel()

        store.before = store.after = cut
        async with hold(store):
            await trio.sleep(30)
    assert store.objects == {}


async def test_a_release_that_fails_is_told_and_the_next_run_need_not_wait() -> None:
    store = MemoryStore()

    async def gone(verb: str, _key: str) -> None:
        if verb == "delete":
            raise Unreachable("gone")

    store.before = gone
    async with hold(store):
        pass
    assert KEY in store.objects
    store.before = nothing
    started = trio.current_time()
    async with hold(store):
        assert trio.current_time() - started < 1
    assert store.objects == {}


async def nothing(_verb: str, _key: str) -> None:
    return None


@pytest.mark.parametrize("junk", [b"", b"[]", b"\xff" * 9000, b'{"nonce": 5', b"[" * 100000])
async def test_anything_may_stand_in_the_record(junk: bytes) -> None:
    store = MemoryStore()
    store.keep(KEY, junk)
    with pytest.raises(Busy, match="another program is working there"):
        async with hold(store):
            pass
    async with hold(store, wait=60):
        pass


async def test_without_conditions_the_last_writer_has_it() -> None:
    """The documented window: both write before either looks; whoever looks finds one."""
    store = MemoryStore(conditional=False)
    arrived = 0
    gate = trio.Event()

    async def together(verb: str, _key: str) -> None:
        nonlocal arrived
        if verb == "put":
            arrived += 1
            if arrived == 2:
                gate.set()
            await gate.wait()

    store.before = together
    winners: list[str] = []

    async def want(owner: str) -> None:
        try:
            async with hold(store, owner):
                winners.append(owner)
                await trio.sleep(1)
        except Busy:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(want, "run-1")
        nursery.start_soon(want, "run-2")
    assert len(winners) == 1
    assert module._SETTLE_SECONDS < REFRESH_SECONDS
