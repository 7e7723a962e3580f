"""Objects of unknown length: sizes of parts, memory, numbers, giving up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from unittest import mock

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Conflict, ProxyError, Unreachable
from proxy.remotes.bounds import Bounded
from proxy.remotes.objects import parts
from proxy.remotes.objects.parts import Memory, Sizes
from proxy.remotes.objects.remote import ObjectRemote
from proxy.remotes.objects.s3 import LIMITS
from proxy.remotes.objects.store import Limits
from tests.remotes.objects.memory import SMALL, MemoryStore

GIB = 1024 * 1024 * 1024


def remote_on(store: MemoryStore, budget: int = 64) -> ObjectRemote:
    return ObjectRemote(store, "dir", url="s3://x", memory=Memory(budget))


@pytest.fixture(autouse=True)
def small_parts() -> Iterator[None]:
    with mock.patch.object(parts.Sizes.__init__, "__kwdefaults__", {"first": 4}):
        yield


@asynccontextmanager
async def counted(memory: Memory) -> AsyncIterator[None]:
    """Assert that all memory comes back."""
    yield
    assert memory.used == 0
    await trio.lowlevel.checkpoint()


def test_weakness_12_parts_of_real_sizes_reach_five_tebibytes_within_the_budget() -> None:
    """Upstream fails at 48.8 GiB when the length is unknown, after it sent all of them."""
    sizes = Sizes(LIMITS, parts.BUDGET, first=parts.PART)
    direct = [sizes.of(number) for number in range(1, 9001)]
    assert direct[0] == 8 * 1024 * 1024
    assert max(direct) * 2 <= parts.BUDGET
    assert sum(direct) > 450 * GIB
    assert sum(direct) + 1000 * LIMITS.largest_copy > 5 * 1024 * GIB


@given(st.integers(0, 1300), st.integers(1, 97), st.integers(2, 30))
def test_weakness_12_any_length_is_stored_whole_in_allowed_parts(
    length: int, step: int, most_parts: int
) -> None:
    """Never a part above the last number, none too small, none that is too large."""
    copied = min(64, 4 * most_parts)
    limits = replace(SMALL, most_parts=most_parts, largest_copy=copied)
    largest = 4 * (most_parts - most_parts // 2) + copied * (most_parts // 2)
    length = min(length, largest)
    content = bytes(number % 251 for number in range(length))

    async def run() -> None:
        store = MemoryStore(limits=limits)
        remote = remote_on(store, budget=8)
        async with counted(remote._memory), remote.create("f") as file:
            for first in range(0, length, step):
                await file.write(content[first : first + step])
            await file.commit()
        assert {key: data for key, (data, _) in store.objects.items()} == {"dir/f": content}
        assert not any(upload.open for upload in store.uploads)

    with mock.patch.object(parts, "_GROWS_EVERY", 1000):
        trio.run(run)


async def test_what_fits_in_one_part_is_one_put() -> None:
    store = MemoryStore()
    async with remote_on(store).create("f") as file:
        await file.write(b"1234")
        await file.commit()
    assert store.counted == {"put": 1}


async def test_parts_go_out_side_by_side_within_the_budget() -> None:
    store = MemoryStore()
    gate = trio.Event()
    waiting = 0

    async def before(verb: str, _key: str) -> None:
        nonlocal waiting
        if verb == "part":
            waiting += 1
            await gate.wait()

    store.before = before
    remote = remote_on(store, budget=16)
    async with counted(remote._memory), trio.open_nursery() as nursery:

        async def write() -> None:
            async with remote.create("f") as file:
                await file.write(bytes(60))
                await file.commit()

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        assert remote._memory.used == 16
        assert waiting == 4  # and no byte of a fifth is taken
        gate.set()
    assert store.objects["dir/f"][0] == bytes(60)


async def test_many_writers_share_the_budget_without_waiting_for_each_other() -> None:
    store = MemoryStore()
    remote = remote_on(store, budget=8)

    async def write(number: int) -> None:
        async with remote.create(f"f{number}") as file:
            for _ in range(10):
                await file.write(bytes([number]) * 3)
            await file.commit()

    with trio.fail_after(5):
        async with counted(remote._memory), trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(write, number)
    assert {data for data, _ in store.objects.values()} == {bytes([n]) * 30 for n in range(12)}


@pytest.mark.parametrize("verb", ["upload", "part", "complete", "copy-part", "put"])
async def test_a_failure_at_any_request_leaves_nothing(verb: str) -> None:
    store = MemoryStore(limits=replace(SMALL, most_parts=4, largest_copy=16))

    async def before(asked: str, _key: str) -> None:
        if asked == verb:
            raise Unreachable("gone")

    store.before = before
    remote = remote_on(store, budget=8)
    size = 3 if verb == "put" else 40
    with pytest.raises(ProxyError, match="gone"):  # noqa: PT012
        async with counted(remote._memory), remote.create("f") as file:
            await file.write(bytes(size))
            await file.commit()
    assert store.objects == {}
    assert not any(upload.open for upload in store.uploads)


@pytest.mark.parametrize("verb", ["upload", "part", "complete", "copy-part"])
async def test_a_cancel_at_any_request_leaves_nothing(verb: str) -> None:
    store = MemoryStore(limits=replace(SMALL, most_parts=4, largest_copy=16))
    reached = trio.Event()

    async def before(asked: str, _key: str) -> None:
        if asked == verb:
            reached.set()
            await trio.sleep(0.01 if verb == "upload" else 60)  # a beginning is waited for

    store.before = before
    remote = remote_on(store, budget=8)
    with trio.fail_after(5):
        async with counted(remote._memory), trio.open_nursery() as nursery:

            async def write() -> None:
                async with remote.create("f") as file:
                    await file.write(bytes(40))
                    await file.commit()

            nursery.start_soon(write)
            await reached.wait()
            nursery.cancel_scope.cancel()
    assert store.objects == {}
    assert not any(upload.open for upload in store.uploads)


async def test_an_upload_that_cannot_be_given_up_is_told(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()

    async def before(verb: str, _key: str) -> None:
        if verb == "abort":
            raise Unreachable("gone")

    store.before = before
    told: list[str] = []
    with mock.patch(
        "proxy.remotes.objects.writing.tell_trouble", lambda message, *_, **__: told.append(message)
    ):
        async with remote_on(store).create("f") as file:
            await file.write(bytes(40))
    assert told == ["unfinished upload left behind"]


async def test_an_exclusive_upload_in_parts_does_not_replace() -> None:
    store = MemoryStore()
    with pytest.raises(Conflict, match="EEXIST"):  # noqa: PT012
        async with remote_on(store).create("f", exclusive=True) as file:
            await file.write(bytes(40))
            store.keep("dir/f", b"early")
            await file.commit()
    assert store.objects["dir/f"][0] == b"early"
    assert not any(upload.open for upload in store.uploads)


async def test_a_large_rename_is_copied_in_parts() -> None:
    store = MemoryStore(limits=replace(SMALL, largest_copy=16, most_parts=60))
    content = bytes(range(201))
    store.keep("dir/a", content)
    await remote_on(store).rename("a", "b")
    assert {key: data for key, (data, _) in store.objects.items()} == {"dir/b": content}


def test_limits_are_those_of_amazon() -> None:
    assert Limits(5 << 20, 5 << 30, 10_000, 5 << 30, 5 << 30, 1000) == LIMITS


async def test_a_writer_that_waits_for_memory_takes_no_turn_from_those_that_have_it() -> None:
    """Else enough backups at once wait for each other for ever: the first have begun a part and
    need a turn to fill it, the others hold all turns and need the memory of that part."""
    store = MemoryStore()
    remote = remote_on(store, budget=8)
    bounded = Bounded(remote, at_once=1, seconds=0)
    with trio.fail_after(5):
        async with counted(remote._memory), trio.open_nursery() as nursery:

            async def write(name: str, begun: trio.Event) -> None:
                async with bounded.create(name) as file:
                    await file.write(b"12")
                    await begun.wait()
                    await file.write(b"345")
                    await file.commit()

            begun = trio.Event()
            for name in ("a", "b", "c"):
                nursery.start_soon(write, name, begun)
            await trio.testing.wait_all_tasks_blocked()
            begun.set()
    assert {key: data for key, (data, _) in store.objects.items()} == {
        f"dir/{name}": b"12345" for name in "abc"
    }
