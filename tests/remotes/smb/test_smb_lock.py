"""One lock, taken through SMB and on the exported directory: the rules of both are one."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Busy
from proxy.remotes import locking
from tests.remotes.conftest import opened, tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from proxy.remotes import Remote
    from tests.remotes.samba import Samba

PATH = "xo-vm-backups/vm"


@pytest.fixture(autouse=True)
def placed(root: Path) -> Path:
    """The lock directory's place."""
    (root / PATH).mkdir(parents=True)
    return root / f"{PATH}.lock"


@pytest.fixture
async def smb(samba: Samba, root: Path) -> AsyncIterator[Remote]:
    async with opened(samba.url(root)) as built:
        yield built


async def test_each_side_respects_and_names_the_other(
    smb: Remote, local: Remote, root: Path, placed: Path
) -> None:
    for holder, other in ((smb, local), (local, smb)):
        async with holder.lock(PATH, owner="run-1") as lock:
            assert placed.is_dir()
            assert list(placed.iterdir()) == []  # upstream's rmdir must succeed
            assert abs(placed.stat().st_mtime - time.time()) < 2
            with pytest.raises(Busy, match="held by run-1") as caught:
                async with other.lock(PATH, owner="run-2"):
                    pytest.fail("held twice")
            assert caught.value.data["holder"]["pid"] == os.getpid()
            await lock.check()
        assert tree(root) == ["xo-vm-backups", PATH]


async def test_upstreams_lock_is_respected(smb: Remote, placed: Path) -> None:
    placed.mkdir()
    with pytest.raises(Busy, match="another program"):
        async with smb.lock(PATH, owner="run"):
            pytest.fail("held twice")
    assert placed.is_dir()


async def test_a_check_refreshes_the_mtime(smb: Remote, placed: Path) -> None:
    async with smb.lock(PATH, owner="run") as lock:
        os.utime(placed, ns=(placed.stat().st_mtime_ns - 10**9,) * 2)
        old = placed.stat().st_mtime_ns
        await lock.check()
        assert placed.stat().st_mtime_ns > old
        record = placed.parent / ".vm.lock-holder"
        assert abs(record.stat().st_mtime_ns - placed.stat().st_mtime_ns) < 10**7


@pytest.mark.parametrize("again", [False, True])
async def test_a_lock_that_somebody_took_away_is_lost_and_not_released(
    smb: Remote, placed: Path, *, again: bool
) -> None:
    with pytest.raises(Busy, match="was lost"):  # noqa: PT012 (the block is what ends)
        async with smb.lock(PATH, owner="run") as lock:
            placed.rmdir()
            if again:
                placed.mkdir()
            await lock.check()
            pytest.fail("went on")
    assert placed.is_dir() is again


async def test_losing_it_stops_the_body(
    smb: Remote, placed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "REFRESH_SECONDS", 0.2)
    with trio.fail_after(5), pytest.raises(Busy, match="was lost"):  # noqa: PT012 (the block is what ends)
        async with smb.lock(PATH, owner="run"):
            placed.rmdir()
            await trio.sleep_forever()


@pytest.mark.parametrize("made_by", ["smb", "local"])
async def test_the_lock_of_a_dead_process_of_this_machine_is_taken_at_once(
    smb: Remote, local: Remote, root: Path, placed: Path, made_by: str
) -> None:
    record = root / "xo-vm-backups/.vm.lock-holder"
    async with (smb if made_by == "smb" else local).lock(PATH, owner="run"):
        holder = json.loads(record.read_bytes())
    holder["started"] += 1  # the same pid, another process
    placed.mkdir()
    record.write_text(json.dumps(holder))
    mtime = placed.stat().st_mtime_ns
    os.utime(record, ns=(mtime, mtime))
    with trio.fail_after(5):
        async with smb.lock(PATH, owner="next"):
            with pytest.raises(Busy, match="next"):
                async with local.lock(PATH, owner="another"):
                    pytest.fail("held twice")
    assert tree(root) == ["xo-vm-backups", PATH]


async def test_a_stale_lock_is_taken_over_after_watching_it(
    smb: Remote, root: Path, placed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "STALE_SECONDS", 1.0)
    placed.mkdir()
    os.utime(placed, (time.time() - 60,) * 2)
    start = time.monotonic()
    async with smb.lock(PATH, owner="run"):
        assert time.monotonic() - start >= 1
    assert tree(root) == ["xo-vm-backups", PATH]


async def test_an_old_directory_with_files_is_no_lock_and_is_kept(
    smb: Remote, placed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "STALE_SECONDS", 0.5)
    placed.mkdir()
    (placed / "data").write_bytes(b"somebody's")
    os.utime(placed, (time.time() - 60,) * 2)
    with pytest.raises(Busy, match="holds files"):
        async with smb.lock(PATH, owner="run"):
            pytest.fail("held")
    assert (placed / "data").read_bytes() == b"somebody's"


async def test_many_tasks_of_both_sides_hold_it_one_at_a_time(smb: Remote, local: Remote) -> None:
    inside, most, turns = 0, 0, 0

    async def work(remote: Remote) -> None:
        nonlocal inside, most, turns
        async with remote.lock(PATH, owner="run", wait=20):
            inside += 1
            most = max(most, inside)
            await trio.sleep(0.01)
            inside -= 1
            turns += 1

    async with trio.open_nursery() as nursery:
        for remote in (smb, local, smb, local):
            nursery.start_soon(work, remote)
    assert (most, turns) == (1, 4)
