from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.errors import Busy, Corrupt, Refused, Unreachable
from proxy.remotes import lock as lock_module
from proxy.remotes.faults import Fail, Faults
from proxy.remotes.lock import DirectoryLock
from proxy.runtime import trouble
from proxy.runtime.threads import inline_threads
from tests.remotes.conftest import opened, tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.virtual_clock

PATH = "xo-vm-backups/vm"


@pytest.fixture(autouse=True)
def placed(root: Path) -> Path:
    """The lock directory's place."""
    (root / PATH).mkdir(parents=True)
    return root / f"{PATH}.lock"


def upstream_locks(place: Path, *, age: float = 0.0) -> None:
    """As proper-lockfile: an empty directory whose mtime is its life sign."""
    place.mkdir()
    os.utime(place, (time.time() - age,) * 2)


async def test_the_lock_is_upstreams_empty_directory(root: Path, placed: Path) -> None:
    with inline_threads():
        async with opened(f"file://{root}") as remote, remote.lock(PATH, owner="run"):
            assert placed.is_dir()
            assert list(placed.iterdir()) == []  # upstream's rmdir must succeed
            assert abs(placed.stat().st_mtime - time.time()) < 2
            beside = {path.name for path in placed.parent.iterdir()} - {"vm", "vm.lock"}
            assert all(name.startswith(".") for name in beside)  # skipped by its listing
        assert tree(root) == ["xo-vm-backups", PATH]


async def test_the_lock_is_refreshed_before_it_is_stale(root: Path, placed: Path) -> None:
    with inline_threads():
        async with opened(f"file://{root}") as remote, remote.lock(PATH, owner="run") as lock:
            for _ in range(3):
                os.utime(placed, ns=(placed.stat().st_mtime_ns - 10**9,) * 2)
                old = placed.stat().st_mtime_ns
                await trio.sleep(6)
                assert placed.stat().st_mtime_ns > old
            await lock.check()


async def test_upstreams_lock_is_respected(root: Path, placed: Path) -> None:
    upstream_locks(placed, age=4)
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            start = trio.current_time()
            with pytest.raises(Busy, match="another program") as caught:
                async with remote.lock(PATH, owner="run"):
                    pytest.fail("held twice")
            assert caught.value.code == "ELOCKED"
            assert trio.current_time() == start  # wait=0: answered at once
    assert placed.is_dir()


async def test_waiting_gets_the_lock_when_it_is_released(root: Path, placed: Path) -> None:
    """Upstream never waits."""
    upstream_locks(placed)
    with inline_threads():
        async with opened(f"file://{root}") as remote, trio.open_nursery() as nursery:

            async def release() -> None:
                await trio.sleep(4)
                placed.rmdir()

            nursery.start_soon(release)
            async with remote.lock(PATH, owner="run", wait=8):
                assert 4 <= trio.current_time() <= 5


async def test_waiting_ends(root: Path, placed: Path) -> None:
    upstream_locks(placed)
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            start = trio.current_time()
            with pytest.raises(Busy):
                async with remote.lock(PATH, owner="run", wait=3):
                    pytest.fail("held twice")
            assert 3 <= trio.current_time() - start < 4


async def test_a_stale_lock_is_taken_over_after_watching_it(root: Path, placed: Path) -> None:
    upstream_locks(placed, age=60)
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            start = trio.current_time()
            async with remote.lock(PATH, owner="run"):
                assert 10 <= trio.current_time() - start < 12
    assert tree(root) == ["xo-vm-backups", PATH]


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
async def test_a_live_lock_of_a_host_with_another_clock_is_not_stolen(
    root: Path, placed: Path, skew: float
) -> None:
    """Upstream takes a live lock over when the clocks of two hosts differ by 10 s."""
    upstream_locks(placed, age=skew)
    with inline_threads():
        async with opened(f"file://{root}") as remote, trio.open_nursery() as nursery:

            async def keep_fresh() -> None:
                for beat in range(1, 100):
                    await trio.sleep(5)
                    os.utime(placed, (time.time() - skew + 5 * beat,) * 2)

            nursery.start_soon(keep_fresh)
            with trio.fail_after(8), pytest.raises(Busy):  # one life sign is enough
                async with remote.lock(PATH, owner="run"):
                    pytest.fail("stolen")
            nursery.cancel_scope.cancel()
    assert placed.is_dir()


async def test_the_lock_of_a_dead_process_of_this_machine_is_taken_at_once(
    root: Path, placed: Path
) -> None:
    record = root / "xo-vm-backups/.vm.lock-holder"
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            async with remote.lock(PATH, owner="run"):
                holder = json.loads(record.read_bytes())
            holder["started"] += 1  # the same pid, another process
            upstream_locks(placed)
            record.write_text(json.dumps(holder))
            mtime = placed.stat().st_mtime_ns
            os.utime(record, ns=(mtime, mtime))
            start = trio.current_time()
            async with remote.lock(PATH, owner="next"):
                assert trio.current_time() - start < 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff" * 9000])
async def test_a_bad_record_changes_nothing(root: Path, placed: Path, content: bytes) -> None:
    upstream_locks(placed)
    (root / "xo-vm-backups/.vm.lock-holder").write_bytes(content)
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            with pytest.raises(Busy, match="another program"):
                async with remote.lock(PATH, owner="run"):
                    pytest.fail("held twice")


async def test_weakness_9_a_lost_lock_stops_the_body_at_once(root: Path, placed: Path) -> None:
    """With upstream, the job goes on after its lock was compromised."""
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            start = trio.current_time()
            with pytest.raises(Busy, match="was lost"):  # noqa: PT012 (the block is what ends)
                async with remote.lock(PATH, owner="run"):
                    placed.rmdir()
                    placed.mkdir()
                    await trio.sleep(3600)
            assert trio.current_time() - start <= 6
    assert placed.is_dir()  # somebody else's: not ours to release


@pytest.mark.parametrize("again", [False, True])
async def test_check_tells_of_a_lost_lock(root: Path, placed: Path, *, again: bool) -> None:
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            with pytest.raises(Busy, match="was lost"):  # noqa: PT012 (the block is what ends)
                async with remote.lock(PATH, owner="run") as lock:
                    placed.rmdir()
                    if again:
                        placed.mkdir()
                    await lock.check()
                    pytest.fail("went on")


async def test_a_body_that_did_not_look_is_told_at_its_end(root: Path, placed: Path) -> None:
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            with pytest.raises(Busy, match="was lost"):  # noqa: PT012 (the block is what ends)
                async with remote.lock(PATH, owner="run") as lock:
                    placed.rmdir()
                    with pytest.raises(Busy):
                        await lock.check()


async def test_the_bodys_error_comes_out_as_it_is(root: Path) -> None:
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            with pytest.raises(ZeroDivisionError):
                async with remote.lock(PATH, owner="run"):
                    _ = 1 / 0
    assert tree(root) == ["xo-vm-backups", PATH]


async def test_a_cancelled_body_releases(root: Path) -> None:
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            with trio.move_on_after(12) as scope:
                async with remote.lock(PATH, owner="run"):
                    await trio.sleep_forever()
            assert scope.cancelled_caught
    assert tree(root) == ["xo-vm-backups", PATH]


async def test_a_cancelled_wait_leaves_the_others_lock(root: Path, placed: Path) -> None:
    upstream_locks(placed)
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            with trio.move_on_after(2) as scope:
                async with remote.lock(PATH, owner="run", wait=100):
                    pytest.fail("held twice")
            assert scope.cancelled_caught
    assert tree(root) == ["xo-vm-backups", PATH, f"{PATH}.lock"]


async def test_a_takeover_gives_back_what_was_fresh_again(root: Path, placed: Path) -> None:
    """Two that find the same stale lock: the slower must not remove the quicker one's."""
    upstream_locks(placed, age=60)
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            slow = DirectoryLock(remote._root, PATH, "slow")  # type: ignore[attr-defined]
            seen = slow._try()
            assert seen is not None
            placed.rmdir()
            placed.mkdir()
            fresh = placed.stat()
            looks = iter([seen.identity])  # the look before the rename came too early
            look = lock_module._identity
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    lock_module, "_identity", lambda status: next(looks, None) or look(status)
                )
                assert not slow._take_over(seen.identity)
    assert os.path.samestat(placed.stat(), fresh)
    assert tree(root) == ["xo-vm-backups", PATH, f"{PATH}.lock"]


async def test_an_old_directory_with_files_is_no_lock_and_is_kept(root: Path, placed: Path) -> None:
    placed.mkdir()
    (placed / "data").write_bytes(b"somebody's")
    os.utime(placed, (time.time() - 60,) * 2)
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            with pytest.raises(Busy, match="holds files"):
                async with remote.lock(PATH, owner="run"):
                    pytest.fail("held")
    assert (placed / "data").read_bytes() == b"somebody's"


async def test_the_root_cannot_be_locked(root: Path) -> None:
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            with pytest.raises(Refused):
                async with remote.lock("/", owner="run"):
                    pytest.fail("held")


@pytest.mark.parametrize(("failures", "survives"), [(3, True), (99, False)])
async def test_refreshes_may_fail_until_the_lock_could_be_stale(
    root: Path, monkeypatch: pytest.MonkeyPatch, failures: int, *, survives: bool
) -> None:
    refresh = DirectoryLock._refresh_now
    left = failures

    def failing(self: DirectoryLock) -> str | None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise Unreachable("no answer", code="ETIMEDOUT")
        return refresh(self)

    monkeypatch.setattr(DirectoryLock, "_refresh_now", failing)
    outcome = "went on"
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            try:
                async with remote.lock(PATH, owner="run"):
                    await trio.sleep(30)
            except Busy as error:
                outcome = error.message
    assert trio.current_time() == (30 if survives else 9)
    assert ("could not be refreshed: no answer" in outcome) is not survives
    assert tree(root) == ["xo-vm-backups", PATH]


# -- the next run


@pytest.fixture
def told() -> Iterator[list[dict[str, Any]]]:
    """What is told of undos that failed."""
    heard: list[dict[str, Any]] = []
    token = trouble.listener.set(lambda message, data: heard.append({"message": message, **data}))
    yield heard
    trouble.listener.reset(token)


async def locked_at_once(remote: Any) -> None:
    start = trio.current_time()
    async with remote.lock(PATH, owner="next"):
        assert trio.current_time() - start < 1


@pytest.mark.parametrize(
    "error",
    [
        Corrupt("a block is not what its header says"),
        Unreachable("the transfer broke off", code="ECONNRESET"),
        Busy("the disk is in use", code="VDI_IN_USE"),
        BaseExceptionGroup("several", [Unreachable("one"), RuntimeError("two")]),
        KeyboardInterrupt(),
    ],
)
async def test_the_run_after_a_failed_transfer_gets_the_lock(
    root: Path, error: BaseException
) -> None:
    """With upstream it fails with ELOCKED."""
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            with pytest.raises(type(error)) as caught:
                async with remote.lock(PATH, owner="run"):
                    raise error
            assert caught.value is error
            await locked_at_once(remote)
    assert tree(root) == ["xo-vm-backups", PATH]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", ["lock.acquire", "lock.held", "lock.check", "lock.release"])
async def test_the_run_after_an_error_of_any_step_gets_the_lock(
    root: Path, step: str, *, after: bool
) -> None:
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            faults = Faults(remote)
            faults.add(step, Fail(Unreachable("no answer"), after=after))
            with pytest.raises(Unreachable, match="no answer"):
                async with faults.lock(PATH, owner="run") as lock:
                    await lock.check()
            assert faults.unused == []
            await locked_at_once(remote)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_failed_release_is_told_and_stops_no_run_of_ours(
    root: Path,
    placed: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: list[dict[str, Any]],
    *,
    fails: bool,
) -> None:
    rmdir = os.rmdir
    left = 1

    def broken(name: str, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rmdir(name, **options)

    monkeypatch.setattr(os, "rmdir", broken)
    before = sorted(entry.name for entry in os.scandir("/proc/self/fd"))
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            ending = pytest.raises(Corrupt, match="own") if fails else contextlib.nullcontext()
            with ending:
                async with remote.lock(PATH, owner="run"):
                    if fails:
                        raise Corrupt("the body's own")
            assert placed.is_dir()
            assert [(one["message"], one["path"]) for one in told] == [("lock not released", PATH)]
            assert "EIO" in told[0]["error"]
            await locked_at_once(remote)
    assert sorted(entry.name for entry in os.scandir("/proc/self/fd")) == before
    assert tree(root) == ["xo-vm-backups", PATH]


HOLDER = """
import sys, trio
from proxy.remotes.local import LocalRemote

async def main():
    remote = await LocalRemote.open(sys.argv[1], url="file:///")
    async with remote.lock(sys.argv[2], owner="killed"):
        print("held", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture
def killed(root: Path, placed: Path) -> Path:
    """The lock of a process that was killed while it held it."""
    command = [sys.executable, "-c", HOLDER, str(root), PATH]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGKILL)
    return placed


async def test_the_lock_of_a_killed_process_of_this_machine_is_taken_at_once(
    root: Path, killed: Path
) -> None:
    assert killed.is_dir()
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            await locked_at_once(remote)
    assert tree(root) == ["xo-vm-backups", PATH]


@pytest.mark.parametrize(("age", "wait"), [(0, 11), (12, 0)])
async def test_the_lock_of_a_killed_process_elsewhere_is_taken_when_stale(
    root: Path, killed: Path, age: int, wait: float
) -> None:
    """What its record says means nothing on another machine."""
    (root / "xo-vm-backups/.vm.lock-holder").unlink()
    os.utime(killed, (time.time() - age,) * 2)
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            start = trio.current_time()
            async with remote.lock(PATH, owner="next", wait=wait):
                assert 10 <= trio.current_time() - start < 12
    assert tree(root) == ["xo-vm-backups", PATH]
