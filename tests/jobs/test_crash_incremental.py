"""Incremental backups after a crash at any change on the remote (promises I1, I2, I3).

Every state that a crash can leave is read, recovered and read again: each backup that has its
metadata is complete and byte for byte what the pool held, before the recovery and after it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.formats.vhd import BLOCK_SIZE
from proxy.remotes.recording import Recording, crash_states
from proxy.repository import delete_backups
from proxy.simulator import SimulatedPool

from .conftest import open_house
from .crashes import Tale, recording
from .test_incremental_backup import KINDS, live


@asynccontextmanager
async def tale_of(root: Path, remote: str, *, disks: int = 1) -> AsyncIterator[Tale]:
    pool = SimulatedPool.small(disks_per_vm=disks, disk_size=3 * BLOCK_SIZE, fill=0.0)
    async with open_house(pool, root) as house:
        tale = Tale(house, remote)
        for disk in range(disks):
            tale.write(0, 1, disk)
            tale.write(1, 2, disk)
        with recording(tale.changes):
            yield tale


async def a_key_run(tale: Tale) -> None:
    with tale.told():
        await tale.back_up()


async def a_delta_run(tale: Tale) -> None:
    await tale.back_up()
    tale.write(1, 3, 0)
    tale.write(2, 4, 1)
    with tale.told():
        await tale.back_up(exportRetention=5)


async def a_run_that_merges(tale: Tale) -> None:
    for number in range(2):
        tale.write(1 + number, 10 + number)
        await tale.back_up(exportRetention=2)
    tale.write(0, 20)
    with tale.told():
        await tale.back_up(exportRetention=2)


async def a_run_that_merges_three(tale: Tale) -> None:
    for number in range(4):
        tale.write(number % 3, 10 + number)
        await tale.back_up(exportRetention=9)
    tale.write(0, 20)
    with tale.told():
        await tale.back_up(exportRetention=2)


async def a_run_that_merges_a_grown_disk(tale: Tale) -> None:
    await tale.back_up()
    tale.house.pool.grow(live(tale.house)[0], 5 * BLOCK_SIZE)
    tale.write(4, 11)
    await tale.back_up(exportRetention=2)
    tale.write(1, 12)
    with tale.told():
        await tale.back_up(exportRetention=2)


async def the_deletion_of_a_middle_backup(tale: Tale) -> None:
    for number in range(3):
        tale.write(number, 10 + number)
        tale.write(1, 20 + number)
        await tale.back_up(exportRetention=9)
    middle = tale.house.backups(tale.remote)[1]
    with tale.told() as changes:
        async with tale.opened(tale.house.folder(tale.remote)) as remote:
            recorder = Recording(remote)
            recorder.changes = changes
            await delete_backups(recorder, [middle])
            await tale.recover(recorder)


SCENES: dict[str, tuple[Callable[[Tale], Awaitable[None]], int, int]] = {
    "key": (a_key_run, 2, 18),
    "delta": (a_delta_run, 2, 18),
    "merge": (a_run_that_merges, 1, 28),
    "merge of three": (a_run_that_merges_three, 1, 30),
    "merge of a grown disk": (a_run_that_merges_a_grown_disk, 1, 30),
    "deletion": (the_deletion_of_a_middle_backup, 1, 20),
}
"""Each with the number of the VM's disks, and how many changes it makes at the least: what is
not recorded is not tried."""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """In memory where that exists: the states are made of what is synced, not of syncing it."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="xo-proxy-crash-", dir=memory) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("remote", KINDS)
@pytest.mark.parametrize("scene", SCENES)
async def test_after_a_crash_at_any_change(root: Path, scene: str, remote: str) -> None:
    play, disks, least = SCENES[scene]
    async with tale_of(root, remote, disks=disks) as tale:
        await play(tale)
        count = 0
        for when, show in tale.states():
            show(root / "crashed")
            await tale.check(root / "crashed", when)
            count += 1
        assert len(tale.changes) >= least
        assert count >= least


def show_half_merged(tale: Tale, root: Path) -> str:
    """The second state that shows a merge under way: some blocks were moved, others not."""
    shown = 0
    for when, show in tale.states():
        show(root)
        shown += any(root.glob("xo-vm-backups/*/vdis/*/*/.*.merge.json"))
        if shown == 2:
            return when
    raise AssertionError("no merge was recorded")


@pytest.mark.slow
@pytest.mark.parametrize("remote", KINDS)
async def test_after_a_crash_of_the_recovery(root: Path, remote: str) -> None:
    """The run is cut where its merge is half done, the recovery anywhere again."""
    async with tale_of(root, remote) as tale:
        await a_run_that_merges_three(tale)
        crashed, again = root / "crashed", root / "crashed again"
        when = show_half_merged(tale, crashed)
        shutil.copytree(crashed, root / "cut")
        async with tale.opened(crashed) as remote_opened:
            recorder = Recording(remote_opened)
            await tale.recover(recorder)
        assert len(recorder.changes) > 5, when
        for then, show_again in crash_states(recorder.changes, start=root / "cut"):
            show_again(again)
            await tale.check(again, f"{when}; recovery {then}")
