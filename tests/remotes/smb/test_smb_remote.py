"""The SMB client against a real Samba; what all remotes do is in the conformance tests."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.errors import Busy, Corrupt, NotFound, ProxyError, Refused, Unauthorized, Unreachable
from proxy.remotes import Entry
from proxy.remotes.retry import Retry
from proxy.remotes.smb import remote as remote_module
from proxy.remotes.smb import wire
from proxy.remotes.smb.connection import Link
from proxy.remotes.smb.remote import SmbRemote
from proxy.runtime.secrets import scrub_text
from tests.remotes.conftest import opened, tree
from tests.remotes.samba import PASSWORD, Samba

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

MIB = 1024 * 1024


@pytest.fixture
async def smb(samba: Samba, root: Path) -> AsyncIterator[SmbRemote]:
    async with opened(samba.url(root)) as built:
        assert isinstance(built, SmbRemote)
        yield built


# -- opening


async def test_it_is_signed_and_the_newest_dialect(smb: SmbRemote) -> None:
    link = smb._bulk.link()
    assert (link.dialect, link.is_signed, link.is_encrypted) == (0x0311, True, False)


@pytest.mark.parametrize(
    ("options", "share", "shown"),
    [
        ("vers=3.0", "share", (0x0300, True, False)),
        ("vers=3.0.2,seal", "share", (0x0302, False, True)),
        ("vers=2.1", "share", (0x0210, True, False)),
        ("vers=2.0", "share", (0x0202, True, False)),
        ("seal", "share", (0x0311, False, True)),
        ("", "sealed", (0x0311, True, True)),
        ("sec=ntlmssp,rsize=65536,wsize=8192", "share", (0x0311, True, False)),
    ],
)
async def test_every_protection_carries_bytes(
    samba: Samba, root: Path, options: str, share: str, shown: tuple[int, bool, bool]
) -> None:
    content = random.Random(options).randbytes(300_001)
    async with opened(samba.url(root, options=options, share=share)) as remote:
        assert isinstance(remote, SmbRemote)
        link = remote._bulk.link()
        assert (link.dialect, link.is_signed, link.is_encrypted) == shown
        await remote.write_file("d/f", content)
        assert (root / "d/f").read_bytes() == content
        assert await remote.read_file("d/f") == content
        assert await remote.list("d") == [Entry("f", False)]


async def test_weakness_18_a_password_may_hold_what_a_url_and_options_use(
    samba: Samba, root: Path
) -> None:
    """Upstream cuts a password with '://' and hands ',' to mount as the next option."""
    assert "://" in PASSWORD
    assert "," in PASSWORD
    async with opened(samba.url(root)) as remote:
        await remote.write_file("f", b"x")
        assert PASSWORD not in remote.url


async def test_weakness_18_a_wrong_password_is_told_without_it(samba: Samba, root: Path) -> None:
    secret = "wr0ngWr0ngWr0ng"
    with pytest.raises(Unauthorized) as caught:
        async with opened(samba.url(root, password=secret)):
            pass
    error: BaseException | None = caught.value
    while error is not None:
        assert secret not in f"{error} {getattr(error, 'data', '')}"
        error = error.__cause__
    assert secret not in scrub_text(samba.url(root, password=secret))
    assert not root.exists()


async def test_a_missing_share_is_named(samba: Samba, root: Path) -> None:
    with pytest.raises(NotFound, match="no share 'none'"):
        async with opened(samba.url(root, share="none")):
            pass


async def test_a_share_that_may_not_be_written_can_be_read(samba: Samba, root: Path) -> None:
    (root / "d").mkdir(parents=True)
    (root / "d/f").write_bytes(b"old")
    async with opened(samba.url(root, share="readonly", options="ro")) as remote:
        assert await remote.read_file("d/f") == b"old"
        for call in (remote.write_file("g", b""), remote.unlink("d/f"), remote.mktree("x")):
            with pytest.raises(Refused) as caught:
                await call
            assert caught.value.code == "EROFS"
    async with opened(samba.url(root, share="readonly")) as remote:
        with pytest.raises(Refused) as caught:
            await remote.write_file("g", b"")
        assert caught.value.code in ("EACCES", "EROFS")
    assert tree(root) == ["d", "d/f"]


async def test_a_guest_is_refused_unless_the_options_say_so(samba: Samba, root: Path) -> None:
    url = samba.url(root, share="open", password="x").replace(f"//{samba.user}:", "//nobody-here:")
    with pytest.raises(Unauthorized, match="guest"):
        async with opened(url):
            pass
    url = samba.url(root, share="open", options="guest,user=nobody-here", password="x")
    async with opened(url) as remote:
        await remote.write_file("f", b"anybody's")
        assert await remote.read_file("f") == b"anybody's"


async def test_nobody_listens(samba: Samba, root: Path) -> None:
    url = samba.url(root).replace(f"port%3D{samba.port}", "port%3D1")
    with pytest.raises(Unreachable, match="port 1 ") as caught:
        async with opened(url):
            pass
    assert caught.value.code == "ECONNREFUSED"


@pytest.mark.parametrize("noise", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\x44" * 40])
async def test_something_else_listens(samba: Samba, root: Path, noise: bytes) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        if noise:
            await stream.send_all(noise)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, answer, 0)
        port = listeners[0].socket.getsockname()[1]
        url = samba.url(root).replace(f"port%3D{samba.port}", f"port%3D{port}")
        with trio.fail_after(5), pytest.raises(Unreachable):
            async with opened(url):
                pass
        nursery.cancel_scope.cancel()


async def test_nothing_is_left_when_it_is_closed(samba: Samba, root: Path) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    descriptors = len([*os.scandir("/proc/self/fd")])
    async with opened(samba.url(root)) as remote:
        await remote.write_file("f", b"x")
        await remote.list("")
        assert any(thread.name.startswith("msg_worker") for thread in threading.enumerate())
    left = [thread.name for thread in threading.enumerate() if thread.ident not in before]
    assert [name for name in left if name.startswith("msg_worker")] == []
    assert len([*os.scandir("/proc/self/fd")]) <= descriptors


# -- files


async def test_large_files_pass_both_ways(smb: SmbRemote, root: Path) -> None:
    content = random.Random(1).randbytes(11 * MIB + 12_345)
    async with smb.create("vm/disk") as file:
        for start in range(0, len(content), 2 * MIB + 512):
            await file.write(memoryview(content)[start : start + 2 * MIB + 512])
        await file.commit()
    assert (root / "vm/disk").read_bytes() == content
    got = hashlib.sha256()
    async with smb.open_read("vm/disk") as read:
        buffer = memoryview(bytearray(3 * MIB + 7))
        while count := await read.read_into(buffer):
            got.update(buffer[:count])
        assert await read.read_at(11 * MIB, 20_000) == content[11 * MIB :]
    assert got.digest() == hashlib.sha256(content).digest()
    assert await smb.read_file("vm/disk") == content


async def test_a_reader_that_jumps_reads_what_is_there(smb: SmbRemote) -> None:
    content = random.Random(2).randbytes(3 * MIB)
    await smb.write_file("f", content)
    async with smb.open_read("f") as read:
        for size in (100, MIB, 5, 2 * MIB, 77):
            buffer = memoryview(bytearray(size))
            before = read._position  # type: ignore[attr-defined]
            count = await read.read_into(buffer)
            assert buffer[:count] == content[before : before + size]
            assert await read.read_at(before, 9) == content[before : before + 9]


async def test_a_long_directory_is_listed_whole(smb: SmbRemote, root: Path) -> None:
    names = [f"{number:04d}-{'n' * 120}" for number in range(1500)]  # several answers' worth
    (root / "d").mkdir()
    for name in names:
        (root / "d" / name).touch()
    assert [entry.name for entry in await smb.list("d")] == names


async def test_a_listing_that_breaks_off_is_an_error(
    smb: SmbRemote, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1500):
        (root / f"{number:04d}-{'n' * 120}").touch()
    parse, calls = wire.parse_directory, 0

    def broken(body: bytes) -> Any:
        nonlocal calls
        calls += 1
        return parse(body[:-4] if calls == 2 else body)

    monkeypatch.setattr(wire, "parse_directory", broken)
    with pytest.raises(Corrupt, match="makes no sense"):
        await smb.list("")
    assert calls == 2


async def test_a_link_is_not_followed(smb: SmbRemote, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "d").mkdir(parents=True)
    (outside / "d/secret").write_bytes(b"s")
    (root / "t").mkdir(parents=True)
    (root / "t/link").symlink_to(outside / "d")
    (root / "t/file").symlink_to(outside / "d/secret")
    for path in ("t/link/secret", "t/file"):
        with pytest.raises(ProxyError):
            await smb.read_file(path)
    with pytest.raises(ProxyError):
        await smb.write_file("t/link/new", b"")
    with pytest.raises(ProxyError):
        await smb.rmtree("t")  # it can neither be seen nor removed
    assert tree(outside) == ["d", "d/secret"]


async def test_names_are_one_in_any_case(smb: SmbRemote, root: Path) -> None:
    await smb.write_file("Name", b"1")
    await smb.write_file("name", b"2")
    assert await smb.read_file("NAME") == b"2"
    assert len(tree(root)) == 1


async def test_an_impossible_name_is_refused_before_anything_is_sent(
    smb: SmbRemote, root: Path
) -> None:
    for call in (
        smb.write_file("d/a:b", b""),
        smb.read_file("d/a:b"),
        smb.rename("x", "d/a?"),
        smb.mktree("d/a."),
    ):
        with pytest.raises(Refused) as caught:
            await call
        assert caught.value.code == "EINVAL"
    assert tree(root) == []


async def test_the_space_is_the_file_systems(smb: SmbRemote, root: Path) -> None:
    space = os.statvfs(root)
    info = await smb.info()
    assert info.size == space.f_blocks * space.f_frsize
    assert info.available == pytest.approx(space.f_bavail * space.f_frsize, rel=0.05)


async def test_an_immutable_remote_writes_under_the_final_name(samba: Samba, root: Path) -> None:
    async with opened(samba.url(root, query="&immutable=true")) as remote:
        async with remote.create("d/f") as file:
            await file.write(b"x")
            assert tree(root) == ["d", "d/f"]
            await file.commit()
        with pytest.raises(ProxyError) as caught:
            await remote.write_file("d/f", b"other")
        assert caught.value.code == "EEXIST"
        with pytest.raises(Refused):
            await remote.rename("d/f", "g")
        async with remote.create("g") as file:
            await file.write(b"given up")
    assert tree(root) == ["d", "d/f"]
    assert (root / "d/f").read_bytes() == b"x"


async def test_a_file_that_another_program_has_for_itself_is_busy(
    smb: SmbRemote, root: Path
) -> None:
    await smb.write_file("f", b"x")
    link = smb._control.link()
    # as another program would: nobody else may open it
    message = wire.create(
        smb._control.name("f"), wire.Access.READ, wire.Disposition.OPEN, wire.Options(0)
    )
    head = bytearray(message.head)
    head[32:36] = bytes(4)  # shares nothing
    link.call(wire.Message(message.command, bytes(head), message.data))
    with pytest.raises(Busy) as caught:
        await smb.read_file("f")
    assert caught.value.code == "EBUSY"
    assert root.joinpath("f").read_bytes() == b"x"


# -- a server that goes away


def kill_connections(server: Samba) -> int:
    children = server.children()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    return len(children)


async def test_what_may_be_repeated_goes_on_over_a_new_connection(samba: Samba, root: Path) -> None:
    content = random.Random(3).randbytes(5 * MIB)
    async with opened(samba.url(root)) as inner:
        remote = Retry(inner)
        await remote.write_file("f", content)
        async with remote.open_read("f") as read:
            buffer = memoryview(bytearray(MIB))
            assert await read.read_into(buffer) == MIB
            assert kill_connections(samba) == 2
            got = bytearray(buffer)
            while count := await read.read_into(buffer):
                got += buffer[:count]
        assert got == content
        assert [entry.name for entry in await remote.list("")] == ["f"]


async def test_a_share_that_goes_away_is_no_empty_remote(samba: Samba, root: Path) -> None:
    """Taken for a missing file, everything in it would count as removed."""
    async with opened(samba.url(root)) as remote:
        assert isinstance(remote, SmbRemote)
        await remote.write_file("vm/f", b"x")
        for share in (remote._control, remote._bulk):
            share._login = dataclasses.replace(share._login, share="none")
        kill_connections(samba)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: remote.unlink("vm/f"),
            lambda: remote.rmdir("vm"),
            lambda: remote.rmtree("vm"),
            lambda: remote.list("vm"),
            lambda: remote.stat("vm/f"),
            lambda: remote.read_file("vm/f"),
        ]
        for call in calls:
            for _ in range(2):  # the second one is told what the first one found
                with pytest.raises(Unreachable):
                    await call()
        for read in await remote.read_files(["vm/f"]):
            assert isinstance(read, Unreachable)
    assert (root / "vm/f").exists()


async def test_a_remote_whose_directory_goes_away_is_no_empty_one(samba: Samba, root: Path) -> None:
    """As when the server's own file system is not mounted."""
    async with opened(samba.url(root)) as remote:
        await remote.write_file("vm/a/f", b"x")
        root.rename(root.with_name("aside"))
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: remote.unlink("vm/a/f"),
            lambda: remote.unlink("f"),
            lambda: remote.rmdir("vm"),
            lambda: remote.rmtree("vm"),
            lambda: remote.list("vm"),
            lambda: remote.stat("vm/a/f"),
            lambda: remote.read_file("vm/a/f"),
            lambda: remote.write_file("vm/g", b""),
        ]
        for call in calls:
            with pytest.raises(Unreachable) as caught:
                await call()
            assert caught.value.code == "ESTALE"
        root.with_name("aside").rename(root)
        assert await remote.read_file("vm/a/f") == b"x"
    assert tree(root) == ["vm", "vm/a", "vm/a/f"]


async def test_a_file_that_was_written_is_lost_with_its_connection(
    samba: Samba, root: Path
) -> None:
    async with opened(samba.url(root)) as remote:
        with pytest.raises(Unreachable):  # noqa: PT012 (the block is what fails)
            async with remote.create("vm/f") as file:
                await file.write(b"first")
                kill_connections(samba)
                await file.write(b"second")
                await file.commit()
        assert tree(root) == ["vm"]  # its temporary file was removed over a new connection


async def test_an_edit_with_unsynced_bytes_does_not_survive_its_connection(
    samba: Samba, root: Path
) -> None:
    async with opened(samba.url(root)) as remote:
        await remote.write_file("f", b"0123456789")
        assert isinstance(remote, SmbRemote)
        async with remote.edit("f") as file:
            link = remote._bulk.link()
            kill_connections(samba)
            while not link.is_lost:
                await trio.sleep(0.01)
            await file.write_at(9, b"z")  # nothing was written before: it is opened again
            await file.sync()
        assert await remote.read_file("f") == b"012345678z"
        async with remote.edit("f") as file:
            await file.write_at(0, b"ab")
            kill_connections(samba)
            for _ in range(2):
                with pytest.raises(ProxyError) as caught:
                    await file.sync()
            assert isinstance(caught.value, Refused)
            assert caught.value.code == "EIO"


async def test_a_lock_survives_a_new_connection(samba: Samba, root: Path) -> None:
    async with opened(samba.url(root)) as inner:
        remote = Retry(inner)
        await remote.mktree("vm")
        async with remote.lock("vm", owner="run") as lock:
            kill_connections(samba)
            await lock.check()
            assert (root / "vm.lock").is_dir()
        assert tree(root) == ["vm"]


async def test_a_cancel_ends_a_call_that_a_stopped_server_holds(
    samba: Samba, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "GRACE_SECONDS", 0.2)
    async with opened(samba.url(root)) as remote:
        await remote.write_file("f", b"old")
        stopped = samba.children()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        started_at = time.monotonic()
        with trio.move_on_after(0.3) as scope:
            await remote.write_file("f", b"new")
        assert scope.cancelled_caught
        assert time.monotonic() - started_at < 3
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        assert await remote.read_file("f") == b"old"  # over a new connection
        await remote.write_file("f", b"newer")
        assert await remote.read_file("f") == b"newer"


async def test_an_answer_that_does_not_come_ends_the_connection(samba: Samba, root: Path) -> None:
    async with opened(samba.url(root)) as remote:
        assert isinstance(remote, SmbRemote)
        link = remote._bulk.link()
        for pid in samba.children():
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(Unreachable) as caught:
            link.call(wire.close(bytes(16)), seconds=0.2)
        assert caught.value.code == "ETIMEDOUT"
        assert link.is_lost
        for pid in samba.children():
            os.kill(pid, signal.SIGCONT)
        await remote.write_file("f", b"x")


def unsigned(answer: bytearray) -> None:
    answer[16] &= ~wire.SIGNED


def altered(answer: bytearray) -> None:
    answer[70] ^= 1


def misdirected(answer: bytearray) -> None:
    answer[12] ^= 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (unsigned, "without a signature"),
        (altered, "signature is wrong"),
        (misdirected, "to nothing that was asked"),
    ],
)
async def test_an_answer_that_somebody_changed_ends_the_connection(
    smb: SmbRemote, change: Callable[[bytearray], None], what: str
) -> None:
    """The library would take one without a signature."""
    link = smb._bulk.link()
    transport = link._connection.transport
    take = transport.taker

    def tamper(message: bytearray) -> bool:
        change(message)
        return take(message)

    transport.taker = tamper
    with pytest.raises(Unreachable, match=what):
        await smb.read_file("f")
    assert link.is_lost
    with pytest.raises(NotFound):
        await smb.read_file("f")


async def test_a_file_that_is_being_read_can_be_replaced(smb: SmbRemote) -> None:
    """As on every other remote; servers refuse it while the same connection reads it."""
    await smb.write_file("cache", b"old")
    await smb.write_file("other", b"newest")
    async with smb.open_read("cache") as read:
        await smb.write_file("cache", b"new")
        await smb.rename("other", "cache")
        assert await read.read_at(0, 10) == b"old"
    assert await smb.read_file("cache") == b"newest"


async def test_weakness_3_bytes_and_names_are_durable_before_they_count(
    smb: SmbRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream writes in place, without a flush of the file or of its directory."""
    await smb.mktree("d")
    seen: list[list[str]] = []
    start = Link.start

    def recording(self: Link, *messages: wire.Message, **options: Any) -> Any:
        seen.append([message.command.name for message in messages])
        return start(self, *messages, **options)

    monkeypatch.setattr(Link, "start", recording)
    rename = ["CREATE", "SET_INFO", "CLOSE"]
    directory = ["CREATE", "FLUSH", "CLOSE"]
    await smb.write_file("d/f", b"x")
    assert seen == [["CREATE", "WRITE", "FLUSH", "CLOSE"], rename, directory]
    seen.clear()
    async with smb.create("d/g") as file:
        await file.write(b"x" * (MIB + 1))
        await file.commit()
    assert seen == [["CREATE"], ["WRITE"], ["WRITE"], ["FLUSH"], ["CLOSE"], rename, directory]
    seen.clear()
    async with smb.batch() as batch:
        await batch.write("d/h", b"x")
        assert seen == [["CREATE", "WRITE", "FLUSH", "CLOSE"]]
        await batch.commit()
    assert seen[1:] == [directory]
