"""Mirrors between folders, object stores, shares and encrypted remotes, there and back."""

from __future__ import annotations

import json
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pyvhdi

from proxy.remotes.objects import lease
from proxy.repository import list_vm_backups
from proxy.repository.metadata import read_backup
from proxy.simulator import SimulatedPool
from tests.jobs.conftest import KEY, House, open_house
from tests.jobs.test_incremental_backup import FIXTURES
from tests.jobs.test_verify_run import statuses, verified
from tests.remotes import conftest as of_remotes
from tests.remotes.objects.fake_s3 import FakeS3, serving

from .mirrors import Content, Stock, contents, contents_of, house_with, metadata, mirror, times

moto = of_remotes.moto
LIBVHDI: Any = pyvhdi
ENCRYPTED = f"encryptionKey={quote(json.dumps(KEY))}"


async def held(house: House, stock: Stock, remote: str) -> list[Content]:
    """What a remote has that is no folder."""
    async with house.services.remote(house.remote_spec(remote)) as opened:
        backups = await list_vm_backups(opened, stock.vm)
        records = [(await read_backup(opened, backup.id)).metadata for backup in backups]
        return await contents_of(opened, records)


async def there_and_back(house: House, stock: Stock, bucket: str) -> None:
    house.remotes["bucket"] = {"id": "bucket", "name": "bucket", "url": bucket}
    settings = {"exportRetention": 3}
    early = {"timestamp": {"__or": times(house, "source")[:2]}}
    assert (await mirror(house, "bucket", settings=settings, filter=early)).status == "success"
    outcome = await mirror(house, "bucket", "directories1", settings=settings)
    assert outcome.status == "success", outcome.snapshot
    assert await held(house, stock, "bucket") == stock.chain[-3:]
    assert statuses(await verified(house, "bucket", level="read")) == ["ok"] * 3
    back = await mirror(house, "remote1", source="bucket", id="back")
    assert back.status == "success", back.snapshot
    assert await contents(house, "remote1") == stock.chain[-3:]


async def test_to_an_object_store_and_back(
    tmp_path: Path, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.05)
    async with serving(FakeS3(page=50)) as server, house_with(stock, tmp_path) as house:
        url, _, rest = server.url("dir").partition("#")
        await there_and_back(house, stock, f"{url}?{ENCRYPTED}" + (f"#{rest}" if rest else ""))
        assert server.uploads == {}
        assert [key for key in server.objects if key.endswith(".lock")] == []


async def test_to_another_object_store_and_back(
    tmp_path: Path,
    stock: Stock,
    moto: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.05)
    async with house_with(stock, tmp_path) as house:
        url = f"s3+http://key:secret@{moto}/bucket/mirror"
        house.remotes["bucket"] = {"id": "bucket", "name": "bucket", "url": url}
        outcome = await mirror(house, "bucket", settings={"exportRetention": 2})
        assert outcome.status == "success", outcome.snapshot
        back = await mirror(house, "remote1", source="bucket", id="back")
        assert back.status == "success", back.snapshot
        assert await contents(house, "remote1") == stock.chain[-2:]


async def test_archives_to_an_object_store_and_back(
    tmp_path: Path, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.05)
    async with serving(FakeS3(page=50)) as server, house_with(stock, tmp_path, "archives") as house:
        url, _, rest = server.url("dir").partition("#")
        bucket = f"{url}?{ENCRYPTED}" + (f"#{rest}" if rest else "")
        house.remotes["bucket"] = {"id": "bucket", "name": "bucket", "url": bucket}
        first = await mirror(house, "bucket", source="archives", mode="full")
        assert first.status == "success", first.snapshot
        back = await mirror(house, "remote1", source="bucket", mode="full", id="back")
        assert back.status == "success", back.snapshot
        theirs, ours = (
            {p.name: p.read_bytes() for p in house.folder(each).glob("xo-vm-backups/*/*.xva")}
            for each in ("archives", "remote1")
        )
        assert ours == theirs
        assert len(ours) == 3


async def test_what_xen_orchestra_wrote_is_copied(tmp_path: Path) -> None:
    """Its recorded chain, into directories, encrypted, and back: as libvhdi reads the original."""
    with tarfile.open(FIXTURES / "disks" / "recorded-files.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "remote1").rename(tmp_path / "recorded")
    async with open_house(SimulatedPool.small(), tmp_path) as house:
        house.remote_spec("recorded")
        expected = libvhdi_reads(house, "recorded")
        assert len(expected) == 2
        out = await mirror(house, "encrypted1", source="recorded")
        assert out.status == "success", out.snapshot
        back = await mirror(house, "back", source="encrypted1")
        assert back.status == "success", back.snapshot
        assert libvhdi_reads(house, "back") == expected
        kinds = [set(each["isVhdDifferencing"].values()) for each in metadata(house, "back")]
        assert kinds == [set(e["isVhdDifferencing"].values()) for e in metadata(house, "recorded")]
        house.clean_remotes_but("recorded")


def libvhdi_reads(house: House, remote: str) -> list[Content]:
    """Of each backup the disks, read by another program through their chains."""
    found: list[Content] = []
    for backup in metadata(house, remote):
        vm = house.folder(remote) / "xo-vm-backups" / backup["vm"]["uuid"]
        content: Content = {}
        for path in backup["vhds"].values():
            files: list[Any] = []
            for each in sorted((vm / path).parent.glob("*.vhd")):
                if each.name <= (vm / path).name:
                    file = LIBVHDI.file()
                    file.open(str(each))
                    if files:
                        file.set_parent(files[-1])
                    files.append(file)
            size = files[-1].get_media_size()
            content[path.split("/")[2]] = sha256(files[-1].read_buffer(size)).hexdigest()
            for file in reversed(files):
                file.close()
        found.append(content)
    return found


@pytest.mark.parametrize(("source", "mode"), [("source", "delta"), ("archives", "full")])
async def test_to_a_remote_that_protects_its_files(
    tmp_path: Path, stock: Stock, source: str, mode: str
) -> None:
    async with house_with(stock, tmp_path, source) as house:
        url = f"file://{tmp_path / 'remote1'}?immutable=true"
        house.remotes["remote1"] = {"id": "remote1", "name": "remote1", "url": url}
        moments = times(house, source)
        for known in (moments[:1], moments):
            some = {"timestamp": {"__or": known}}
            outcome = await mirror(house, "remote1", source=source, mode=mode, filter=some)
            assert outcome.status == "success", outcome.snapshot
        assert times(house, "remote1") == moments
        if mode == "delta":
            assert await contents(house, "remote1") == stock.chain
        assert list(house.folder("remote1").rglob("cache.json.gz")) == []
