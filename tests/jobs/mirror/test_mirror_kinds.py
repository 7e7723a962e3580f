"""Mirrors between folders, object stores, shares and encrypted remotes, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pytest

from proxy.remotes.objects import lease
from proxy.repository import list_vm_backups
from proxy.repository.metadata import read_backup
from tests.jobs.conftest import KEY, House
from tests.jobs.test_verify_run import statuses, verified
from tests.remotes import conftest as of_remotes
from tests.remotes.objects.fake_s3 import FakeS3, serving

from .mirrors import Content, Stock, contents, contents_of, house_with, mirror, times

moto = of_remotes.moto
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


@pytest.mark.parametrize("query", ["", ENCRYPTED], ids=["plain", "encrypted"])
async def test_archives_to_an_object_store_and_back(
    tmp_path: Path, stock: Stock, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.05)
    async with serving(FakeS3(page=50)) as server, house_with(stock, tmp_path, "archives") as house:
        url, _, rest = server.url("dir").partition("#")
        bucket = f"{url}?{query}" + (f"#{rest}" if rest else "")
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
