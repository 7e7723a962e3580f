"""Whole runs on an object store: backups, merges, restores, verify, deletion, cancel."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.remotes.objects import lease, retrying
from proxy.repository import delete_backups
from proxy.simulator import SimulatedPool
from tests.remotes.objects.fake_s3 import FakeS3, Request, serving

from .conftest import House, explained, open_house
from .test_incremental_backup import MIB, back_up, change, digests, restored
from .test_verify_run import statuses, verified

STORES = {
    "s3": dict[str, Any](page=50),
    "poor": {"conditions": False, "conditional_delete": False, "batches": False},
}


@asynccontextmanager
async def house_on(
    root: Path, store: dict[str, Any], **pool: Any
) -> AsyncIterator[tuple[House, FakeS3]]:
    """``remote1`` is a bucket."""
    options = {"disk_size": 16 * MIB, **pool}
    async with (
        serving(FakeS3(**store)) as server,
        open_house(SimulatedPool.small(**options), root) as house,
    ):
        url = server.url("some dir")
        house.remotes["remote1"] = {"id": "remote1", "name": "remote1", "url": url}
        yield house, server


def shown(house: House, server: FakeS3) -> Path:
    """The bucket as a folder, for what looks at remotes from outside."""
    folder = house.folder()
    shutil.rmtree(folder, ignore_errors=True)
    for key, stored in server.objects.items():
        path = folder / key.removeprefix("some dir/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored.data)
    return folder


def untouched(house: House, server: FakeS3) -> None:
    """Nothing is left but backups: no upload, no lock, nothing that was tried out."""
    folder = shown(house, server)
    assert server.uploads == {}
    assert set(house.files()) == explained(folder)
    assert [key for key in server.objects if key.endswith(".lock") or "probe" in key] == []


@pytest.mark.parametrize("store", STORES)
async def test_chains_merge_restore_and_verify(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.05)
    async with house_on(tmp_path, STORES[store]) as (house, server):
        points: list[list[str]] = []
        for number in range(3):
            change(house, number, number + 1)
            change(house, 0, number + 100)
            points.append(digests(house))
            outcome = await back_up(house, exportRetention=2)
            assert outcome.status == "success", outcome.snapshot
        untouched(house, server)
        assert [len(names) for names in house.chains().values()] == [2]
        found = [await restored(house, each) for each in house.backups()]
        assert found == points[-2:]
        assert statuses(await verified(house, "remote1", level="read")) == ["ok", "ok"]
        async with house.services.remote(house.remote_spec("remote1")) as remote:
            await delete_backups(remote, house.backups()[:1])
        shown(house, server)
        assert await restored(house, house.backups()[0]) == points[-1]
        if store == "s3":
            assert "batch" in server.verbs()


async def test_a_full_backup_is_one_object_and_restores(tmp_path: Path) -> None:
    async with house_on(tmp_path, {}, disk_size=20 * MIB) as (house, server):
        point = digests(house)
        outcome = await house.run(house.request())
        assert outcome.status == "success", outcome.snapshot
        untouched(house, server)
        assert server.verbs().count("part") == 3
        (backup,) = house.backups()
        assert await restored(house, backup) == point
        assert statuses(await verified(house, "remote1", level="read")) == ["ok"]


async def test_a_cancelled_full_backup_leaves_nothing(tmp_path: Path) -> None:
    async with house_on(tmp_path, {}, disk_size=20 * MIB) as (house, server):
        fault = server.fail("part", waits=trio.Event())
        task = house.services.start_backup(house.request())
        with trio.fail_after(10):
            await fault.reached.wait()
        task.cancel("enough")
        outcome = await house.outcome(task)
        assert outcome.status == "canceled"
        await house.services.wait_idle()
        untouched(house, server)
        assert house.files() == []


async def test_a_bucket_with_object_lock_gets_backups_that_nothing_replaces(
    tmp_path: Path,
) -> None:
    async with house_on(tmp_path, {"lock": "Enabled"}) as (house, server):
        for number in range(2):
            change(house, number, number + 1)
            outcome = await back_up(house, exportRetention=5)
            assert outcome.status == "success", outcome.snapshot
        shown(house, server)
        assert len(house.backups()) == 2
        assert statuses(await verified(house, "remote1", level="read")) == ["ok", "ok"]
        written = [request.key for request in server.log if request.verb in ("put", "copy")]
        twice = {key for key in written if written.count(key) > 1 and not key.endswith(".lock")}
        assert {key for key in twice if "probe" not in key} == set()


CHANGES = ("put", "copy", "delete", "batch", "begin", "part", "complete")


@pytest.mark.parametrize("steps", [(3, 30), (12, 36)])
async def test_a_store_that_goes_away_at_any_change_loses_no_backup(
    tmp_path: Path, steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every backup that is listed can be read whole, and the next run goes on."""
    waits = {"waits": (0.01, 0.01)}
    monkeypatch.setattr(retrying.RetryingStore.__init__, "__kwdefaults__", waits)
    async with house_on(tmp_path, STORES["s3"]) as (house, server):
        for number in range(2):
            change(house, number, number + 1)
            assert (await back_up(house, exportRetention=2)).status == "success"
        for step in steps:
            left = step

            def gone(request: Request) -> bool:
                nonlocal left
                left -= request.verb in CHANGES
                return left < 0

            change(house, 5, step)
            server.fail("*", times=10_000, status=500, code="InternalError", when=gone)
            outcome = await back_up(house, exportRetention=2)
            assert left < 0, "it was not reached"
            server.faults.clear()
            found = statuses(await verified(house, "remote1", level="read"))
            assert len(found) >= 2, outcome.snapshot
            assert set(found) == {"ok"}
            change(house, 6, step)
            point = digests(house)
            outcome = await back_up(house, exportRetention=2)
            assert outcome.status == "success", outcome.snapshot
            shown(house, server)
            assert await restored(house, house.backups()[-1]) == point
        # checksums of what an interrupted merge made are not known, so they are not stored
        assert set(house.files()) - explained(house.folder()) == set()
        assert server.uploads == {}
