"""Seen on upstream, must be impossible here: a backup that is lost, partial or a lie.

After each failure the log has one clear error with a stable code, nothing is listed, nothing
is left on the pool or the remote, and the next run works.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio

from proxy.config import Config
from proxy.config.schema import RemotesConfig, XapiOptions
from proxy.config.values import Seconds
from proxy.errors import Refused, Unreachable
from proxy.remotes.bounds import Bounded
from proxy.remotes.factory import RemoteOptions, opened_remote
from proxy.remotes.faults import Call, Fail, Faults, Gate, Torn
from proxy.simulator import SimulatedPool

from . import archives
from .conftest import House, Outcome, open_house, until

MIB = 1024 * 1024


async def failed(house: House, outcome: Outcome, code: str, *, snapshots: int = 0) -> None:
    """The VM failed with ``code`` and nothing remains; then a run works."""
    assert outcome.error("backup VM")["code"] == code, outcome.error("backup VM")
    assert outcome.error("backup VM")["message"]
    assert outcome.status == "failure"
    assert outcome.log[-1]["status"] == "success"  # XO derives the failure from the VM's task
    assert house.backups() == []
    assert len(house.pool.snapshots()) == snapshots
    await house.clean()
    again = await house.run(house.request())
    assert again.status == "success", again.snapshot
    assert len(house.backups()) == 1
    await house.clean()


def patient(seconds: float) -> Config:
    return Config(
        remotes=RemotesConfig(disable_file_remotes=False),
        resource_cache_delay=Seconds(0),
        xapi_options=XapiOptions(http_inactivity_timeout=Seconds(seconds)),
    )


# -- exports that end too early: weaknesses backup-runs 19, remote-layout 14, xapi 4 and 5 -----


@pytest.mark.parametrize("after", [0, 1, MIB + 17, 4 * MIB, None])
async def test_a_connection_that_is_reset(house: House, after: int | None) -> None:
    """Upstream stores what came (recorded) and reports success."""
    house.pool.fail("/export", cut="reset", after_bytes=after)
    outcome = await house.run(house.request())
    # what the host says of it counts more than what the connection or the format show
    await failed(house, outcome, "VDI_IO_ERROR")


@pytest.mark.parametrize("after", [512, MIB + 17, 4 * MIB])
async def test_an_early_clean_end(house: House, after: int) -> None:
    house.pool.fail("/export", cut="end", after_bytes=after, error=("SR_BACKEND_FAILURE_46", "x"))
    outcome = await house.run(house.request())
    await failed(house, outcome, "SR_BACKEND_FAILURE_46")


async def test_a_failed_task_after_every_byte(house: House) -> None:
    """xapi.md weakness 5: upstream never looks at the task of an export."""
    house.pool.fail("/export", error=("VDI_COPY_FAILED", "checksum"))
    await failed(house, await house.run(house.request()), "VDI_COPY_FAILED")


@pytest.mark.parametrize("task", ["success", "failure"])
@pytest.mark.parametrize("after", [MIB, 3 * MIB + 5, None])
async def test_an_http_answer_within_the_data(house: House, after: int | None, task: Any) -> None:
    """xapi.md weakness 4: ``HTTP/1.1 500`` is appended to the body."""
    house.pool.fail("/export", cut="http500", after_bytes=after, task=task)
    outcome = await house.run(house.request())
    code = outcome.error("backup VM")["code"]
    assert code == "ECORRUPT" or task == "failure"
    assert code in ("ECORRUPT", "VDI_IO_ERROR")
    await failed(house, outcome, code)


@pytest.mark.parametrize("compression", ["", "native", "zstd"])
@pytest.mark.parametrize("after", [600, MIB, 3 * MIB + 5])
async def test_upstream_weakness_19_a_cut_archive_of_which_the_host_says_success(
    house: House, after: int, compression: str
) -> None:
    """remote-layout weakness 14: neither task nor HTTP tell; only the format does."""
    house.pool.fail("/export", cut="end", after_bytes=after, task="success")
    outcome = await house.run(house.request(compression=compression))
    await failed(house, outcome, "ECORRUPT")


@pytest.mark.parametrize("status", [403, 404, 500, 503])
async def test_a_refused_export(house: House, status: int) -> None:
    house.pool.fail("/export", status=status, error=("OPERATION_NOT_ALLOWED", "no"))
    outcome = await house.run(house.request())
    assert outcome.of("export") == []  # as recorded: refused before any target begins
    await failed(house, outcome, "OPERATION_NOT_ALLOWED")


# -- exports that stand still ------------------------------------------------------------------


async def test_a_silent_export_ends(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(), tmp_path, config=patient(0.5)) as house:
        house.pool.fail("/export", cut="stall", after_bytes=3 * MIB)
        outcome = await house.run(house.request())
        assert outcome.error("backup VM")["deadline"] == "VM export: data"
        await failed(house, outcome, "ETIMEDOUT")


@pytest.mark.parametrize("cut", ["end", "reset", "stall"])
async def test_an_export_that_ends_while_its_reader_is_paused(tmp_path: Path, cut: Any) -> None:
    """Upstream hangs for five minutes when the source ends while the target is full."""
    pool = SimulatedPool.small(disk_size=24 * MIB)
    async with open_house(pool, tmp_path, config=patient(0.5)) as house:
        house.pool.fail("/export", cut=cut, after_bytes=12 * MIB + 4096)
        async with house.faulty() as faults:
            gate = faults.add("create.write", Gate())
            task = house.services.start_backup(house.request())
            await gate.reached.wait()
            await until(lambda: all(one.sent > 12 * MIB for one in pool.transfer_log))
            await trio.sleep(0.2)
            gate.release.set()
            with trio.fail_after(5):
                outcome = await house.outcome(task)
        code = {"end": "VDI_IO_ERROR", "reset": "VDI_IO_ERROR", "stall": "ETIMEDOUT"}[cut]
        await failed(house, outcome, code)


async def test_a_slow_target_is_no_silence_of_the_host(tmp_path: Path) -> None:
    pool = SimulatedPool.small(disk_size=24 * MIB)
    async with open_house(pool, tmp_path, config=patient(0.3)) as house:
        async with house.faulty() as faults:
            gate = faults.add("create.write", Gate())
            task = house.services.start_backup(house.request())
            await gate.reached.wait()
            await trio.sleep(0.9)
            gate.release.set()
            assert (await house.outcome(task)).status == "success"


# -- snapshots ---------------------------------------------------------------------------------


async def test_a_snapshot_that_ends_before_its_event_was_asked_for(house: House) -> None:
    gate = house.pool.pause_at("event.from")
    task = house.services.start_backup(house.request())
    await gate.reached()
    await until(lambda: len(house.pool.snapshots()) == 1)
    await trio.sleep(0.05)
    gate.release()
    assert (await house.outcome(task)).status == "success"
    await house.clean()


async def test_a_failed_snapshot(house: House) -> None:
    house.pool.fail("VM.snapshot", error=("SR_BACKEND_FAILURE_44", "", "no space", ""))
    outcome = await house.run(house.request())
    assert [one["status"] for one in outcome.of("snapshot")] == ["failure"]
    await failed(house, outcome, "SR_BACKEND_FAILURE_44")


async def test_a_snapshot_whose_answer_is_lost(house: House) -> None:
    """The call may have had its effect: what it made is found by its marks and destroyed."""
    house.pool.fail("VM.snapshot", drop="after")
    outcome = await house.run(house.request())
    assert (outcome.status, outcome.error("backup VM")["code"]) == ("failure", "ECONNRESET")
    assert house.pool.snapshots() == []
    # the host forgets a finished task by itself; nobody knows its reference
    assert [key for key in house.pool.leftovers() if key != "tasks"] == []


@pytest.mark.parametrize(
    "point", ["VDI.add_to_other_config", "VM.add_to_other_config", "VM.set_name_label"]
)
async def test_a_snapshot_that_cannot_be_marked(house: House, point: str) -> None:
    nth = 1 if point.startswith("VDI") or point.endswith("label") else 4
    house.pool.fail(point, nth=nth, at_call=True, error=("INTERNAL_ERROR", "db"))
    outcome = await house.run(house.request())
    await failed(house, outcome, "INTERNAL_ERROR")


# -- the remote --------------------------------------------------------------------------------


async def test_a_full_disk(house: House) -> None:
    async with house.faulty() as faults:
        faults.fill_after(2 * MIB)
        outcome = await house.run(house.request())
    assert "no space left" in outcome.error("backup VM")["message"]
    await failed(house, outcome, "ENOSPC")


async def test_a_disk_that_is_full_for_the_checksum(house: House) -> None:
    async with house.faulty() as faults:
        error = Refused("ENOSPC: no space", code="ENOSPC")
        faults.add("write_file", Torn(10, error), path="*.checksum")
        outcome = await house.run(house.request())
        assert not faults.unused
    await failed(house, outcome, "ENOSPC")


@pytest.mark.parametrize("verb", ["mktree", "lock.acquire", "create.open", "create.write"])
async def test_a_read_only_remote(house: House, verb: str) -> None:
    await house.run(house.request())
    before = house.backups()
    async with house.faulty() as faults:
        error = Refused("EROFS: read-only file system", code="EROFS")
        faults.add(verb, Fail(error), times=99)
        outcome = await house.run(house.request(settings={"exportRetention": 1}))
        assert [one for one in faults.seen if one[0] == verb]
    assert outcome.error("backup VM")["code"] == "EROFS"
    assert house.backups() == before
    await house.clean()


@pytest.mark.parametrize("first", [True, False], ids=["a first backup", "the second"])
async def test_a_remote_that_vanishes(house: House, first: bool) -> None:
    if not first:
        await house.run(house.request())
    gate = house.pool.pause_at("/export", at_bytes=3 * MIB)
    task = house.services.start_backup(house.request())
    await gate.reached()
    while house.folder().exists():  # the run may be making a file in it at this moment
        shutil.rmtree(house.folder(), ignore_errors=True)
    gate.release()
    outcome = await house.outcome(task)
    assert outcome.status == "failure"
    assert outcome.error("backup VM")["code"] in ("ENOENT", "ELOCKED", "ESTALE")
    await failed(house, outcome, outcome.error("backup VM")["code"])


async def test_a_remote_that_stops_answering_for_good(house: House) -> None:
    async with house.faulty() as faults:
        error = Unreachable("EIO: input/output error", code="EIO")
        faults.add("create.write", Fail(error))
        faults.add("unlink", Fail(error), times=99)
        faults.add("list", Fail(error), times=99, skip=2)
        outcome = await house.run(house.request())
    await failed(house, outcome, "EIO")


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_upstream_weakness_20_a_target_that_stalls_holds_the_others_up_for_its_timeout_only(
    house: House, mode: str
) -> None:
    """It is no failure of its own accord: the bound of a remote's operations makes it one."""

    @asynccontextmanager
    async def stalling(
        spec: Mapping[str, Any], *, options: RemoteOptions
    ) -> AsyncIterator[Bounded]:
        async with opened_remote(spec, options=options) as remote:
            faults = Faults(remote)
            if spec["id"] == "remote2":
                faults.add("create.write", Gate(), times=99)
            yield Bounded(faults, at_once=16, seconds=0.5)

    with mock.patch("proxy.jobs.services.opened_remote", stalling):
        outcome = await house.run(house.request(mode=mode, remotes=("remote1", "remote2")))
    status = {export["data"]["id"]: export["status"] for export in outcome.of("export")}
    assert status == {"remote1": "success", "remote2": "failure"}
    assert outcome.error("transfer")["code"] == "ETIMEDOUT"
    assert [len(house.backups(name)) for name in ("remote1", "remote2")] == [1, 0]


async def test_weakness_9_a_lock_that_is_lost_stops_the_run(house: House) -> None:
    """Upstream takes a lost lock again and goes on beside its thief."""
    async with house.faulty() as faults:
        gate = faults.add("create.write", Gate(), skip=1)
        task = house.services.start_backup(house.request())
        await gate.reached.wait()
        (lock,) = house.folder().glob("xo-vm-backups/*.lock")
        shutil.rmtree(lock)
        lock.mkdir()  # by somebody who thought it stale
        (lock / "theirs").touch()
        gate.release.set()
        outcome = await house.outcome(task)
    assert lock.exists()
    shutil.rmtree(lock)
    for record in house.folder().glob("xo-vm-backups/.*.lock-holder"):
        record.unlink()  # which says nothing without the directory
    await failed(house, outcome, "ELOCKED")


async def test_the_metadata_is_written_but_its_answer_lost(house: House) -> None:
    """A backup whose metadata stands on the remote is a backup, whatever the storage said."""
    async with house.faulty() as faults:
        error = Unreachable("ETIMEDOUT: no answer", code="ETIMEDOUT")
        faults.add("write_file", Fail(error, after=True), path="*Z.json")
        outcome = await house.run(house.request())
    listed = house.backups()
    assert len(listed) == 1
    await house.clean()
    assert archives.disks((house.folder() / listed[0][1:].replace("json", "xva")).read_bytes())
    assert outcome.status == "failure"


async def test_the_archive_changed_under_its_name(house: House) -> None:
    """A storage that says yes and holds less is noticed before the metadata."""

    def shorten(operation: Any) -> None:
        for path in house.folder().glob("xo-vm-backups/*/.*.xva*"):
            with path.open("r+b") as file:
                file.truncate(MIB)
        del operation

    async with house.faulty() as faults:
        faults.add("create.commit", Call(shorten))
        outcome = await house.run(house.request())
        assert not faults.unused
    await failed(house, outcome, "ECORRUPT")


# -- the pool ----------------------------------------------------------------------------------


async def test_an_unreachable_pool(house: House) -> None:
    outcome = await house.run(house.request(xapi={"url": "http://127.0.0.1:1"}))
    assert "name_label" not in outcome.of("backup VM")[0]["data"]
    await failed(house, outcome, "ECONNREFUSED")


async def test_a_wrong_password(house: House) -> None:
    wrong = {"credentials": {"username": "root", "password": "not the word"}}
    outcome = await house.run(house.request(xapi=wrong))
    assert "not the word" not in str(outcome.log)
    await failed(house, outcome, "SESSION_AUTHENTICATION_FAILED")


async def test_a_self_signed_host_is_refused_unless_allowed(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(), tmp_path, tls=True) as house:
        outcome = await house.run(house.request(xapi={"allowUnauthorized": False}))
        error = outcome.error("backup VM")
        assert "certificate" in error["message"]
        await failed(house, outcome, error["code"])


@pytest.mark.parametrize("point", ["VM.get_record", "VM.snapshot", "/export", "VM.destroy"])
async def test_a_session_that_expires_heals(house: House, point: str) -> None:
    """xapi.md weakness 1: a 401 on a data URL ended upstream's export."""
    gate = house.pool.pause_at(point)
    task = house.services.start_backup(house.request())
    await gate.reached()
    house.pool.sessions.expire_all()
    gate.release()
    assert (await house.outcome(task)).status == "success"
    assert house.pool.sessions.logins > 1
    assert len(house.backups()) == 1
    assert house.pool.leftovers() == {}


async def test_the_address_of_a_slave_leads_to_the_master(tmp_path: Path) -> None:
    """xapi.md weakness 2."""
    async with open_house(SimulatedPool.small(), tmp_path, slave_host="127.0.0.2") as house:
        slave = house.pool.url.replace("127.0.0.1", "127.0.0.2")
        outcome = await house.run(house.request(xapi={"url": slave}))
        assert outcome.status == "success"
        await house.clean()


async def test_an_export_redirected_to_the_host_that_has_the_disk(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(), tmp_path, slave_host="127.0.0.2") as house:
        house.pool.fail("/export", redirect=house.pool.url.replace("127.0.0.1", "127.0.0.2"))
        outcome = await house.run(house.request())
        assert outcome.status == "success"
        await house.clean()


async def test_a_pool_that_is_away_for_a_moment_is_tried_again(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(vms=2), tmp_path) as house:
        house.pool.fail("VM.snapshot", drop="before")
        uuids = [house.pool.vm_uuid(name) for name in ("vm1", "vm2")]
        settings = {"nRetriesVmBackupFailures": 1}
        outcome = await house.run(house.request(vms=uuids, settings=settings))
        assert outcome.status == "success"
        await house.clean()


async def test_upstream_weakness_23_migration_that_stays_blocked_is_told(house: House) -> None:
    house.pool.fail("VM.remove_from_blocked_operations", at_call=True, error=("X", "y"), times=None)
    outcome = await house.run(house.request())
    assert "migration" in str([vm["data"].get("warnings") for vm in outcome.of("backup VM")])
    house.pool.faults.clear()
    assert (await house.run(house.request())).status == "success"
    assert house.pool.store.get("VM", house.pool.vm("vm1"))["blocked_operations"] == {}
