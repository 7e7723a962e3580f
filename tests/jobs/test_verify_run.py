"""A verify as a task, and what the next run makes of what it finds."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from proxy.errors import NotFound, Refused, Unreachable
from proxy.jobs import VerifyRequest
from proxy.remotes.faults import Fail, Gate
from proxy.repository import clean_vm, lock_vm

from .conftest import House, explained
from .test_incremental_backup import (
    KINDS,
    back_up,
    change,
    digests,
    disk_records,
    house_of,
    restored,
)

Records = list[dict[str, Any]]


async def verified(house: House, remote: str = "remote1", **how: Any) -> Records:
    """Every record of a verify; its task has ended."""
    run = await house.services.start_verify(VerifyRequest(remote=house.remote_spec(remote), **how))
    with trio.fail_after(30):
        records = [record async for record in run.records()]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.services.wait_idle)
    return records


async def task_of(house: House, records: Records) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(await house.services.tasks.get(records[0]["taskId"])))
    return found


def statuses(records: Records, kind: str = "backup") -> list[str]:
    return [record["status"] for record in records if record["type"] == kind]


def some_block(house: House, remote: str) -> Path:
    """The data of the first disk's first block, or the whole file."""
    base = house.folder(remote)
    if remote.startswith("directories"):
        return min(path for path in base.rglob("*") if path.parent.parent.name == "blocks")
    return min(base.rglob("2*.vhd"))


def spoil(path: Path) -> Callable[[], None]:
    """Flip a byte in the middle as a bad disk does, without a new time; call to mend it."""
    before, raw = path.stat(), path.read_bytes()
    # of a file, in the data of a block whose content is random
    position = len(raw) // 2 if len(raw) < 2 * 1024 * 1024 else 2048 + 512 + 5000

    def write(data: bytes) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    write(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
    return lambda: write(raw)


@pytest.mark.parametrize("remote", KINDS)
async def test_what_a_run_wrote_has_known_checksums(tmp_path: Path, remote: str) -> None:
    async with house_of(tmp_path, disks_per_vm=2) as house:
        for number in range(2):
            change(house, number, 7)
            await back_up(house, remote, exportRetention=5)
        records = await verified(house, remote, level="read")
        assert [record["type"] for record in records] == [
            "start",
            *("disk", "disk", "backup"),
            *("disk", "disk", "backup"),
            "summary",
        ]
        assert {record["checksum"]["result"] for record in records if record["type"] == "disk"} == {
            "match"
        }
        summary = records[-1]
        assert summary["status"] == "ok"
        assert summary["backups"] == {"ok": 2}
        assert summary["checksums"] == {"match": 4}
        assert summary["blocksRead"] > 4
        task = await task_of(house, records)
        assert task["status"] == "success"
        assert task["data"]["name"] == "verify"
        assert task["data"]["level"] == "read"
        assert task["data"]["progress"] == 100
        assert task["data"]["result"] == summary
        assert set(house.files(remote)) == explained(house.folder(remote))


@pytest.mark.parametrize("remote", KINDS)
async def test_after_our_merges_everything_is_still_known(tmp_path: Path, remote: str) -> None:
    async with house_of(tmp_path, disks_per_vm=2) as house:
        for number in range(5):
            change(house, number, number + 1)
            change(house, 0, number + 100)
            assert (await back_up(house, remote, exportRetention=2)).status == "success"
        records = await verified(house, remote, level="read")
        assert statuses(records) == ["ok", "ok"]
        assert records[-1]["checksums"] == {"match": 4}
        assert set(house.files(remote)) == explained(house.folder(remote))
        spoil(some_block(house, remote))
        assert "damaged" in statuses(await verified(house, remote, level="read"))


async def test_damage_is_not_forgotten_when_its_disk_is_merged(tmp_path: Path) -> None:
    """The key disk is damaged in a block that no delta has: the merge takes it along."""
    async with house_of(tmp_path) as house:
        for number in range(2):
            change(house, number, number + 1)
            await back_up(house, exportRetention=5)
        path = some_block(house, "remote1")
        raw, before = path.read_bytes(), path.stat()
        end = len(raw) - 600  # of its last block
        path.write_bytes(raw[:end] + bytes([raw[end] ^ 1]) + raw[end + 1 :])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert statuses(await verified(house, level="read")) == ["damaged", "damaged"]
        (request, *_) = house.backups()
        (house.folder() / request.removeprefix("/")).unlink()
        async with house.services.remote(house.remote_spec("remote1")) as remote:
            vm = house.pool.vm_uuid("vm1")
            async with lock_vm(remote, vm, owner="test") as lock:
                await clean_vm(remote, vm, lock=lock, warn=lambda *_: None, min_age=0, merge=True)
        assert [len(names) for names in house.chains().values()] == [1]
        (disk,) = disk_records(await back_up(house, exportRetention=5))
        assert (disk["got"], disk["reason"]) == ("full", "DAMAGED")
        # and what was carried along tells the damage of the merged disk
        assert statuses(await verified(house, level="read")) == ["damaged", "ok"]


@pytest.mark.parametrize("remote", KINDS)
async def test_a_damaged_chain_is_followed_by_a_full_that_is_ok(
    tmp_path: Path, remote: str
) -> None:
    """Proxmox's habit: what is known to be broken is healed by the next backup."""
    async with house_of(tmp_path) as house:
        for number in range(2):
            change(house, number, 7)
            await back_up(house, remote, exportRetention=5)
        spoil(some_block(house, remote))
        assert statuses(await verified(house, remote)) == ["ok", "ok"]
        records = await verified(house, remote, level="read")
        assert statuses(records) == ["damaged", "damaged"]
        task = await task_of(house, records)
        assert task["status"] == "failure"
        assert task["data"]["error"]["message"] == "2 of 2 backups are damaged"
        assert any("is damaged" in each["message"] for each in task["data"]["warnings"])
        change(house, 3, 9)
        point = digests(house)
        outcome = await back_up(house, remote, exportRetention=5)
        assert outcome.status == "success"
        (disk,) = disk_records(outcome)
        assert (disk["wanted"], disk["got"], disk["reason"]) == ("full", "full", "DAMAGED")
        assert disk["evidence"]["path"].endswith(".vhd")
        records = await verified(house, remote, level="read")
        assert statuses(records) == ["damaged", "damaged", "ok"]
        outcome = await back_up(house, remote, exportRetention=5)
        (disk,) = disk_records(outcome)
        assert (disk["wanted"], disk["got"]) == ("delta", "delta")
        assert await restored(house, house.backups(remote)[-1], remote) == point


async def test_a_disk_that_healed_is_built_on_again(tmp_path: Path) -> None:
    """By nothing less than a look as deep as the one that found it."""
    async with house_of(tmp_path) as house:
        await back_up(house, exportRetention=5)
        mend = spoil(some_block(house, "remote1"))
        assert statuses(await verified(house, level="read")) == ["damaged"]
        mend()
        assert statuses(await verified(house)) == ["ok"]
        assert statuses(await verified(house, level="read", sample=0.01)) == ["ok"]
        assert await house.services.tasks.notes("damage") != {}
        assert statuses(await verified(house, level="read")) == ["ok"]
        assert await house.services.tasks.notes("damage") == {}
        (disk,) = disk_records(await back_up(house, exportRetention=5))
        assert disk["got"] == "delta"


async def test_the_damage_of_a_disk_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house, exportRetention=5)
        spoil(some_block(house, "remote1"))
        await verified(house, level="read")
        assert len(await house.services.tasks.notes("damage")) == 1
        for path in house.folder().rglob("2*"):
            if path.suffix in (".vhd", ".json"):
                path.unlink()
        await verified(house)
        assert await house.services.tasks.notes("damage") == {}


async def test_notes_of_one_remote_say_nothing_of_another(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        request = house.request(mode="delta", remotes=("remote1", "remote2"))
        await house.run(request)
        spoil(some_block(house, "remote1"))
        assert statuses(await verified(house, level="read")) == ["damaged"]
        assert statuses(await verified(house, "remote2", level="read")) == ["ok"]
        (note,) = await house.services.tasks.notes("damage")
        assert note.startswith(f"file://{tmp_path}/remote1 /xo-vm-backups/")
        # a run to the good one goes on as it was
        outcome = await back_up(house, "remote2")
        assert disk_records(outcome)[0]["got"] == "delta"


async def test_checksums_that_cannot_be_stored_are_a_warning(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house, house.faulty() as faults:
        faults.add("write_file", Fail(Unreachable("EIO", code="EIO")), path="*.xxh3")
        outcome = await back_up(house)
        assert outcome.status == "success"
        assert faults.unused == []
        warned = [
            warning["message"]
            for task in (*outcome.of("transfer"), *outcome.of("export"))
            for warning in task["data"].get("warnings", [])
        ]
        assert warned == ["the checksums of a disk were not stored"]
        records = await verified(house, level="read")
        assert statuses(records) == ["ok"]
        assert records[1]["checksum"]["reason"] == "NONE"


async def test_a_failed_backup_leaves_no_checksums(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house, house.faulty() as faults:
        faults.add("write_file", Fail(Unreachable("EIO", code="EIO")), path="*Z.json", times=9)
        assert (await back_up(house)).status == "failure"
        assert [name for name in house.files() if "xxh3" in name] == []


# -- as a task -----------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["task.cancel", "the client"])
async def test_it_can_be_cancelled_and_a_client_that_leaves_cancels_it(
    tmp_path: Path, by: str
) -> None:
    async with house_of(tmp_path) as house:
        for _ in range(2):
            await back_up(house, exportRetention=5)
        async with house.faulty() as faults:
            gate = faults.add("read.*", Gate(), skip=9)
            run = await house.services.start_verify(
                VerifyRequest(remote=house.remote_spec("remote1"), level="read")
            )
            records: Records = []
            stream = run.records()
            first = await anext(stream)

            async def read() -> None:
                records.extend([record async for record in stream])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                with trio.fail_after(10):
                    await gate.reached.wait()
                if by == "task.cancel":
                    await house.services.tasks.cancel(first["taskId"])
                else:
                    nursery.cancel_scope.cancel()
        if by == "task.cancel":
            assert records[-1]["type"] == "summary"
            assert records[-1]["status"] == "canceled"
        else:
            await cast("AsyncGenerator[Any, None]", stream).aclose()
        with trio.fail_after(10):
            await house.services.wait_idle()
        assert (await task_of(house, [first]))["status"] == "canceled"
        assert set(house.files()) == explained(house.folder())


async def test_a_storage_that_dies_ends_it_with_a_summary(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house)
        async with house.faulty() as faults:
            faults.add("list", Fail(Unreachable("EIO: gone", code="EIO")), path="xo-vm-backups")
            records = await verified(house)
        assert records[1:] == [
            {
                "type": "summary",
                "status": "unreadable",
                "level": "structure",
                "message": "EIO: gone",
            }
        ]
        assert (await task_of(house, records))["status"] == "failure"


async def test_what_cannot_be_meant_makes_no_task(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house)
        for how, error in (
            ({"filename": "/xo-vm-backups/x/20200101T000000Z.json"}, NotFound),
            ({"filename": "../../etc/passwd"}, Refused),
            ({"vm_uuid": "../.."}, Refused),
            ({"sample": 0.5}, Refused),
            ({"level": "read", "sample": 0.0}, Refused),
        ):
            with pytest.raises(error):
                await verified(house, **how)
        tasks = [json.loads(bytes(each)) async for each in house.services.tasks.list()]
        assert [task["data"]["name"] for task in tasks] == ["backup run"]
