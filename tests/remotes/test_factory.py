from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.errors import NotFound, ProxyError, Refused, Unreachable
from proxy.remotes import RemoteOptions, open_remote, opened_remote, posix
from proxy.remotes.factory import refuse_missing
from tests.remotes.conftest import OPTIONS, tree

if TYPE_CHECKING:
    from pathlib import Path


async def test_the_root_is_made_and_the_record_read(root: Path) -> None:
    record = {"url": f"file://{root}/a/b?useVhdDirectory=true", "id": "x", "immutable": True}
    async with opened_remote(record, options=OPTIONS) as remote:
        assert remote.use_vhd_directory
        assert remote.is_immutable
        assert (root / "a/b").is_dir()
        assert remote.url == record["url"]


async def test_the_url_wins_over_the_record(root: Path) -> None:
    record = {"url": f"file://{root}?immutable=false", "immutable": True}
    async with opened_remote(record, options=OPTIONS) as remote:
        assert not remote.is_immutable


async def test_file_remotes_are_disabled_by_default(root: Path) -> None:
    with pytest.raises(Refused) as caught:
        await open_remote({"url": f"file://{root}"}, options=RemoteOptions())
    assert caught.value.message == "Local remotes are disabled in proxies"
    assert not root.exists()


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({}, "EINVAL"),
        ({"url": 5}, "EINVAL"),
        ({"url": "ftp://nowhere"}, "EINVAL"),
        ({"url": 'file:///x?encryptionKey="s3cretS3cret"'}, "BAD_ALGORITHM"),
        ({"url": "file:///x", "encryptionKey": "s3cretS3cret"}, "BAD_ALGORITHM"),
        ({"url": "file:///x?encryptionKey="}, "EINVAL"),
        ({"url": "file:///x", "encryptionKey": ""}, "EINVAL"),
        ({"url": "file:///x", "encryptionKey": {"s3cret": 1}}, "EINVAL"),
        ({"url": "s3://k:s3cretS3cret@h/"}, "EINVAL"),
        ({"url": "smb://u:s3cretS3cret@d\\\\h\\s", "options": "mfsymlinks"}, "ENOTSUP"),
    ],
)
async def test_refusals(record: dict[str, Any], code: str) -> None:
    with pytest.raises(Refused) as caught:
        await open_remote(record, options=OPTIONS)
    assert caught.value.code == code
    assert "s3cret" not in f"{caught.value} {caught.value.data}"


@pytest.mark.parametrize(
    ("path", "code"),
    [("/etc/hostname/x", "ENOTDIR"), ("/etc/hostname", "EEXIST"), ("/proc/x", "ENOENT")],
)
async def test_an_impossible_path_answers_at_once(path: str, code: str) -> None:
    """Upstream's `remote.ping` on an impossible path never answers."""
    start = time.monotonic()
    with pytest.raises(ProxyError) as caught:
        await open_remote({"url": f"file://{path}"}, options=OPTIONS)
    assert time.monotonic() - start < 1
    assert caught.value.code == code


async def test_the_message_is_upstreams() -> None:
    with pytest.raises(ProxyError) as caught:
        await open_remote({"url": "file:///etc/hostname/x"}, options=OPTIONS)
    assert caught.value.message == "ENOTDIR: not a directory, mkdir '/etc/hostname/x'"


async def test_a_file_system_that_hangs_is_unreachable(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[posix.Root] = []
    opening = posix.Root.open

    def hang(self: posix.Root) -> None:
        time.sleep(0.2)
        opening(self)
        closed.append(self)

    monkeypatch.setattr(posix.Root, "open", hang)
    options = RemoteOptions(disable_file_remotes=False, open_seconds=0.05)
    with pytest.raises(Unreachable, match="opening the remote"):
        await open_remote({"url": f"file://{root}"}, options=options)
    while not closed:
        await trio.sleep(0.01)
    assert closed[0]._descriptor is None  # what came too late keeps nothing open
    assert tree(root) == []


async def test_a_mistyped_path_is_told_to_who_only_looks(tmp_path: Path) -> None:
    """Opening it would say "file exists", of a directory that was to be made."""
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path, code in ((tmp_path / "none", "ENOENT"), (file, "ENOTDIR")):
        with pytest.raises(NotFound) as caught:
            await refuse_missing({"url": f"file://{path}"}, options=OPTIONS)
        assert caught.value.code == code
    await refuse_missing({"url": f"file://{tmp_path}"}, options=OPTIONS)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
