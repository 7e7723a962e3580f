"""Backups distributed over remotes: where each goes, what retention counts, what is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio

from proxy.errors import Refused, Unreachable
from proxy.jobs import BackupRequest
from proxy.jobs.remote_target import RemoteTarget
from proxy.remotes.faults import Fail, Gate

from .conftest import JOB, SCHEDULE, House, Outcome, explained
from .test_incremental_backup import change, digests, disk_records, house_of, restored

REMOTES = ("remote1", "remote2")
MIB = 1024 * 1024


@contextmanager
def room(**free: int | None) -> Iterator[dict[str, int | None]]:
    """What the remotes say of their free space; may be changed on the way."""

    async def space(target: RemoteTarget) -> int | None:
        await trio.lowlevel.checkpoint()
        return free[target.id]

    with mock.patch.object(RemoteTarget, "space", space):
        yield free


async def run(house: House, mode: str, **settings: Any) -> Outcome:
    levels = {"distributeBackups": True, "exportRetention": 2, **settings}
    return await house.run(house.request(mode=mode, remotes=REMOTES, settings=levels))


def tidy(house: House) -> bool:
    """Whether the remotes hold backups and nothing else."""
    names = [path for remote in REMOTES for path in house.folder(remote).rglob("*.lock")]
    return not names and all(
        set(house.files(remote)) == explained(house.folder(remote)) for remote in REMOTES
    )


def places(house: House) -> dict[str, int]:
    return {remote: len(house.backups(remote)) for remote in REMOTES}


def transfers(outcome: Outcome) -> dict[str, int]:
    """How many transfers the ``export`` of each remote has."""
    return {
        export["data"]["id"]: sum(
            task["data"]["name"] == "transfer" for task in export.get("tasks", [])
        )
        for export in outcome.of("export")
    }


async def test_a_chain_goes_on_where_it_is_whatever_the_room(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        with room(remote1=10, remote2=20) as free:
            for number in range(3):
                change(house, number, number + 1)
                outcome = await run(house, "delta")
                assert outcome.status == "success", outcome.snapshot
                assert transfers(outcome) == {"remote1": 0, "remote2": 1}
                got = [record["got"] for record in disk_records(outcome)]
                assert got == (["full"] if number == 0 else ["delta"])
                free["remote1"] = 1000
        assert places(house) == {"remote1": 0, "remote2": 2}
        assert await restored(house, house.backups("remote2")[-1], "remote2") == digests(house)
        assert tidy(house)


async def test_retention_counts_over_all_remotes(house: House) -> None:
    with room(remote1=20, remote2=10) as free:
        seen: list[dict[str, int]] = []
        for _ in range(4):
            outcome = await run(house, "full")
            assert outcome.status == "success", outcome.snapshot
            seen.append(places(house))
            free["remote1"], free["remote2"] = free["remote2"], free["remote1"]
    assert seen == [
        {"remote1": 1, "remote2": 0},
        {"remote1": 1, "remote2": 1},
        {"remote1": 1, "remote2": 1},
        {"remote1": 1, "remote2": 1},
    ]
    await house.clean()


async def test_a_chain_begins_anew_where_its_remote_is_away(tmp_path: Path) -> None:
    """And the former chain is counted, and removed, when that remote is back."""
    async with house_of(tmp_path) as house:
        with room(remote1=20, remote2=10):
            assert (await run(house, "delta")).status == "success"
            async with house.faulty("remote1") as faults:
                faults.add("lock.acquire", Fail(Unreachable("gone")))
                change(house, 1, 1)
                away = await run(house, "delta")
            assert away.status == "failure"
            assert places(house) == {"remote1": 1, "remote2": 1}
            for number in range(2):
                change(house, 2, number)
                back = await run(house, "delta")
                assert back.status == "success", back.snapshot
                assert transfers(back) == {"remote1": 0, "remote2": 1}
                assert [record["got"] for record in disk_records(back)] == ["delta"]
        assert places(house) == {"remote1": 0, "remote2": 2}
        found = [await restored(house, each, "remote2") for each in house.backups("remote2")]
        assert found[-1] == digests(house)
        assert tidy(house)


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_a_retry_goes_elsewhere(tmp_path: Path, mode: str) -> None:
    async with house_of(tmp_path) as house, house.faulty("remote1") as faults:
        with room(remote1=20, remote2=10):
            faults.fill_after(1 * MIB)
            outcome = await run(house, mode, nRetriesVmBackupFailures=1)
            faults.fill_after(None)
        assert outcome.status == "success", outcome.snapshot
        assert places(house) == {"remote1": 0, "remote2": 1}
        assert await restored(house, house.backups("remote2")[0], "remote2") == digests(house)
        assert tidy(house)


async def test_limited_and_unlimited_remotes_do_not_mix(house: House) -> None:
    with room(remote1=20, remote2=None):
        outcome = await run(house, "full")
    assert outcome.status == "failure"
    assert outcome.error("backup VM")["message"] == (
        "an Aggregate remote can't use a mix of limited and unlimited storages"
    )
    assert places(house) == {"remote1": 0, "remote2": 0}


async def test_remotes_without_limit_take_turns_by_chance(house: House) -> None:
    with room(remote1=None, remote2=None):
        outcome = await run(house, "full")
    assert outcome.status == "success"
    assert sum(places(house).values()) == 1


def request_with(house: House, **keeps: int) -> BackupRequest:
    """A distributed job of which each remote keeps as many backups as is said."""
    request = house.request(remotes=REMOTES)
    settings = {SCHEDULE: {"distributeBackups": True, "exportRetention": 1}} | {
        remote: {"exportRetention": keep} for remote, keep in keeps.items()
    }
    return replace(request, job={**request.job, "settings": settings})


async def test_a_remote_that_keeps_nothing_takes_no_part(house: House) -> None:
    with room(remote1=20, remote2=10):
        outcome = await house.run(request_with(house, remote1=0))
    assert transfers(outcome) == {"remote2": 1}
    assert places(house) == {"remote1": 0, "remote2": 1}


async def test_with_no_remote_left_the_vm_says_so(house: House) -> None:
    outcome = await house.run(request_with(house, remote1=0, remote2=0))
    assert outcome.error("backup VM")["code"] == "ENOTARGET"
    assert JOB not in house.services.running_jobs()


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_a_cancel_leaves_nothing_on_any_remote(tmp_path: Path, mode: str) -> None:
    async with house_of(tmp_path) as house, house.faulty("remote1") as faults:
        gate = faults.add("create.write", Gate())
        with room(remote1=20, remote2=10):
            request = house.request(
                mode=mode, remotes=REMOTES, settings={"distributeBackups": True}
            )
            task = house.services.start_backup(request)
            with trio.fail_after(10):
                await gate.reached.wait()
            task.cancel()
            outcome = await house.outcome(task)
        assert outcome.status == "canceled"
        assert places(house) == {"remote1": 0, "remote2": 0}
        assert house.pool.snapshots() == []
        await house.clean()


async def test_a_remote_that_does_not_say_its_room_is_left_out(house: House) -> None:
    async def space(target: RemoteTarget) -> int | None:
        if target.id == "remote1":
            raise Refused("it does not say", code="EIO")
        return 10

    with mock.patch.object(RemoteTarget, "space", space):
        outcome = await run(house, "full")
    assert outcome.status == "failure"
    assert outcome.error("export")["code"] == "EIO"
    assert places(house) == {"remote1": 0, "remote2": 1}
    await house.clean()


async def test_without_any_room_that_is_known_the_vm_fails(house: House) -> None:
    async def space(target: RemoteTarget) -> int | None:
        raise Refused(f"{target.id} does not say", code="EIO")

    with mock.patch.object(RemoteTarget, "space", space):
        outcome = await run(house, "full")
    assert [each["code"] for each in outcome.error("backup VM")["errors"]] == ["EIO", "EIO"]
    await house.clean()


async def test_a_retry_of_a_delta_goes_elsewhere(tmp_path: Path) -> None:
    """Where the base is nothing can be written any more."""
    async with house_of(tmp_path) as house, house.faulty("remote1") as faults:
        with room(remote1=20, remote2=10):
            assert (await run(house, "delta")).status == "success"
            change(house, 1, 1)
            faults.fill_after(0)
            outcome = await run(house, "delta", nRetriesVmBackupFailures=1)
            faults.fill_after(None)
        assert outcome.status == "success", outcome.snapshot
        assert places(house) == {"remote1": 1, "remote2": 1}
        assert await restored(house, house.backups("remote2")[0], "remote2") == digests(house)
