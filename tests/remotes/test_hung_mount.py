"""A mount whose server stops answering: a real file system in user space, stopped by a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Busy, ProxyError, Unreachable
from proxy.remotes import Remote, lane, locking, mounted, mounts, open_remote
from proxy.remotes.mounted import MountedRemote
from proxy.remotes.retry import Retry
from tests.remotes.conftest import tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.remotes.server import Server

PATIENCE = 0.5


class Hanging:
    """The server of the remotes that are opened from now on."""

    def __init__(self, server: Server) -> None:
        self.server = server
        server.hang_on_demand()
        self.options = dataclasses.replace(server.options, operation_seconds=PATIENCE)

    def stop(self) -> None:
        os.kill(self.server.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.server.pid, signal.SIGCONT)

    def die(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)

    async def open(self) -> MountedRemote:
        remote = await open_remote({"url": self.server.url, "id": "hung"}, options=self.options)
        assert isinstance(remote, MountedRemote)
        return remote


@pytest.fixture
def hanging(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    if shutil.which("bindfs") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("bindfs or /dev/fuse is missing")
    monkeypatch.setattr(lane, "_CANCEL_SECONDS", 0.2)
    monkeypatch.setattr(lane, "_END_SECONDS", 0.1)
    monkeypatch.setattr(mounted, "_INFO_SECONDS", 0.3)
    monkeypatch.setattr(mounts, "_ASK_SECONDS", 1.0)
    monkeypatch.setattr(mounts, "_SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(mounts, "_UNMOUNT_SECONDS", 0.3)
    monkeypatch.setattr(mounts, "_LAZY_SECONDS", 0.5)
    found = Hanging(server)
    yield found
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        found.die()


@pytest.fixture
async def remote(hanging: Hanging) -> AsyncIterator[MountedRemote]:
    found = await hanging.open()
    found.lane.breaker._first_pause = found.lane.breaker._pause = 0.1
    yield found
    with contextlib.suppress(ProcessLookupError):
        hanging.go_on()
    assert await found.lane.wait_idle(5)
    await found.aclose()
    assert hanging.server.mounted() == []


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


async def until_it_works(remote: Remote) -> None:
    with trio.fail_after(10):
        while True:
            try:
                await remote.stat("")
            except Unreachable:
                await trio.sleep(0.05)
            else:
                return


async def test_the_daemon_and_another_remote_go_on(
    hanging: Hanging, remote: MountedRemote, tmp_path: Path
) -> None:
    await remote.write_file("f", b"before")
    hanging.server.behave("")
    other = await open_remote(
        {"url": f"nfs://server:{tmp_path}/other"}, options=hanging.server.options
    )
    hanging.stop()
    codes: list[str] = []

    async def use(number: int) -> None:
        with pytest.raises(Unreachable) as caught:
            await remote.write_file(f"late{number}", b"x")
        codes.append(caught.value.code)

    async with trio.open_nursery() as nursery:
        for number in range(40):  # more than there are threads
            nursery.start_soon(use, number)
        await trio.sleep(0.05)
        for number in range(3):
            await other.write_file(f"f{number}", b"x")
        assert codes == []
    assert codes == ["ETIMEDOUT"] * 40
    with within(PATIENCE), pytest.raises(Unreachable, match="does not answer since") as caught:
        await Retry(remote).read_file("f")  # neither waits nor tries again
    assert caught.value.data["lastError"].startswith("ETIMEDOUT")
    await other.aclose()
    hanging.go_on()
    await until_it_works(remote)
    await remote.lane.wait_idle(5)
    # nothing of what was told to have failed appears afterwards
    assert [name for name in tree(hanging.server.share) if not name.startswith(".")] == ["f"]


async def test_get_info_of_a_hung_mount_answers_in_time(
    hanging: Hanging, remote: MountedRemote
) -> None:
    assert (await remote.info()).size
    hanging.stop()
    for _ in range(3):
        with within(1), pytest.raises(Unreachable) as caught:
            await Retry(remote).info()
        assert caught.value.code == "ETIMEDOUT"


async def test_opening_a_hung_mount_again_answers_in_time(
    hanging: Hanging, remote: MountedRemote
) -> None:
    hanging.stop()
    with within(3), pytest.raises(Unreachable):
        await hanging.open()
    assert remote.lane.breaker.outage is not None


async def test_bytes_that_come_too_late_fill_nobodys_buffer(
    hanging: Hanging, remote: MountedRemote
) -> None:
    """The buffer belongs to another transfer by then."""
    (hanging.server.share / "f").write_bytes(b"A" * 4096)
    buffer = bytearray(b"-" * 4096)
    async with remote.open_read("f") as file:
        hanging.stop()
        with pytest.raises(Unreachable):
            await file.read_into_at(0, memoryview(buffer))
        hanging.go_on()
        await remote.lane.wait_idle(5)
    assert buffer == b"-" * 4096


async def test_a_file_whose_write_hung_is_never_made_final(
    hanging: Hanging, remote: MountedRemote
) -> None:
    with pytest.raises(Unreachable):  # noqa: PT012 (the body is what fails)
        async with remote.create("f") as file:
            await file.write(b"x" * 100)
            hanging.stop()
            try:
                await file.write(bytes(2 * 1024 * 1024))
                await file.commit()
            finally:
                hanging.go_on()
                await until_it_works(remote)
                with pytest.raises(ProxyError):
                    await file.commit()
    await remote.lane.wait_idle(5)
    assert tree(hanging.server.share) == []


async def test_a_cancel_ends_in_time_and_its_undo_follows(
    hanging: Hanging, remote: MountedRemote
) -> None:
    hanging.options = dataclasses.replace(hanging.options, operation_seconds=60)
    with within(3), trio.move_on_after(0.2) as scope:
        async with remote.create("f") as file:
            await file.write(b"x")
            hanging.stop()
            await file.commit()
    assert scope.cancelled_caught
    hanging.go_on()
    await remote.lane.wait_idle(5)
    assert tree(hanging.server.share) in ([], ["f"])  # no half, no temporary file


async def test_a_lock_of_a_remote_that_hangs_is_lost(
    hanging: Hanging, remote: MountedRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "REFRESH_SECONDS", 0.1)
    monkeypatch.setattr(locking, "STALE_SECONDS", 1.2)
    await remote.mktree("vm")
    with within(5), pytest.raises(Busy, match="could not be refreshed"):  # noqa: PT012 (as above)
        async with remote.lock("vm", owner="run"):
            hanging.stop()
            await trio.sleep_forever()
    hanging.go_on()
    await remote.lane.wait_idle(5)
    assert tree(hanging.server.share) == ["vm"]


async def test_a_server_that_dies_is_told_at_once(hanging: Hanging, remote: MountedRemote) -> None:
    hanging.die()
    for _ in range(5):
        with within(1), pytest.raises(Unreachable) as caught:
            await remote.list("")
        assert caught.value.code in ("ENOTCONN", "ECONNABORTED")
    with pytest.raises(Unreachable, match="does not answer since") as caught:
        await remote.list("")
    assert caught.value.code in ("ENOTCONN", "ETIMEDOUT")


async def test_at_the_stop_a_hung_mount_is_detached(hanging: Hanging) -> None:
    """A last resort, and only there: until then it may come back."""
    remote = await hanging.open()
    hanging.stop()
    with pytest.raises(Unreachable):
        await remote.list("")
    with within(5):
        await remote.aclose()
    assert hanging.server.mounted() == ["hung"]
    with within(5):
        await mounts.mounts().aclose()
    assert hanging.server.mounted() == []


async def test_a_hung_mount_that_came_back_is_used_again(hanging: Hanging) -> None:
    remote = await hanging.open()
    hanging.stop()
    with pytest.raises(Unreachable):
        await remote.list("")
    await remote.aclose()
    hanging.go_on()
    assert await remote.lane.wait_idle(5)
    again = await open_until(hanging)
    assert hanging.server.mounted() == ["hung"]
    await again.write_file("f", b"")
    await again.aclose()
    assert hanging.server.mounted() == []


async def open_until(hanging: Hanging) -> MountedRemote:
    with trio.fail_after(15):
        while True:
            try:
                return await hanging.open()
            except Unreachable:
                await trio.sleep(0.2)


async def test_a_hung_mount_of_a_dead_daemon_is_left_aside(hanging: Hanging) -> None:
    first = await hanging.open()
    hanging.stop()
    old = hanging.server.pid
    mounts._mounts.set(mounts.Mounts())  # another daemon, which knows nothing of it
    second = await hanging.open()
    assert len(hanging.server.mounted()) == 2
    await second.write_file("f", b"")
    await second.aclose()
    assert hanging.server.mounted() == ["hung"]
    os.kill(old, signal.SIGCONT)
    await first.lane.wait_idle(5)
    await first.aclose()
