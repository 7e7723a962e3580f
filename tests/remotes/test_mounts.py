"""NFS and SMB remotes on a fake server (`tests/remotes/server.py`); mounts are real ones."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import trio

from proxy.errors import NotFound, ProxyError, Refused, Unreachable
from proxy.jobs.sharing import Shared
from proxy.remotes import Remote, mountinfo, network, open_remote, opened_remote
from proxy.remotes import mounts as mounts_module
from proxy.remotes.faults import Faults
from proxy.remotes.mounts import mounts
from tests.remotes.conftest import opened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.remotes.url import SmbUrl
    from tests.remotes.server import Server

SECRET = "hunter2Is0nlyOurs"


def smb(server: Server, password: str = SECRET) -> str:
    path = str(server.share).replace("/", "\\")
    return rf"smb://user:{password}@DOMAIN\\nas\share" + "\0" + path


async def open_one(server: Server, url: str = "", **record: Any) -> Remote:
    return await open_remote({"url": url or server.url, **record}, options=server.options)


async def test_a_remote_is_mounted_while_it_is_open(server: Server) -> None:
    async with opened(server.url, options=server.options, id="r1") as remote:
        assert server.mounted() == ["r1"]
        await remote.write_file("d/f", b"x")
        assert (server.share / "d/f").read_bytes() == b"x"
        assert server.calls() == [
            ["mount", "-t", "nfs", f"server:{server.share}", f"{server.mounts}/r1"]
        ]
    assert server.mounted() == []
    assert list(server.mounts.iterdir()) == []
    assert sorted(path.name for path in server.share.iterdir()) == ["d"]  # the probe left nothing


async def test_credentials_of_smb_travel_in_the_environment_alone(server: Server) -> None:
    async with opened(smb(server), options=server.options, id="r1"):
        assert server.environment().get("PASSWD") == SECRET
        assert server.environment().get("USER") == "user"
        assert server.environment().get("LANG") == "C"
        assert SECRET not in repr(server.calls())
        source = "//nas\\share/" + str(server.share).replace("/", "\\")
        assert server.calls() == [
            ["mount", "-o", "domain=DOMAIN", "-t", "cifs", source, f"{server.mounts}/r1"]
        ]
    assert server.mounted() == []


async def test_sudo_is_asked_without_a_terminal(server: Server) -> None:
    log = server.state / "sudo"
    # its first arguments: -n --preserve-env=…, or -n and the command
    server.program(
        "sudo",
        f'#!/bin/sh\nprintf "%s\\n" "$*" >> {log}\n'
        'shift\ncase $1 in --*) shift;; esac\nexec "$@"\n',
    )
    options = dataclasses.replace(server.options, use_sudo=True)
    async with opened(smb(server), options=options, id="r1"):
        assert server.mounted() == ["r1"]
    lines = log.read_text().splitlines()
    assert lines[0].startswith("-n --preserve-env=LANG,USER,PASSWD mount -o domain=DOMAIN -t cifs")
    assert lines[-1] == f"-n umount {server.mounts}/r1"
    assert SECRET not in "".join(lines)


# -- sharing


async def test_weakness_16_calls_with_and_without_id_share_one_mount(server: Server) -> None:
    """Upstream mounts the export a second time, in a random directory that stays for good."""
    first = await open_one(server, id="r1")
    second = await open_one(server)
    third = await open_one(server, f"{server.url}?useVhdDirectory=true", id="r2", options="")
    assert server.mounted() == ["r1"]
    assert len(server.calls()) == 1
    await first.aclose()
    await first.aclose()
    await second.aclose()
    assert server.mounted() == ["r1"]
    await third.write_file("f", b"")
    await third.aclose()
    assert server.mounted() == []


async def test_weakness_16_without_an_id_the_directory_is_always_the_same(server: Server) -> None:
    names = []
    for _ in range(2):
        async with opened(server.url, options=server.options):
            names += server.mounted()
    assert names[0] == names[1]
    assert server.mounted() == []


@pytest.mark.parametrize("change", ["options", "url"])
async def test_weakness_16_a_changed_record_takes_effect_at_once(
    server: Server, change: str
) -> None:
    """The record as it was is still in use."""
    old = await open_one(server, id="r1", options="vers=3")
    await old.write_file("f", b"old")
    if change == "options":
        new = await open_one(server, id="r1", options="vers=4")
        assert await new.read_file("f") == b"old"
    else:
        new = await open_one(server, f"{server.url}/other", id="r1", options="vers=3")
        with pytest.raises(NotFound):
            await new.read_file("f")
    assert len(server.mounted()) == 2
    assert server.mounted()[1].startswith("r1.")
    if change == "options":
        assert server.calls()[1][1:3] == ["-o", "vers=4"]
    await old.aclose()
    assert len(server.mounted()) == 1
    await new.aclose()
    assert server.mounted() == []


async def test_another_password_is_another_mount(server: Server) -> None:
    first = await open_one(server, smb(server, "first-one"), id="r1")
    second = await open_one(server, smb(server, "second-one"), id="r1")
    assert len(server.mounted()) == 2
    assert server.environment()["PASSWD"] == "second-one"
    await first.aclose()
    await second.aclose()


async def test_users_that_come_at_once_mount_once(server: Server) -> None:
    server.behave("sleep 0.1")
    remotes: list[Remote] = []

    async def use() -> None:
        remotes.append(await open_one(server))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(use)
    assert len(server.calls()) == len(server.mounted()) == 1
    for remote in remotes:
        await remote.aclose()
    assert server.mounted() == []


async def test_unmounted_when_unused_for_the_cache_delay(
    server: Server, nursery: trio.Nursery
) -> None:
    shared: Shared[Remote] = Shared(nursery, lambda: 0.05)

    def opening() -> contextlib.AbstractAsyncContextManager[Remote]:
        return opened_remote({"url": server.url}, options=server.options)

    async with shared.use("key", opening):
        pass
    assert len(server.mounted()) == 1
    await until(lambda: server.mounted() == [])


async def test_unmounted_at_the_daemons_stop(server: Server) -> None:
    """Cached and used at once: what holds a connection open is cancelled."""
    async with trio.open_nursery() as nursery:
        shared: Shared[Remote] = Shared(nursery, lambda: 300.0)
        opening = {"url": server.url}
        async with shared.use("k", lambda: opened_remote(opening, options=server.options)):
            assert len(server.mounted()) == 1
        nursery.cancel_scope.cancel()
    await mounts().aclose()
    assert server.mounted() == []


async def until(holds: Any, seconds: float = 5) -> None:
    with trio.fail_after(seconds):
        while not holds():
            await trio.sleep(0.01)


# -- what is found


def unmount(place: Path, *options: str) -> str:
    """As somebody else does; what it says."""
    command = ["umount", *options, str(place)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def leave(server: Server, name: str, source: str | None = None, kind: str = "") -> Path:
    """A mount of somebody else, at the name of a remote."""
    place = server.mounts / name
    place.mkdir(parents=True)
    if kind:
        subprocess.run(["/usr/bin/mount", "-t", kind, str(source), str(place)], check=True)
    else:
        subprocess.run(["/usr/bin/mount", "--bind", str(server.share), str(place)], check=True)
    return place


@contextlib.contextmanager
def in_use(place: Path) -> Iterator[None]:
    """Another process works there, as a second daemon or upstream does."""
    code = "import os, sys; os.chdir(sys.argv[1]); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


async def test_weakness_17_what_a_dead_daemon_left_is_replaced(server: Server) -> None:
    """Upstream uses whatever it finds at the path: an export that was changed stays the old."""
    place = leave(server, "r1", "old:/export", "tmpfs")
    (place / "old").write_bytes(b"")
    async with opened(server.url, options=server.options, id="r1") as remote:
        assert await remote.list("") == []
        assert server.mounted() == ["r1"]
        await remote.write_file("new", b"")
    assert (server.share / "new").exists()
    assert server.mounted() == []


async def test_weakness_17_a_foreign_mount_in_use_is_left_alone(server: Server) -> None:
    place = leave(server, "r1", "other:/export", "tmpfs")
    with in_use(place):
        async with opened(server.url, options=server.options, id="r1") as remote:
            await remote.write_file("new", b"")
            assert len(server.mounted()) == 2
        assert server.mounted() == ["r1"]
        assert list(place.iterdir()) == []
    unmount(place)


async def test_the_same_mount_in_use_by_another_is_shared(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mountinfo.FILE_SYSTEMS, "nfs", ("tmpfs",))
    monkeypatch.setattr(mounts_module, "_BUSY_WAITS", (0.01,))
    place = leave(server, "r1", "server:/export", "tmpfs")
    with in_use(place):
        async with opened("nfs://server:/export", options=server.options, id="r1") as remote:
            await remote.write_file("f", b"")
            assert (place / "f").exists()
            assert server.mounted() == ["r1"]
            assert server.calls() == []
        assert server.mounted() == ["r1"]  # it is theirs too
        await mounts().aclose()
        assert server.mounted() == ["r1"]
    await mounts().aclose()
    assert server.mounted() == []


async def test_a_share_in_use_is_not_shared_as_its_password_may_be_another(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mountinfo.FILE_SYSTEMS, "cifs", ("tmpfs",))
    source = "//nas/share" + str(server.share)
    place = leave(server, "r1", source, "tmpfs")
    with in_use(place):
        async with opened(smb(server), options=server.options, id="r1"):
            assert len(server.mounted()) == 2
            assert len(server.calls()) == 1
    unmount(place)


async def test_an_open_remote_keeps_others_from_unmounting_it(server: Server) -> None:
    async with opened(server.url, options=server.options, id="r1"):
        assert "busy" in unmount(server.mounts / "r1")
        assert server.mounted() == ["r1"]


async def test_what_was_unmounted_meanwhile_is_never_the_empty_directory(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between mounting and opening another daemon's unmount may come."""
    probe = mounts_module._probe

    async def unmounted_behind(directory: str, *args: Any, **options: Any) -> None:
        await probe(directory, *args, **options)
        unmount(Path(directory))

    monkeypatch.setattr(mounts_module, "_probe", unmounted_behind)
    with pytest.raises(Unreachable, match="unmounted while it was opened") as caught:
        await open_one(server, id="r1")
    assert caught.value.code == "ESTALE"
    assert not (server.mounts / "r1").exists() or list((server.mounts / "r1").iterdir()) == []


async def test_a_mount_that_vanished_is_made_again(server: Server) -> None:
    first = await open_one(server, id="r1")
    unmount(server.mounts / "r1", "-l")
    with pytest.raises(ProxyError):
        await first.info()
    second = await open_one(server, id="r1")
    assert server.mounted() == ["r1"]
    await second.write_file("f", b"")
    await first.aclose()
    assert server.mounted() == ["r1"]
    await second.aclose()
    assert server.mounted() == []


# -- what fails


@pytest.mark.parametrize(
    ("url", "text", "code"),
    [
        ("nfs", "mount.nfs: access denied by server while mounting server:/x", "EACCES"),
        ("nfs", "mount.nfs: Connection timed out", "ETIMEDOUT"),
        ("smb", "mount error(13): Permission denied", "EACCES"),
        ("smb", f"mount error(22): {SECRET}", "EINVAL"),
    ],
)
async def test_a_mount_that_fails_is_told_and_leaves_nothing(
    server: Server, url: str, text: str, code: str
) -> None:
    server.fails(text)
    with structlog.testing.capture_logs() as logs, pytest.raises(ProxyError) as caught:
        await open_one(server, smb(server) if url == "smb" else server.url)
    assert caught.value.code == code
    assert SECRET not in f"{caught.value!r} {caught.value.message} {caught.value.data} {logs}"
    assert server.mounted() == []
    assert list(server.mounts.iterdir()) == []
    server.behave("")
    async with opened(server.url, options=server.options):
        pass


async def test_a_mount_that_lies_is_found_out(server: Server) -> None:
    server.behave("exit 0")
    with pytest.raises(Refused, match="is not mounted"):
        await open_one(server)


async def test_a_missing_program_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts_module, "_SBIN", ())
    monkeypatch.setenv("PATH", str(server.state))
    with pytest.raises(Refused, match="'mount' cannot be run"):
        await open_one(server)
    with pytest.raises(Unreachable, match="the name of the SMB server"):
        await open_one(server, smb(server))  # without mount.cifs it goes the other way
    assert server.calls() == []


async def test_a_share_goes_the_other_way_where_it_cannot_be_mounted(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls: list[str] = []

    async def unmounted(url: SmbUrl, *_: Any, **__: Any) -> Remote:
        urls.append(url.public)
        return Faults(await open_one(server))

    monkeypatch.setattr(network, "open_smb_client", unmounted)
    server.fails("mount error: cifs filesystem not supported by the system")
    with pytest.raises(Refused):
        await open_one(server, smb(server))  # the other way fails here, as it uses mount too
    server.behave("")
    monkeypatch.setattr(network, "may_mount", lambda **_: False)
    remote = await open_one(server, smb(server))
    await remote.aclose()
    assert len(urls) == 2


async def test_a_read_only_export_is_refused_unless_it_was_asked_for(
    server: Server,
) -> None:
    real = '/usr/bin/mount --bind "$place" "$directory"; mkdir -p "$place"'
    server.behave(f'{real}; /usr/bin/mount -o remount,ro,bind "$directory"; exit 0')
    (server.share / "f").write_bytes(b"kept")
    async with opened(server.url, options=server.options) as remote:
        assert await remote.read_file("f") == b"kept"
        with pytest.raises(Refused, match="EROFS"):
            await remote.write_file("g", b"")


async def test_a_mount_that_cannot_be_written_is_unmounted(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("print('13 create')")
    monkeypatch.setattr(mounts_module, "_PROBE", probe)
    with pytest.raises(Refused, match="no_root_squash"):
        await open_one(server)
    assert server.mounted() == []


async def test_a_failure_behind_the_mount_unmounts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        return False

    monkeypatch.setattr(os, "access", refuse)  # the root's own check
    with pytest.raises(Refused):
        await open_one(server)
    assert server.mounted() == []


# -- what hangs or is cancelled


async def test_a_mount_that_hangs_is_killed_with_what_it_started(server: Server) -> None:
    server.behave(f"sleep 321.5 & echo $! > {server.state}/child; wait")
    options = dataclasses.replace(server.options, mount_seconds=0.3)
    started = time.monotonic()
    with pytest.raises(Unreachable, match=r"no answer within 0\.3 s") as caught:
        await open_remote({"url": server.url}, options=options)
    assert caught.value.code == "ETIMEDOUT"
    assert time.monotonic() - started < 3
    await until(lambda: is_dead(int((server.state / "child").read_text())))
    assert server.mounted() == []


def is_dead(pid: int) -> bool:
    """Gone, or waiting for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("stage", ["before", "behind"])
async def test_a_cancelled_opening_leaves_nothing_mounted(server: Server, stage: str) -> None:
    """Also when the mount was in place already, and only its command still ran."""
    reached = server.state / "reached"
    real = '/usr/bin/mount --bind "$place" "$directory"; ' if stage == "behind" else ""
    server.behave(f"{real}touch {reached}; exec sleep 321.5")
    started = time.monotonic()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_one, server)
        await until(reached.exists)
        assert len(server.mounted()) == (stage == "behind")
        nursery.cancel_scope.cancel()
    assert time.monotonic() - started < 5
    assert server.mounted() == []
    assert list(server.mounts.iterdir()) == []


async def test_what_lies_in_the_directory_of_a_mount_that_failed_stays(server: Server) -> None:
    """Somebody put it there; a mount hides it."""
    (server.mounts / "r1").mkdir(parents=True)
    (server.mounts / "r1" / "f").write_bytes(b"data")
    server.fails("mount.nfs: Connection timed out")
    with pytest.raises(ProxyError):
        await open_one(server, id="r1")
    assert (server.mounts / "r1" / "f").read_bytes() == b"data"


async def test_a_cancelled_user_of_two_leaves_the_mount_to_the_other(server: Server) -> None:
    server.behave("sleep 0.2")
    done: list[Remote] = []

    async def keep() -> None:
        done.append(await open_one(server))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep)
        with trio.move_on_after(0.05):
            await open_one(server)
    assert len(server.mounted()) == 1
    await done[0].aclose()
    assert server.mounted() == []


async def test_a_cancelled_close_unmounts(server: Server) -> None:
    remote = await open_one(server)
    with trio.CancelScope() as scope:
        scope.cancel()
        await remote.aclose()
    assert server.mounted() == []
