"""Edits, batches and renames of the local remote: what only a file system can do to them."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.errors import Conflict, NotFound, ProxyError, Refused, Unreachable
from proxy.remotes import deferred, syscalls
from proxy.remotes.deferred import EditedFile, Files, Renames
from proxy.remotes.posix import Root
from tests.remotes.conftest import opened, tree
from tests.remotes.test_local import mount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxy.remotes import Remote


@pytest.fixture
def place(root: Path) -> Iterator[Root]:
    built = Root(str(root))
    built.open()
    yield built
    built.close()


@pytest.fixture(params=[True, False], ids=["together", "one by one"])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of a batch, whatever the file system of the tests is."""
    monkeypatch.setattr(deferred, "tells_lost_writes", lambda _: request.param)
    return bool(request.param)


def descriptors() -> list[str]:
    return sorted(entry.name for entry in os.scandir("/proc/self/fd"))


def shown(descriptor: int, root: Path) -> str:
    """The path of what it is open on, from the root."""
    return os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), root)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, *, times: int = 1) -> None:
    """The next ``times`` calls of ``os.<name>`` fail."""
    real = getattr(os, name)
    left = times

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    monkeypatch.setattr(os, name, fail)


# -- edits


async def test_an_edit_follows_no_link_and_waits_for_no_pipe(
    local: Remote, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").write_bytes(b"root's")
    (root / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "pipe")
    for name, code in (("link", "ELOOP"), ("pipe", "EISDIR")):
        with trio.fail_after(2), pytest.raises(ProxyError) as caught:
            async with local.edit(name):
                pytest.fail("opened")
        assert caught.value.code == code
    assert (tmp_path / "outside").read_bytes() == b"root's"


def test_a_short_write_is_continued(place: Root, root: Path, monkeypatch: Any) -> None:
    (root / "f").write_bytes(bytes(10))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    file = EditedFile(place, "f")
    file.write_at(5, bytes(range(100)))
    file.close()
    assert (root / "f").read_bytes() == bytes(5) + bytes(range(100))


def test_a_failed_sync_stays_failed(place: Root, root: Path, monkeypatch: Any) -> None:
    """The kernel calls lost pages clean: a second fsync succeeds."""
    (root / "f").write_bytes(b"")
    file = EditedFile(place, "f")
    failing(monkeypatch, "fdatasync", errno.EIO)
    for _ in range(2):
        with pytest.raises(ProxyError, match="EIO"):
            file.sync()
    file.close()


def test_closing_waits_for_the_thread_that_writes(
    place: Root, root: Path, monkeypatch: Any
) -> None:
    """Its descriptor would be another file's by then."""
    (root / "f").write_bytes(b"")
    started, go_on = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        started.set()
        assert go_on.wait(5)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    file = EditedFile(place, "f")
    writer = threading.Thread(target=file.write_at, args=(0, b"whole"))
    closer = threading.Thread(target=file.close)
    writer.start()
    assert started.wait(5)
    closer.start()
    assert closer.is_alive()
    go_on.set()
    writer.join(5)
    closer.join(5)
    assert (root / "f").read_bytes() == b"whole"
    calls: list[Callable[[], None]] = [
        lambda: file.write_at(0, b"x"),
        file.sync,
        lambda: file.truncate(0),
    ]
    for call in calls:
        with pytest.raises(Refused, match="closed"):
            call()
    file.close()


async def test_what_leaving_an_edit_finds_is_not_told_for_the_bodys_error(
    local: Remote, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "f").write_bytes(b"")
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 (the block is what ends)
        async with local.edit("f") as file:
            await file.write_at(0, b"x")
            failing(monkeypatch, "close", errno.EIO)
            _ = 1 / 0


# -- batches


@pytest.mark.usefixtures("together")
def test_a_batch_replaces_a_link_a_pipe_or_one_of_two_names_itself(
    place: Root, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").write_bytes(b"root's")
    (root / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "pipe")
    (root / "first").write_bytes(b"both")
    (root / "second").hardlink_to(root / "first")
    (root / "dir").symlink_to(tmp_path)
    files = Files(place)
    for name in ("link", "pipe", "second"):
        files.write(name, b"ours")
        assert stat.S_ISREG((root / name).lstat().st_mode)
        assert (root / name).read_bytes() == b"ours"
    with pytest.raises(Refused, match="ELOOP"):
        files.write("dir/f", b"")
    files.sync()
    files.close()
    assert (tmp_path / "outside").read_bytes() == b"root's"
    assert (root / "first").read_bytes() == b"both"


def test_everything_is_synced_that_was_written(
    place: Root, root: Path, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        steps.append(shown(descriptor, root))
        fsync(descriptor)

    (root / "d").mkdir()
    (root / "e").mkdir()
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(deferred, "sync_file_system", lambda _: steps.append("all"))
    files = Files(place)
    for name in ("d/a", "e/a", "d/b"):
        files.write(name, b"x")
    files.sync()
    files.close()
    assert steps == (["all"] if together else ["d/a", "e/a", "d/b", "d", "e"])


def test_what_is_mounted_below_is_synced_too(
    root: Path, place: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sync of the root's file system would not reach it."""
    (root / "xo-vm-backups").mkdir()
    mount("-t", "tmpfs", "tmpfs", str(root / "xo-vm-backups"))
    try:
        monkeypatch.setattr(deferred, "tells_lost_writes", lambda _: True)
        synced: list[str] = []
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            synced.append(shown(descriptor, root))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        files = Files(place)
        files.write("here", b"x")
        files.write("xo-vm-backups/there", b"x")
        files.sync()
        files.close()
        assert synced == ["xo-vm-backups/there", "xo-vm-backups"]
    finally:
        subprocess.run(["umount", "-l", str(root / "xo-vm-backups")], check=True)


def large(files: Files, count: int) -> None:
    for number in range(count):
        files.write(f"d/{number}", bytes(deferred._BULK))


def test_large_files_leave_the_page_cache_and_few_stay_open(
    place: Root, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[str] = []

    def noted(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        given_back.append(shown(descriptor, root))

    monkeypatch.setattr(deferred, "tells_lost_writes", lambda _: True)
    monkeypatch.setattr(os, "posix_fadvise", noted)
    before = len(descriptors())
    files = Files(place)
    large(files, 2 * deferred._BEHIND)
    assert given_back == [f"d/{number}" for number in range(deferred._BEHIND)]
    assert len(descriptors()) <= before + 1 + deferred._BEHIND
    files.sync()
    assert len(given_back) == 2 * deferred._BEHIND
    files.close()
    assert len(descriptors()) == before


def test_a_batch_that_is_closed_early_leaves_nothing_open(
    place: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "tells_lost_writes", lambda _: True)
    before = descriptors()
    files = Files(place)
    large(files, 3)

    def closing(*args: Any) -> bool:
        files.close()
        return sync_range(*args)

    sync_range = syscalls.sync_range
    monkeypatch.setattr(deferred, "sync_range", closing)
    large(files, 1)  # under way while another thread closes
    assert descriptors() == before


def test_a_loss_seen_while_writing_behind_is_told_with_the_file_it_struck(
    place: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "tells_lost_writes", lambda _: True)
    files = Files(place)
    large(files, deferred._BEHIND)

    def fail(*args: Any) -> bool:
        if args[-1] == syscalls.SYNC_AND_WAIT:
            raise OSError(errno.EIO, "lost")
        return True

    monkeypatch.setattr(deferred, "sync_range", fail)
    with pytest.raises(Unreachable, match=r"EIO.*'d/0'"):
        files.write("d/last", bytes(deferred._BULK))
    files.close()


def test_a_failed_commit_stays_failed(place: Root, together: bool, monkeypatch: Any) -> None:
    """syncfs and fsync tell each loss only once."""
    errors = [OSError(errno.EIO, "lost")]

    def fail(_descriptor: int) -> None:
        if errors:
            raise errors.pop()

    files = Files(place)
    files.write("f", b"x")
    monkeypatch.setattr(deferred, "sync_file_system" if together else "sync_directory", fail)
    for _ in range(2):
        with pytest.raises(Unreachable, match="EIO"):
            files.sync()
    files.close()


@pytest.mark.usefixtures("together")
def test_a_closed_batch_refuses(place: Root) -> None:
    files = Files(place)
    files.close()
    files.close()
    calls: list[Callable[[], None]] = [lambda: files.write("f", b""), files.sync]
    for call in calls:
        with pytest.raises(Refused, match="closed"):
            call()


@pytest.mark.usefixtures("together")
def test_a_directory_that_goes_meanwhile_is_made_again(place: Root, root: Path) -> None:
    files = Files(place)
    files.write("d/e/a", b"a")
    shutil.rmtree(root / "d")
    files.write("d/e/b", b"b")
    files.sync()
    files.close()
    assert tree(root) == ["d", "d/e", "d/e/b"]


@pytest.mark.usefixtures("together")
def test_a_removed_root_is_told(place: Root, root: Path) -> None:
    files = Files(place)
    root.rmdir()
    with pytest.raises(Unreachable, match="ESTALE"):
        files.write("f", b"")
    with pytest.raises(Unreachable, match="ESTALE"):
        Renames(place).run([("a", "b")])
    files.close()


@pytest.fixture
def lossy_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that takes every write and loses what does not fit when writing it back."""
    below, place = tmp_path / "below", tmp_path / "lossy"
    below.mkdir()
    place.mkdir()
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4")
    mount("-t", "tmpfs", "-o", "size=6m", "tmpfs", str(below))
    try:
        image = below / "image"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(
            ["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True, capture_output=True
        )
        mount("-o", "loop,errors=continue", str(image), str(place))
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=False, capture_output=True)
        subprocess.run(["umount", "-l", str(below)], check=False, capture_output=True)


async def test_a_commit_tells_of_what_a_real_disk_lost(lossy_disk: Path) -> None:
    """Each write succeeds, into memory: the commit must not."""
    async with opened(f"file://{lossy_disk}") as remote:
        block = os.urandom(1 << 20)
        with pytest.raises(ProxyError) as caught:  # noqa: PT012 (the last step is what fails)
            async with remote.batch() as batch:
                for number in range(16):
                    await batch.write(f"d/{number}", block)
                await batch.commit()
        assert caught.value.code in ("EIO", "ENOSPC")


async def test_a_sync_of_an_edit_tells_of_what_a_real_disk_lost(lossy_disk: Path) -> None:
    async with opened(f"file://{lossy_disk}") as remote:
        await remote.write_file("f", b"small")
        with pytest.raises(ProxyError):  # noqa: PT012 (the last step is what fails)
            async with remote.edit("f") as file:
                for number in range(16):
                    await file.write_at(number << 20, os.urandom(1 << 20))
                await file.sync()


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount("-t", "overlay", "overlay", "-o", options, str(tmp_path / "merged"))
    yield tmp_path / "merged"
    subprocess.run(["umount", "-l", str(tmp_path / "merged")], check=True)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "memory").mkdir()
    mount("-t", "tmpfs", "tmpfs", str(tmp_path / "memory"))
    yield tmp_path / "memory"
    subprocess.run(["umount", "-l", str(tmp_path / "memory")], check=True)


def tells(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        return syscalls.tells_lost_writes(descriptor)
    finally:
        os.close(descriptor)


def test_file_systems_that_tell_what_they_lost(memory: Path, overlay: Path) -> None:
    assert tells(memory)
    assert not tells(overlay)
    assert not tells(Path("/proc"))


@pytest.mark.parametrize(
    ("release", "told"),
    [
        ("5.7.19", False),
        ("4.19.0+1", False),
        ("5.8-rc1", True),
        ("6.1.0-9-amd64", True),
        ("x", False),
    ],
)
def test_kernels_that_tell_what_they_lost(
    memory: Path, monkeypatch: pytest.MonkeyPatch, release: str, *, told: bool
) -> None:
    uname = os.uname_result(("Linux", "host", release, "", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: uname)
    assert tells(memory) is told


@pytest.mark.parametrize("kind", ["overlay", "memory"])
async def test_a_batch_works_on_other_file_systems(
    request: pytest.FixtureRequest, kind: str
) -> None:
    place: Path = request.getfixturevalue(kind)
    async with opened(f"file://{place}") as remote, remote.batch() as batch:
        await batch.write("d/f", b"x")
        await batch.commit()
    assert tree(place) == ["d", "d/f"]


# -- renames


def test_new_names_are_durable_before_old_ones_go(
    place: Root, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("a/1", "b/2", "c/3"):
        (root / name).parent.mkdir()
        (root / name).touch()
    fsync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        steps.append(shown(descriptor, root))
        fsync(descriptor)

    def noted_rename(old: str, new: str, **options: Any) -> None:
        steps.append(f"{old} to {new}")
        rename(old, new, **options)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", noted_rename)
    renames = Renames(place)
    renames.run([("a/1", "b/1"), ("b/2", "c/2"), ("c/3", "c/4")])
    renames.sync()
    renames.sync()
    assert steps == ["1 to 1", "2 to 2", "3 to 4", "b", "c", "a"]


def test_few_directories_are_open_at_once(
    place: Root, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a").mkdir()
    for number in range(80):
        (root / f"a/{number}").touch()
    before = len(descriptors())
    most = 0
    rename = os.rename

    def counting(*args: Any, **options: Any) -> None:
        nonlocal most
        most = max(most, len(descriptors()) - before)
        rename(*args, **options)

    monkeypatch.setattr(os, "rename", counting)
    renames = Renames(place)
    renames.run([(f"a/{number}", f"b/{number}/x") for number in range(80)])
    renames.sync()
    assert most in (63, 64)  # two directories at a time
    assert len(descriptors()) == before
    assert len(list((root / "b").glob("*/x"))) == 80


@pytest.mark.parametrize("moved", [True, False])
def test_directories_that_go_meanwhile(
    place: Root, root: Path, monkeypatch: pytest.MonkeyPatch, *, moved: bool
) -> None:
    """Held open, they are no longer what their paths show."""
    (root / "a").mkdir()
    for number in range(4):
        (root / f"a/{number}").touch()
    renames = Renames(place)
    renames.run([("a/0", "b/0")])
    if moved:
        (root / "a").rename(root / "moved")
        assert renames.missing == []
        renames.run([("moved/1", "b/1"), ("moved/none", "b/none")], first=1)
        assert renames.missing == [2]
    else:
        shutil.rmtree(root / "b")
        renames.run([("a/1", "b/1")], first=1)
    renames.sync()
    assert (root / "b/1").exists()


@pytest.mark.parametrize("fails", ["rename", "fsync"])
async def test_after_an_error_what_was_renamed_is_durable_and_nothing_open(
    local: Remote, root: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    for name in ("a", "b"):
        await local.write_file(f"c/{name}", b"")
    await local.mktree("p")
    before = descriptors()
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        if fails == "fsync":
            raise OSError(errno.EIO, "lost")
        synced.append(shown(descriptor, root))
        fsync(descriptor)

    def first_only(old: str, new: str, **options: Any) -> None:
        if fails == "rename" and old == "b":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(old, new, **options)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", first_only)
    with pytest.raises(Refused if fails == "rename" else Unreachable) as caught:
        await local.rename_all([("c/a", "p/a"), ("c/b", "p/b")])
    assert caught.value.code == ("EXDEV" if fails == "rename" else "EIO")
    assert synced == (["p", "c"] if fails == "rename" else [])
    assert descriptors() == before


async def test_thousands_of_renames(local: Remote, root: Path) -> None:
    for directory in ("c", "p"):
        for number in range(5):
            (root / f"{directory}/{number}").mkdir(parents=True)
    pairs = [(f"c/{n // 1000}/{n}", f"p/{n // 1000}/{n}") for n in range(5000)]
    for number, (old, new) in enumerate(pairs):
        os.close(os.open(root / old, os.O_CREAT))
        if number % 50 == 0:
            os.close(os.open(root / new, os.O_CREAT))
    (root / pairs[4999][0]).unlink()
    assert list(await local.rename_all(pairs)) == [4999]
    assert sum(1 for _ in (root / "p").glob("*/*")) == 4999
    assert list((root / "c").glob("*/*")) == []


async def test_a_link_among_the_renames_moves_itself(
    local: Remote, root: Path, tmp_path: Path
) -> None:
    (root / "link").symlink_to(tmp_path)
    assert list(await local.rename_all([("link", "d/link")])) == []
    assert (root / "d/link").is_symlink()
    for pair in (("d/link/remote", "stolen"), ("d", "d/link/given")):
        with pytest.raises(ProxyError) as caught:
            await local.rename_all([pair])
        assert caught.value.code == "ELOOP"


# -- all of them


async def test_no_descriptor_is_left(local: Remote, root: Path) -> None:
    async def work() -> None:
        await local.write_file("d/f", b"x")
        async with local.edit("d/f") as file:
            await file.write_at(0, b"y")
        async with local.batch() as batch:
            await batch.write("d/g", b"x")
            with pytest.raises(Conflict):
                await batch.write("d", b"x")
            await batch.commit()
        await local.rename_all([("d/g", "e/g"), ("d/none", "f/none")])
        for bad in ("d", ""):
            with pytest.raises(ProxyError):
                await local.rename_all([("e/g", "e/h"), ("d/f", bad)])
        with pytest.raises(NotFound):
            async with local.edit("d/none"):
                pytest.fail("opened")
        with trio.CancelScope() as scope:
            async with local.edit("d/f"), local.batch():
                scope.cancel()
                await trio.sleep_forever()

    await work()
    before = descriptors()
    await work()
    assert descriptors() == before
