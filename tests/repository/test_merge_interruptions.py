"""Merges that a full disk or another proxy stops, and that the next clean ends."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio

from proxy.disks import merge
from proxy.disks.opening import open_disk
from proxy.errors import Busy, Refused
from proxy.formats import vhd_directory
from proxy.formats.vhd import stream_size
from proxy.remotes.faults import Fail, Faults, Gate
from proxy.repository import lock_vm
from proxy.runtime.threads import inline_threads
from tests.disks.chains import Held, model, tags
from tests.repository.conftest import VM, open_local
from tests.repository.test_delta_clean import CHAIN, KINDS, TIMES, clean, place_vm, tree

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from proxy.remotes.interface import Remote
    from proxy.remotes.wrapper import Operation
    from tests.disks.chains import Point

pytestmark = pytest.mark.timeout(300)  # a few seconds where nobody else works

T = TypeVar("T")
IN_PLACE = "edit.write_at"
RESULT = {"merge": False, "size": 0}


def again(start: Path, live: Path) -> None:
    """In the same directory, which a remote knows."""
    for each in live.iterdir():
        shutil.rmtree(each)
    shutil.copytree(start, live, dirs_exist_ok=True)


class Full(Faults):
    """No space from some byte on.  What is written in place is written in part; what gets its
    name when it is complete never gets it."""

    def __init__(self, inner: Remote, room: int | None = None) -> None:
        super().__init__(inner)
        self.writes: list[tuple[str, int]] = []
        self._room = room

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        if operation.partially is None:
            return await super().around(operation, run)
        self.writes.append((operation.verb, operation.size))
        if self._room is not None and operation.size > self._room:
            if operation.verb == IN_PLACE:
                await operation.partially(self._room)
            self._room = 0
            raise Refused("no space left on device", code="ENOSPC")
        if self._room is not None:
            self._room -= operation.size
        return await super().around(operation, run)


@pytest.fixture
def fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory where that exists: nothing here is about what is synced.  Blocks that read the
    same are decoded once."""
    monkeypatch.setattr(vhd_directory, "decompress", functools.cache(vhd_directory.decompress))
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="xo-proxy-merge-", dir=memory) as folder:
        yield Path(folder)


async def assert_whole(
    remote: Remote, vm_dir: Path, chain: Sequence[str], points: Sequence[Point], expected: set[str]
) -> None:
    """The next clean ends the merge; disks, files and metadata are as without the trouble."""
    await reads(remote, chain, points)
    _, warnings = await clean(remote)
    assert set(warnings) <= {"orphaned data file"}
    await reads(remote, chain, points)
    assert tree(vm_dir) == expected
    async with open_disk(remote, chain[2]) as disk:
        size = stream_size(disk.header.max_entries, len(disk.blocks))
    record = json.loads((vm_dir / f"{TIMES[2]}.json").read_bytes())
    assert (record["size"], record["isVhdDifferencing"]) == (size, {"OpaqueRef:one": False})
    assert await clean(remote) == (RESULT, [])


async def reads(remote: Remote, chain: Sequence[str], points: Sequence[Point]) -> None:
    for number in (2, 3):
        assert await tags(remote, chain[number]) == model(points[: number + 1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directories", "mixed", "moved table"])
async def test_a_full_disk_at_any_write_of_a_merge(
    fast: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From some byte on, before and in the middle of each write; then there is space again."""
    monkeypatch.setattr(merge, "BATCH", 2)
    monkeypatch.setattr(merge, "COPIED", 1)
    points = KINDS[kind]
    start, live = fast / "start", fast / "live"
    vm_dir = live / "xo-vm-backups" / VM
    chain = place_vm(start / "xo-vm-backups" / VM, points, [2, 3])
    with inline_threads():
        shutil.copytree(start, live)
        remote = await open_local(live)
        measuring = Full(remote)
        await clean(measuring)
        expected = tree(vm_dir)
        rooms: set[int] = set()
        written = 0
        for verb, size in measuring.writes:
            rooms |= {written, written + size // 2} if verb == IN_PLACE else {written}
            written += size
        assert len(rooms) >= 8
        failed = 0
        for room in sorted(rooms):
            again(start, live)
            try:
                _, warnings = await clean(Full(remote, room))
            except Refused:
                failed += 1
            else:
                assert warnings == [], "only the listing cache was not written"
            await assert_whole(remote, vm_dir, chain, points, expected)
        assert failed >= 6
        await remote.aclose()


@pytest.mark.parametrize("kind", ["directories", "files"])
async def test_a_full_disk_at_any_renaming_of_a_merge(
    fast: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory may need a new block for the new name."""
    monkeypatch.setattr(merge, "BATCH", 1)
    points = KINDS[kind]
    start, live = fast / "start", fast / "live"
    vm_dir = live / "xo-vm-backups" / VM
    chain = place_vm(start / "xo-vm-backups" / VM, points, [2, 3])
    with inline_threads():
        shutil.copytree(start, live)
        remote = await open_local(live)
        await clean(remote)
        expected = tree(vm_dir)
        at, fails = 0, True
        while fails:
            again(start, live)
            faults = Faults(remote)
            faults.add("rename*", Fail(Refused("no space", code="ENOSPC")), skip=at, times=99)
            fails = False
            try:
                await clean(faults)
            except Refused:
                fails = True
            await assert_whole(remote, vm_dir, chain, points, expected)
            at += 1
        assert at > (4 if kind == "directories" else 1)
        await remote.aclose()


async def test_a_second_proxy_waits_for_a_merge_or_is_told_who_does_it(
    remote: Remote, vm_dir: Path
) -> None:
    chain = place_vm(vm_dir, CHAIN, [2, 3])
    faults = Faults(remote)
    gate = faults.add("rename_all", Gate())
    waited: list[tuple[dict[str, Any], list[str]]] = []

    async def first() -> None:
        async with lock_vm(remote, VM, owner="the run of the first") as lock:
            await clean(faults, lock=lock)

    async def patient() -> None:
        async with lock_vm(remote, VM, owner="the second", wait=30) as lock:
            waited.append(await clean(remote, lock=lock))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await gate.reached.wait()
        before = tree(vm_dir)
        with pytest.raises(Busy) as caught:
            async with lock_vm(remote, VM, owner="the second"):
                raise AssertionError("two at once")
        assert caught.value.code == "ELOCKED"
        assert "the run of the first" in str(caught.value.message)
        assert tree(vm_dir) == before
        await reads(remote, chain, CHAIN)
        nursery.start_soon(patient)
        await trio.sleep(0.05)
        assert waited == []
        gate.release.set()
    assert waited == [(RESULT, [])], "it found nothing left to do"
    await reads(remote, chain, CHAIN)


class Lost(Held):
    """A lock that is lost after so many checks; from then on nothing may be changed."""

    def __init__(self, after: int, faults: Faults) -> None:
        self.left = after
        self.lost_at: int | None = None
        self._faults = faults

    async def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.lost_at = self.lost_at or len(self._faults.seen)
            raise Busy("lost", code="ELOCKED")


READS = {"read_file", "read_files", "list", "stat", "open_read", "read_into", "close"}


@pytest.mark.parametrize("kind", ["directories", "files"])
async def test_a_lock_that_is_lost_stops_a_merge_at_once_and_it_is_ended_by_the_next(
    fast: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "BATCH", 2)
    monkeypatch.setattr(merge, "COPIED", 1)
    points = KINDS[kind]
    start, live = fast / "start", fast / "live"
    vm_dir = live / "xo-vm-backups" / VM
    chain = place_vm(start / "xo-vm-backups" / VM, points, [2, 3])
    with inline_threads():
        shutil.copytree(start, live)
        remote = await open_local(live)
        await clean(remote)
        expected = tree(vm_dir)
        after, lost = 0, True
        while lost:
            again(start, live)
            faults = Faults(remote)
            lock = Lost(after, faults)
            lost = False
            try:
                await clean(faults, lock=lock)
            except Busy:
                lost = True
                then = [verb for verb, _ in faults.seen[lock.lost_at :]]
                assert not {verb for verb in then if verb not in READS and "close" not in verb}, (
                    then
                )
            await assert_whole(remote, vm_dir, chain, points, expected)
            after += 1
        assert after > 8
        await remote.aclose()
