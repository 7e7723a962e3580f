from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused, Unreachable
from proxy.remotes import new_file, posix
from tests.remotes.conftest import opened, tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from proxy.remotes import Remote


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this machine may not mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    place = tmp_path / "outside"
    place.mkdir()
    (place / "shadow").write_bytes(b"root's")
    return place


@pytest.mark.parametrize("kernel", [True, False])
async def test_a_link_is_not_followed_by_anything(
    local: Remote, root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, *, kernel: bool
) -> None:
    """With a kernel that finds a path without links in one step, and without."""
    if not kernel:
        monkeypatch.setattr(posix, "open_beneath", lambda *_: None)
    (root / "deep/er").mkdir(parents=True)
    (root / "deep/er/dir").symlink_to(outside)
    (root / "deep/loop").symlink_to(root / "deep/er")
    (root / "dir").symlink_to(outside)
    (root / "file").symlink_to(outside / "shadow")
    for call in (
        local.read_file("file"),
        local.read_file("dir/shadow"),
        local.read_file("deep/er/dir/shadow"),
        local.list("deep/loop"),
        local.mktree("deep/loop/new"),
        local.write_file("dir/new", b""),
        local.list("dir"),
        local.unlink("dir/shadow"),
        local.mktree("dir/new"),
        local.rename("dir/shadow", "stolen"),
    ):
        with pytest.raises(Refused) as caught:
            await call
        assert caught.value.code == "ELOOP"
    await local.write_file("file", b"ours")  # replaces the link itself
    assert tree(outside) == ["shadow"]
    assert (outside / "shadow").read_bytes() == b"root's"


async def test_rmtree_removes_links_and_not_what_they_show(
    local: Remote, root: Path, outside: Path
) -> None:
    await local.write_file("t/f", b"")
    (root / "t/link").symlink_to(outside)
    await local.rmtree("t")
    assert tree(root) == []
    assert tree(outside) == ["shadow"]


async def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    async with opened(f"file://{tmp_path}/link") as remote:
        await remote.write_file("f", b"x")
    assert tree(tmp_path / "disk") == ["f"]


async def test_modes(local: Remote, root: Path) -> None:
    await local.write_file("d/f", b"x")
    assert (root / "d").stat().st_mode & 0o777 == 0o700
    assert (root / "d/f").stat().st_mode & 0o777 == 0o644


async def test_a_pipe_is_not_waited_for(local: Remote, root: Path) -> None:
    os.mkfifo(root / "pipe")
    with trio.fail_after(2), pytest.raises(ProxyError, match="not a regular file"):
        await local.read_file("pipe")


async def test_a_removed_root_is_not_an_empty_remote(local: Remote, root: Path) -> None:
    """Never delete on doubt: `not found` would look like backups that are gone."""
    await local.write_file("xo-vm-backups/vm/a.json", b"{}")
    shutil.rmtree(root)
    with pytest.raises(Unreachable) as caught:
        await local.list("xo-vm-backups")
    assert caught.value.code == "ESTALE"


async def test_a_root_under_a_new_mount_is_noticed(local: Remote, root: Path) -> None:
    root.rename(root.with_name("moved"))
    root.mkdir()
    with pytest.raises(Unreachable, match="ESTALE"):
        await local.info()


async def test_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    async with opened(f"file://{small_disk}") as remote:
        with pytest.raises(Refused, match="free space") as caught:
            await remote.write_file("d/big", bytes(9 << 20))
        assert caught.value.code == "ENOSPC"
        with pytest.raises(Refused) as caught:  # noqa: PT012 (one of the writes fails)
            async with remote.create("d/big.xva") as file:
                for _ in range(9):
                    await file.write(bytes(1 << 20))
        assert caught.value.code == "ENOSPC"
        assert tree(small_disk) == ["d"]
        await remote.write_file("d/small", b"fits again")


async def test_a_full_disk_leaves_nothing_on_an_immutable_remote(small_disk: Path) -> None:
    async with opened(f"file://{small_disk}?immutable=true") as remote:
        with pytest.raises(Refused, match="ENOSPC"):
            await remote.write_file("big", bytes(9 << 20))
    assert tree(small_disk) == []


async def test_a_read_only_remote_reads_and_says_why_it_does_not_write(
    small_disk: Path,
) -> None:
    (small_disk / "f").write_bytes(b"x")
    async with opened(f"file://{small_disk}") as remote:
        mount("-o", "remount,ro", str(small_disk))
        assert await remote.read_file("f") == b"x"
        for call in (remote.write_file("g", b""), remote.unlink("f"), remote.mktree("d")):
            with pytest.raises(Refused, match="read-only") as caught:
                await call
            assert caught.value.code == "EROFS"
    async with opened(f"file://{small_disk}") as remote:  # and so it does when it is opened anew
        assert await remote.read_file("f") == b"x"
        with pytest.raises(Refused, match="read-only"):
            await remote.write_file("g", b"")


async def test_a_short_write_is_continued(local: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def short(descriptor: int, data: memoryview) -> int:
        return write(descriptor, data[:7])

    monkeypatch.setattr(os, "write", short)
    await local.write_file("f", bytes(range(100)))
    assert await local.read_file("f") == bytes(range(100))


async def test_bytes_that_vanished_are_noticed_before_the_name_is_given(
    local: Remote, root: Path
) -> None:
    """The effect is verified, not the command."""

    async def write() -> None:
        async with local.create("f") as file:
            await file.write(bytes(1000))
            os.truncate(root / file.temporary_path, 10)
            await file.commit()

    with pytest.raises(Corrupt, match="10 bytes after 1000"):
        await write()
    assert tree(root) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
async def test_a_failed_fsync_gives_no_name(
    local: Remote, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Upstream never fsyncs: a crash leaves truncated JSON."""
    await local.write_file("f", b"old")

    def fail(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ProxyError) as caught:
        await local.write_file("f", b"new")
    assert caught.value.code == errno.errorcode[number]
    assert (root / "f").read_bytes() == b"old"
    assert tree(root) == ["f"]


async def test_order_of_a_durable_write(local: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, then the name, then the directory: no crash shows a name without its bytes."""
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        steps.append("fsync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync")
        fsync(descriptor)

    def noted_rename(*args: Any, **kwargs: Any) -> None:
        steps.append("rename")
        rename(*args, **kwargs)

    await local.mktree("d")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    await local.write_file("d/f", b"x")
    await local.unlink("d/f")
    assert steps == ["fsync", "rename", "fsync directory", "fsync directory"]


async def test_early_write_back_keeps_every_byte(
    local: Remote, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_file, "_WINDOW", 64 * 1024)
    data = os.urandom(1_000_001)
    async with local.create("f") as file:
        for start in range(0, len(data), 100_000):
            await file.write(data[start : start + 100_000])
        await file.commit()
    assert (root / "f").read_bytes() == data


async def test_a_cancel_during_a_write_waits_for_the_thread_and_leaves_nothing(
    local: Remote, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    write = os.write

    def slow(descriptor: int, data: memoryview) -> int:
        started.set()
        assert go_on.wait(5)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def backup() -> None:
                async with local.create("f.xva") as file:
                    await file.write(b"x")
                    await file.commit()

            nursery.start_soon(backup)
            await trio.to_thread.run_sync(started.wait, 5)
            assert len(tree(root)) == 1
            scope.cancel()
            go_on.set()
    assert tree(root) == []


async def test_a_cancel_during_the_last_fsync_gives_no_name(
    local: Remote, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    scope = trio.CancelScope()

    def cancelling(descriptor: int) -> None:
        trio.from_thread.run_sync(scope.cancel)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", cancelling)
    with scope:
        async with local.create("f.xva") as file:
            await file.write(b"x")
            await file.commit()
    assert scope.cancelled_caught
    assert tree(root) == []


async def test_no_rename_without_replacing_falls_back_to_a_link(
    local: Remote, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS has none."""
    monkeypatch.setattr(new_file, "rename_no_replace", lambda *_: False)
    await local.write_file("f", b"1", exclusive=True)
    monkeypatch.setattr(new_file.NewFile, "_refuse_taken", lambda *_: None)
    with pytest.raises(ProxyError) as caught:
        await local.write_file("f", b"2", exclusive=True)
    assert caught.value.code == "EEXIST"
    assert (root / "f").read_bytes() == b"1"
    assert tree(root) == ["f"]


async def test_a_deep_tree_is_removed(local: Remote, root: Path) -> None:
    await local.mktree("/".join(["d"] * 150))
    await local.rmtree("d")
    assert tree(root) == []


async def test_no_descriptor_is_left(local: Remote, root: Path) -> None:
    async def work() -> None:
        await local.write_file("a/b/c", b"x")
        await local.read_file("a/b/c")
        async with local.open_read("a/b/c") as file:
            await file.read_at(0, 1)
        async with local.create("a/d") as new:
            await new.write(b"x")
        async with local.lock("a/b", owner="me"):
            pass
        for call in (local.read_file("a/none"), local.read_file("a"), local.list("a/b/c/d")):
            with pytest.raises(ProxyError):
                await call

    await work()
    before = sorted(entry.name for entry in os.scandir("/proc/self/fd"))
    await work()
    assert sorted(entry.name for entry in os.scandir("/proc/self/fd")) == before


async def test_not_found_keeps_its_errno(local: Remote) -> None:
    await local.write_file("f", b"")
    with pytest.raises(NotFound) as caught:
        await local.unlink("f/g")
    assert caught.value.code == "ENOTDIR"


@pytest.mark.parametrize(("fills", "gone"), [(2, True), (99, False)])
async def test_a_tree_that_somebody_fills_meanwhile(
    local: Remote, root: Path, monkeypatch: pytest.MonkeyPatch, fills: int, *, gone: bool
) -> None:
    await local.write_file("t/f", b"")
    rmdir = posix.Root.rmdir
    left = fills

    def late(self: posix.Root, path: str) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            (root / "t/late").touch()
        rmdir(self, path)

    monkeypatch.setattr(posix.Root, "rmdir", late)
    if gone:
        await local.rmtree("t")
    else:
        with pytest.raises(Conflict, match="ENOTEMPTY"):
            await local.rmtree("t")
    assert (root / "t").exists() is not gone
