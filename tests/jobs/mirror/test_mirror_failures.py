"""Damaged sources, remotes that fail, locks and retries: nothing wrong lands anywhere, the log
says what is missing, and the next run brings it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.errors import Refused, Unreachable
from proxy.remotes.faults import Call, Fail, Gate
from proxy.repository import lock_vm
from tests.jobs.conftest import House, Outcome

from .mirrors import (
    MIRROR_JOB,
    Stock,
    contents,
    disks_of,
    house_with,
    messages,
    mirror,
    mirror_request,
    times,
)


def statuses(outcome: Outcome, remote: str = "remote1") -> list[str]:
    """Of the exports to one remote, in order."""
    return [each["status"] for each in outcome.of("export") if each["data"]["id"] == remote]


def failing(outcome: Outcome) -> list[dict[str, Any]]:
    return [each for each in outcome.of("export") if "error" in each["data"]]


def nth_disk(house: House, number: int, remote: str = "source") -> list[Path]:
    """The files of all disks of one backup of the source."""
    paths = sorted(disks_of(house, remote), key=lambda path: path.name)
    names = sorted({path.name for path in paths})
    return [path for path in paths if path.name == names[number]]


def flip(path: Path) -> None:
    """One bit in the data of the last block of a VHD file."""
    content = bytearray(path.read_bytes())
    content[-1024 * 1024] ^= 1
    path.write_bytes(content)


def flip_and_keep_time(path: Path) -> None:
    """As a disk does on its own: size and time stay."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -512 * 100])


def scramble_table(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1536:1540] = b"\x7f\xff\xff\xff"
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_and_keep_time,
    "cut": cut,
    "a wrong table": scramble_table,
    "missing": Path.unlink,
}


# -- damaged sources ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_delta_fails_and_so_do_those_on_it(
    tmp_path: Path, stock: Stock, damage: str
) -> None:
    async with house_with(stock, tmp_path) as house:
        for path in nth_disk(house, 2):
            DAMAGES[damage](path)
        outcome = await mirror(house, "remote1", "directories1")
        assert outcome.status == "failure"
        for remote in ("remote1", "directories1"):
            # the fourth may have all blocks itself, which the bad one has wrong
            assert statuses(outcome, remote)[:3] == ["success", "success", "failure"]
            found = await contents(house, remote)
            assert found == [stock.chain[number] for number in numbers(house, remote)]
        house.clean_remotes_but("source")


def numbers(house: House, remote: str) -> list[int]:
    """Which backups of the source a remote has."""
    of_source = times(house, "source")
    return [of_source.index(each) for each in times(house, remote)]


async def test_an_independent_chain_goes_on_behind_a_damaged_one(
    tmp_path: Path, stock: Stock
) -> None:
    """The last two backups are of another chain: here made so by a mirror of a mirror."""
    async with house_with(stock, tmp_path) as house:
        first, second, third, fourth = times(house, "source")
        await mirror(house, "chains", filter={"timestamp": {"__or": [first, second]}})
        later = {"timestamp": {"__or": [third, fourth]}}
        await mirror(house, "chains", filter=later, id="another-job")
        for path in nth_disk(house, 0, "chains"):
            cut(path)
        outcome = await mirror(house, "remote1", source="chains")
        assert statuses(outcome) == ["failure", "failure", "success", "success"]
        assert await contents(house, "remote1") == stock.chain[2:]


async def test_a_damaged_archive_fails_alone(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path, "archives") as house:
        archives = sorted(house.folder("archives").glob("xo-vm-backups/*/*.xva"))
        content = bytearray(archives[1].read_bytes())
        content[len(content) // 2] ^= 1
        archives[1].write_bytes(content)
        outcome = await mirror(house, "remote1", "encrypted1", source="archives", mode="full")
        for remote in ("remote1", "encrypted1"):
            assert statuses(outcome, remote) == ["success", "failure", "success"]
            assert len(house.backups(remote)) == 2
        assert "ECORRUPT" in {
            task["data"]["error"]["code"]
            for task in outcome.of("export")
            if "error" in task["data"]
        }
        house.clean_remotes_but("archives")


async def test_a_cut_archive_fails_alone(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path, "archives") as house:
        archives = sorted(house.folder("archives").glob("xo-vm-backups/*/*.xva"))
        cut(archives[0])
        archives[2].unlink()
        outcome = await mirror(house, "remote1", source="archives", mode="full")
        assert statuses(outcome) == ["failure", "success", "failure"]
        assert outcome.status == "failure"
        assert times(house, "remote1") == [times(house, "archives")[1]]
        house.clean_remotes_but("archives")


async def test_metadata_that_leads_elsewhere_is_not_followed(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        path = house.folder("source") / house.backups("source")[0].removeprefix("/")
        content = json.loads(path.read_bytes())
        content["vhds"] = dict.fromkeys(content["vhds"], "../../../etc/passwd.vhd")
        path.write_text(json.dumps(content))
        outcome = await mirror(house, "remote1", filter={"timestamp": content["timestamp"]})
        assert statuses(outcome) == ["failure"]
        assert "no disk of its VM" in outcome.error("backup VM")["message"]
        assert house.backups("remote1") == []


@pytest.mark.parametrize("listed", [True, False], ids=["listed by the cache", "not listed"])
async def test_unreadable_metadata_is_told_and_the_rest_copied(
    tmp_path: Path, stock: Stock, listed: bool
) -> None:
    async with house_with(stock, tmp_path) as house:
        path = house.folder("source") / house.backups("source")[3].removeprefix("/")
        path.write_text("{")
        if not listed:
            (path.parent / "cache.json.gz").unlink()
        outcome = await mirror(house, "remote1")
        assert await contents(house, "remote1") == stock.chain[:3]
        told = messages(outcome, kind="warnings")
        if listed:
            assert statuses(outcome) == ["success", "success", "success", "failure"]
        else:
            assert told == ["a backup of the source cannot be read and is not copied"]


@pytest.mark.parametrize(("source", "mode"), [("source", "delta"), ("archives", "full")])
async def test_a_source_that_changes_meanwhile_is_not_believed(
    tmp_path: Path, stock: Stock, source: str, mode: str
) -> None:
    async with house_with(stock, tmp_path, source) as house, house.faulty(source) as faults:
        backup = house.folder(source) / house.backups(source)[0].removeprefix("/")

        def change(_: object) -> None:
            backup.write_bytes(backup.read_bytes() + b" ")

        pattern = "*.vhd" if mode == "delta" else "*.xva"
        faults.add("read.open", Call(change), path=pattern)
        outcome = await mirror(house, "remote1", source=source, mode=mode)
        error = outcome.of("export")[0]["data"]["error"]
        assert error["code"] == "ECHANGED"
        assert times(house, source)[0] not in times(house, "remote1")
        again = await mirror(house, "remote1", source=source, mode=mode)
        assert again.status == "success", again.snapshot
        assert times(house, "remote1") == times(house, source)


async def test_a_source_that_goes_away_ends_the_vm(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house, house.faulty("source") as faults:
        faults.add(
            "read.*", Fail(Unreachable("the share is gone")), path="*.vhd", skip=12, times=999
        )
        outcome = await mirror(house, "remote1")
        assert outcome.status == "failure"
        assert statuses(outcome).count("failure") == 1
        assert "the share is gone" in outcome.error("backup VM")["message"]
        house.clean_remotes()


async def test_a_source_that_goes_away_fails_also_who_waited_for_later_backups(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house, house.faulty("source") as faults:
        gone = Fail(Unreachable("the share is gone"))
        faults.add("read.*", gone, path="*.vhd", skip=5, times=999)
        levels = {"remote2": {"exportRetention": 1}}
        outcome = await mirror(house, "remote1", "remote2", levels=levels)
        assert outcome.status == "failure"
        assert statuses(outcome, "remote2") == ["failure"]
        assert house.backups("remote2") == []


async def test_a_source_without_backups_is_told(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        house.folder("empty").mkdir()
        outcome = await mirror(house, "remote1", source="empty")
        told = messages(outcome, "backup run", "warnings")
        assert told == ["the source remote has no backups of VMs"]


async def test_deleting_first_takes_no_more_than_each_copy_needs(
    tmp_path: Path, stock: Stock
) -> None:
    """A source that turns out to be damaged must not cost all that is there."""
    async with house_with(stock, tmp_path) as house:
        early = {"timestamp": {"__or": times(house, "source")[:2]}}
        settings = {"exportRetention": 2, "deleteFirst": True}
        await mirror(house, "remote1", settings=settings, filter=early)
        for number in (2, 3):
            for path in nth_disk(house, number):
                cut(path)
        outcome = await mirror(house, "remote1", settings=settings)
        assert statuses(outcome) == ["failure", "failure"]
        assert await contents(house, "remote1") == stock.chain[1:2]


# -- remotes that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["remote1", "directories1"])
async def test_a_full_remote_fails_alone(tmp_path: Path, stock: Stock, target: str) -> None:
    async with house_with(stock, tmp_path) as house:
        full = Fail(Refused("ENOSPC: no space left on device", code="ENOSPC"))
        verb, done = ("create.write", 10) if target == "remote1" else ("batch.write", 30)
        async with house.faulty(target) as faults:
            faults.add(verb, full, skip=done, times=99)
            outcome = await mirror(house, target, "remote2")
        assert outcome.status == "failure"
        assert 0 < len(house.backups(target)) < 4
        assert statuses(outcome, "remote2") == ["success"] * 4
        assert statuses(outcome, target)[-1] == "failure"
        assert statuses(outcome, target).count("failure") == 1
        assert await contents(house, "remote2") == stock.chain
        assert await contents(house, target) == stock.chain[: len(times(house, target))]
        house.clean_remotes()
        again = await mirror(house, target, "remote2")
        assert again.status == "success", again.snapshot
        assert await contents(house, target) == stock.chain


@pytest.mark.parametrize(("source", "mode"), [("source", "delta"), ("archives", "full")])
async def test_only_what_failed_is_tried_again(
    tmp_path: Path, stock: Stock, source: str, mode: str
) -> None:
    async with house_with(stock, tmp_path, source) as house, house.faulty() as faults:
        verb = "create.commit"
        faults.add(verb, Fail(Unreachable("a hiccup")), skip=1)
        settings = {"nRetriesVmBackupFailures": 1}
        outcome = await mirror(
            house, "remote1", "remote2", source=source, mode=mode, settings=settings
        )
        assert outcome.status == "success", outcome.snapshot
        retries = [
            (note["message"], note["data"]["isRetry"], note["data"]["attempt"])
            for note in outcome.of("backup VM")[0]["data"]["warnings"]
        ]
        assert retries == [("Retry the VM mirror backup due to an error", True, 1)]
        assert statuses(outcome, "remote2") == ["success"] * len(times(house, source))
        assert times(house, "remote1") == times(house, "remote2") == times(house, source)


async def test_retries_end(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house, house.faulty() as faults:
        faults.add("create.commit", Fail(Unreachable("broken")), times=9)
        outcome = await mirror(house, "remote1", settings={"nRetriesVmBackupFailures": 2})
        assert outcome.status == "failure"
        assert len(messages(outcome, kind="warnings")) == 2
        assert len(outcome.of("export")) == 3
        house.clean_remotes()


async def test_a_failed_retention_is_a_failure_and_the_backup_stays(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house:
        early = {"timestamp": {"__or": times(house, "source")[:2]}}
        await mirror(house, "remote1", filter=early)
        async with house.faulty() as faults:
            faults.add("unlink", Fail(Unreachable("broken")), path="*.json", times=9)
            outcome = await mirror(house, "remote1", settings={"exportRetention": 3})
        assert outcome.status == "failure"
        assert await contents(house, "remote1") == stock.chain
        again = await mirror(house, "remote1", settings={"exportRetention": 3})
        assert again.status == "success"
        assert await contents(house, "remote1") == stock.chain[1:]


async def test_a_retention_that_failed_is_tried_again_without_another_transfer(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house:
        await mirror(house, "remote1", filter={"timestamp": {"__or": times(house, "source")[:3]}})
        async with house.faulty() as faults:
            faults.add("unlink", Fail(Unreachable("broken")), path="*.json")
            settings = {"exportRetention": 3, "nRetriesVmBackupFailures": 2}
            outcome = await mirror(house, "remote1", settings=settings)
        assert outcome.status == "success", outcome.snapshot
        assert len(outcome.of("transfer")) == 1
        assert await contents(house, "remote1") == stock.chain[1:]


async def test_weakness_9_a_failed_remote_does_not_make_the_others_write_again(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house, house.faulty() as faults:
        faults.add("list", Fail(Unreachable("broken")), path=f"xo-vm-backups/*/vdis/{MIRROR_JOB}/*")
        async with house.faulty("remote2") as other:
            settings = {"nRetriesVmBackupFailures": 1}
            outcome = await mirror(house, "remote1", "remote2", settings=settings)
            written = [path for verb, path in other.seen if verb == "create.commit"]
        assert outcome.status == "success", outcome.snapshot
        assert len(written) == len(set(written)) == 8


async def test_a_remote_that_cannot_say_what_it_has_is_named(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house, house.faulty() as faults:
        faults.add("list", Fail(Unreachable("broken")), path=f"xo-vm-backups/*/vdis/{MIRROR_JOB}/*")
        outcome = await mirror(house, "remote1", "remote2")
        assert outcome.status == "failure"
        assert statuses(outcome, "remote1")[-1] == "failure"
        assert statuses(outcome, "remote2") == ["success"] * 4


# -- locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["source", "remote1"])
async def test_who_holds_the_directory_is_waited_for(
    tmp_path: Path, stock: Stock, held: str
) -> None:
    async with house_with(stock, tmp_path) as house:
        request = mirror_request(house, "remote1")
        async with house.services.remote(house.remote_spec(held)) as remote:
            async with lock_vm(remote, stock.vm, owner="a run"):
                task = house.services.start_backup(request)
                with trio.fail_after(10):
                    while not any("waiting" in str(c.snapshot()) for c in task.children):
                        await trio.sleep(0.01)
            outcome = await house.outcome(task)
        assert outcome.status == "success", outcome.snapshot
        assert messages(outcome)[0] == "waiting for whoever holds the VM's backups"
        assert await contents(house, "remote1") == stock.chain


async def test_a_source_that_stays_locked_fails_the_vm(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        async with house.services.remote(house.remote_spec("source")) as remote:
            async with lock_vm(remote, stock.vm, owner="a run"):
                outcome = await mirror(house, "remote1", settings={"getRemoteTimeout": 200})
        assert outcome.error("backup VM")["code"] == "ELOCKED"
        assert house.backups("remote1") == []


async def test_weakness_3_a_remote_that_stays_locked_is_a_failure_and_the_only_one(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house:
        async with house.services.remote(house.remote_spec("remote1")) as remote:
            async with lock_vm(remote, stock.vm, owner="a run"):
                levels = {"remote1": {"getRemoteTimeout": 200}}
                outcome = await mirror(house, "remote1", "remote2", levels=levels)
        assert outcome.status == "failure"
        (export,) = [e for e in outcome.of("export") if e["data"]["id"] == "remote1"]
        assert export["data"]["error"]["code"] == "ELOCKED"
        assert await contents(house, "remote2") == stock.chain


async def test_mirrors_of_opposite_directions_do_not_wait_for_each_other(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house:
        await mirror(house, "remote1", filter={"timestamp": times(house, "source")[0]})
        there = house.services.start_backup(mirror_request(house, "remote1"))
        back = house.services.start_backup(
            mirror_request(house, "source", source="remote1", id="back")
        )
        for task in (there, back):
            outcome = await house.outcome(task)
            assert outcome.status == "success", outcome.snapshot
        assert await contents(house, "remote1") == stock.chain


async def test_a_lost_lock_commits_nothing(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house, house.faulty() as faults:
        gate = faults.add("create.write", Gate(), path="*.vhd")
        task = house.services.start_backup(mirror_request(house, "remote1"))
        await gate.reached.wait()
        (lock,) = house.folder("source").glob("xo-vm-backups/*.lock")
        lock.rmdir()
        with trio.fail_after(20):
            while task.pending:
                await trio.sleep(0.05)
        outcome = await house.outcome(task)
        assert outcome.status == "failure"
        assert house.backups("remote1") == []


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["timeout", "vmTimeout"])
async def test_weakness_1_time_limits_are_kept(tmp_path: Path, stock: Stock, setting: str) -> None:
    async with house_with(stock, tmp_path) as house, house.faulty() as faults:
        faults.add("create.write", Gate(), path="*.vhd")
        outcome = await mirror(house, "remote1", settings={setting: 700})
        error = outcome.error("backup VM")
        assert error["code"] == "ETIMEDOUT"
        assert outcome.status == "failure"
        house.clean_remotes()


async def test_the_export_rate_is_kept(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        began = trio.current_time()
        moved = 2 * 2 * 2 * 1024 * 1024
        settings: dict[str, Any] = {"exportRetention": 1, "maxExportRate": moved * 0.6}
        assert (await mirror(house, "remote1", settings=settings)).status == "success"
        assert trio.current_time() - began > 0.5
