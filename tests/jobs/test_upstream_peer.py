"""Xen Orchestra reads what we write, and each side ends the merges that the other one began.

Its own code does it: with ``XO_UPSTREAM`` naming an installation of Xen Orchestra from sources,
or any other directory where its packages ``@xen-orchestra/backups`` and ``@xen-orchestra/fs``
resolve.  They are no dependency of this project and nothing here installs them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest
import trio

from proxy.disks.opening import open_disk
from proxy.formats.vhd import BLOCK_SIZE
from proxy.repository import delete_backups

from .crashes import Content, Tale, metadata_of
from .test_crash_incremental import SCENES, tale_of
from .test_incremental_backup import KINDS, live

INSTALLATION = os.environ.get("XO_UPSTREAM", "")
SCRIPT = Path(__file__).with_name("upstream.mjs")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not INSTALLATION or shutil.which("node") is None,
        reason="needs node, and XO_UPSTREAM naming an installation of Xen Orchestra",
    ),
]


@dataclass
class Peer:
    """One process of Xen Orchestra's code; it answers one request after the other."""

    requests: IO[str]
    answers: IO[str]

    async def ask(self, do: str, tale: Tale, root: Path, **more: Any) -> dict[str, Any]:
        spec = tale.house.remote_spec(tale.remote)
        url = str(spec["url"]).replace(str(tale.house.folder(tale.remote)), str(root))
        request = {"do": do, "url": url, "vm": tale.vm, **more}

        def exchange() -> dict[str, Any]:
            self.requests.write(json.dumps(request) + "\n")
            self.requests.flush()
            answer: dict[str, Any] = json.loads(self.answers.readline())
            return answer

        return await trio.to_thread.run_sync(exchange)

    async def reads(self, tale: Tale, root: Path, when: str) -> None:
        """It lists the backups that there are, and reads each byte for byte."""
        answer = await self.ask("read", tale, root)
        assert "error" not in answer, (when, answer["error"])
        assert set(answer["backups"]) == set(metadata_of(root)), f"{when}: its listing"
        for backup, disks in answer["backups"].items():
            contents = tale.contents[backup]
            assert set(disks) == set(contents), f"{when}: the disks of {backup}"
            for uuid, disk in disks.items():
                assert_is(disk, contents[uuid], f"{when}: it reads {backup}")


def assert_is(disk: Mapping[str, Any], content: Content, when: str) -> None:
    assert disk["size"] == content.size, when
    blocks = {int(index): digest for index, digest in disk["blocks"].items()}
    assert set(range(len(content.blocks))) - set(blocks) <= content.holes(), when
    for index, digest in blocks.items():
        assert digest == content.sha256[index], f"{when}: block {index}"


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    command = ["node", str(SCRIPT), INSTALLATION]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Peer(process.stdin, process.stdout)
        process.stdin.close()
        assert process.wait() == 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


@contextmanager
def small_batches() -> Iterator[None]:
    """So that a crash in the middle of a batch is another one than between two."""
    with mock.patch("proxy.disks.merge.BATCH", 2), mock.patch("proxy.disks.merge.COPIED", 2):
        yield


async def lacks_room(tale: Tale, root: Path, backups: set[str]) -> bool:
    """Whether its clean would merge a grown disk into a directory with too short a table.

    It does not make room there, cannot open the result and then removes it (vhd, weakness 4).
    We make room in the first step after the state is written.
    """
    needed = {path for each in backups for path in metadata_of(root)[each]["vhds"].values()}
    async with tale.opened(root) as remote:
        for alias in sorted(root.glob("xo-vm-backups/*/vdis/*/*/*.alias.vhd")):
            path = str(alias.relative_to(root))
            sizes = [
                content.size
                for disks in tale.contents.values()
                for uuid, content in disks.items()
                if uuid == alias.parent.name
            ]
            if path.split("/", 2)[2] not in needed:
                async with open_disk(remote, path) as disk:
                    if disk.header.max_entries < max(sizes) // BLOCK_SIZE:
                        return True
    return False


@pytest.mark.parametrize("remote", KINDS)
@pytest.mark.parametrize("scene", SCENES)
async def test_it_ends_what_we_began(root: Path, scene: str, remote: str, peer: Peer) -> None:
    """At every change of a run that writes, merges or deletes."""
    play, disks, least = SCENES[scene]
    crashed = root / "crashed"
    async with tale_of(root, remote, disks=disks) as tale:
        with small_batches():
            await play(tale)
        count = 0
        for when, show in tale.states():
            show(crashed)
            backups = metadata_of(crashed)
            if not (crashed / "xo-vm-backups" / tale.vm).is_dir():
                continue  # then it does not look there either
            if await lacks_room(tale, crashed, set(backups)):
                continue
            answer = await peer.ask("clean", tale, crashed)
            assert "error" not in answer, (when, answer)
            assert set(metadata_of(crashed)) == set(backups), (when, answer)
            assert set(backups) >= tale.lasting
            await peer.reads(tale, crashed, when)
            async with tale.opened(crashed) as opened:
                await tale.reads(opened, metadata_of(crashed), f"{when}: we, after it")
                await tale.recover(opened)
                await tale.reads(opened, metadata_of(crashed), f"{when}: after both")
            count += 1
        assert count >= least


@pytest.mark.parametrize("torn", [False, True], ids=["not done", "half done"])
@pytest.mark.parametrize("length", [2, 4])
@pytest.mark.parametrize("remote", KINDS)
async def test_we_end_what_it_began(
    root: Path, remote: str, length: int, torn: bool, peer: Peer
) -> None:
    """Stopped at every change of its clean: what was half done is merged and reads the same."""
    crashed = root / "crashed"
    async with tale_of(root, remote) as tale:
        for number in range(length):
            tale.write(number % 3, 10 + number)
            await tale.back_up(exportRetention=9)
        folder = tale.house.folder(tale.remote)
        async with tale.opened(folder) as opened:
            await delete_backups(opened, tale.house.backups(tale.remote)[: length - 1])
        tale.lasting = set(tale.house.backups(tale.remote))
        assert len(tale.lasting) == 1
        stopped, at = True, 0
        while stopped:
            at += 1
            shutil.rmtree(crashed, ignore_errors=True)
            shutil.copytree(folder, crashed)
            answer = await peer.ask("clean", tale, crashed, stopAt=at, torn=torn)
            stopped = answer["stopped"]
            await resumed(tale, crashed, f"stopped at change {at}", is_readable=not torn)
        assert "error" not in answer
        assert at > 5


async def resumed(tale: Tale, root: Path, when: str, *, is_readable: bool) -> None:
    """We read what it left (unless its state was cut: then nobody can), end it and read again."""
    async with tale.opened(root) as remote:
        backups = metadata_of(root)
        assert set(backups) == tale.lasting, when
        if is_readable:
            await tale.reads(remote, backups, f"{when}: before")
        warnings = await tale.recover(remote)
        assert metadata_of(root).keys() == tale.lasting, (when, warnings)
        await tale.reads(remote, metadata_of(root), f"{when}: after")
        disks = list(root.glob("xo-vm-backups/*/vdis/*/*/*.vhd"))
        states = list(root.glob("xo-vm-backups/*/vdis/*/*/.*.merge.json"))
        assert (len(disks), states) == (1, []), (when, warnings)
        warnings = await tale.recover(remote)
        assert warnings == [], when


@pytest.mark.parametrize("remote", KINDS)
@pytest.mark.parametrize("nbd", [False, True], ids=["stream", "NBD and CBT"])
async def test_it_reads_what_we_wrote(root: Path, remote: str, nbd: bool, peer: Peer) -> None:
    """After each run: new, grown and merged disks."""
    async with tale_of(root, remote, disks=2) as tale:
        folder = tale.house.folder(tale.remote)
        for number in range(6):
            tale.write(number % 3, 10 + number, number % 2)
            if number == 3:
                tale.house.pool.grow(live(tale.house)[0], 5 * BLOCK_SIZE)
                tale.write(4, 30)
            await tale.back_up(exportRetention=3, preferNbd=nbd, nbdConcurrency=2)
            await peer.reads(tale, folder, f"after run {number}")
        answer = await peer.ask("clean", tale, folder)
        assert answer == {"changes": 0, "stopped": False, "warnings": []}
