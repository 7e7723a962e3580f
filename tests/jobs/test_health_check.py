"""Health checks of backups: which VMs, what the log says, what the guest may do, what is left."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from proxy.errors import Unreachable
from proxy.jobs.health_check import Wanted, is_filtered, wanted
from proxy.jobs.requests import BackupRequest
from proxy.jobs.settings import Settings
from proxy.remotes.faults import Fail
from proxy.simulator import GuestScript
from proxy.tasks import Task
from proxy.xapi import guest, ownership

from .conftest import House, Outcome, explained, until
from .xo_status import rendered

MIB = 1024 * 1024
MODES = ["full", "delta"]
SCRIPT_TAG = "xo-backup-health-check-xenstore"
ENDLESS = "600s"
"""Longer than any test."""


def sr(house: House, number: int = 1) -> str:
    return str(house.pool.store.get("SR", house.pool.srs[number])["uuid"])


def job(house: House, mode: str, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    checked = {"healthCheckSr": sr(house), "healthCheckTimeout": ENDLESS, **(settings or {})}
    return house.request(mode=mode, settings=checked, **more)


def tag(house: House, *tags: str) -> None:
    house.pool.store.update("VM", house.pool.vm("vm1"), tags=list(tags))


def nested(task: dict[str, Any]) -> Any:
    """The names of a task and of those below it."""
    below = [nested(child) for child in task.get("tasks", [])]
    name = task["data"]["name"]
    return {name: below} if below else name


async def run(house: House, request: BackupRequest) -> Outcome:
    """A run whose end leaves nothing but backups."""
    outcome = await house.run(request)
    await clean(house)
    return outcome


async def clean(house: House) -> None:
    """Nothing is left but backups, and the snapshot that is the next base."""
    with trio.move_on_after(5):
        while left(house):
            await trio.sleep(0.01)
    assert left(house) == {}
    assert len(house.pool.snapshots()) <= 1
    for remote in house.remotes:
        assert set(house.files(remote)) == explained(house.folder(remote))
        assert list(house.folder(remote).rglob("*.lock")) == []
    assert marked(house) == []


def left(house: House) -> dict[str, list[str]]:
    found = house.pool.leftovers(connections=True)
    return {kind: names for kind, names in found.items() if kind != "snapshots"}


def marked(house: House) -> list[str]:
    """Everything on the pool that says that a run is at work on it."""
    ours = {ownership.PROXY, ownership.RUN, ownership.HEALTH_CHECK}
    return [
        record["name_label"]
        for kind in ("VM", "VDI")
        for _, record in house.pool.store.all(kind)
        if ours & set(record["other_config"])
    ]


def trials(house: House) -> list[str]:
    return [
        ref for ref, record in house.pool.store.all("VM") if ownership.is_of_health_check(record)
    ]


@asynccontextmanager
async def stopped_at(house: House, point: str, request: BackupRequest) -> AsyncIterator[Task]:
    """A run that stands at a gate of the pool; it goes on at the end of the block."""
    gate = house.pool.pause_at(point)
    task = house.services.start_backup(request)
    with trio.fail_after(15):
        await gate.reached()
    try:
        yield task
    finally:
        house.pool.gates.release_all()


# -- what it does ---------------------------------------------------------------------------


async def test_the_log_of_a_full_backup_is_upstreams(house: House) -> None:
    """backup-runs.md §4.6: the check is a task of the VM."""
    outcome = await run(house, job(house, "full"))
    assert outcome.status == "success", outcome.snapshot
    (vm,) = outcome.of("backup VM")
    assert nested(vm) == {
        "backup VM": [
            "snapshot",
            {"export": ["transfer"]},
            {"health check": ["transfer", "vmstart"]},
            "clean-vm",
        ]
    }
    (check,) = outcome.of("health check")
    result = check["tasks"][0]["data"]["result"]
    assert result.keys() == {"id", "size"}
    assert result["size"] > 4 * MIB
    assert check["data"]["id"] == "remote1"


async def test_the_log_of_an_incremental_backup_is_upstreams(house: House) -> None:
    """The check is a task of the export, between its transfer and its closing clean."""
    outcome = await run(house, job(house, "delta"))
    assert outcome.status == "success", outcome.snapshot
    (vm,) = outcome.of("backup VM")
    assert nested(vm) == {
        "backup VM": [
            "clean-vm",
            "snapshot",
            {"export": ["transfer", {"health check": ["transfer", "vmstart"]}, "clean-vm"]},
        ]
    }
    (check,) = outcome.of("health check")
    assert "id" not in check["data"]
    assert check["tasks"][0]["data"]["result"]["size"] == 4 * MIB


@pytest.mark.parametrize("mode", MODES)
async def test_upstream_weakness_12_what_is_started_is_tagged_and_marked(
    house: House, mode: str
) -> None:
    """On the SR asked for, with the content of the backup, on no network, free to start, marked."""
    pool = house.pool
    vm = pool.vm("vm1")
    pool.store.update("VM", vm, ha_restart_priority="restart", ha_always_run=True)
    content = pool.digest(pool.disk_uuids(vm)[0])
    async with stopped_at(house, "VM.start", job(house, mode)) as task:
        (ref,) = trials(house)
        trial = pool.store.get("VM", ref)
        assert "xo:no-bak=Health Check" in trial["tags"]
        assert trial["name_label"].startswith("Health Check - vm1 (")
        assert trial["VIFs"] == []
        assert "start" not in trial["blocked_operations"]
        assert not trial["ha_restart_priority"]
        assert not trial["ha_always_run"]
        keys = {
            ownership.PROXY: house.services.installation,
            ownership.RUN: task.id,
        }
        (disk,) = pool.vms.disks(ref)
        for record in (trial, pool.store.get("VDI", disk)):
            assert record["other_config"].items() >= keys.items()
            assert record["other_config"][ownership.HEALTH_CHECK] == record["uuid"]
            assert ownership.JOB not in record["other_config"]
        assert pool.store.get("VDI", disk)["SR"] == pool.srs[1]
        assert pool.digest(pool.store.get("VDI", disk)["uuid"]) == content
    assert (await house.outcome(task)).status == "success"
    await clean(house)


async def test_a_copy_of_the_test_vm_is_not_of_the_check(house: House) -> None:
    """Somebody who clones it wants to keep the clone."""
    async with stopped_at(house, "VM.start", job(house, "full")) as task:
        (ref,) = trials(house)
        house.pool.store.update("VM", ref, current_operations={})
        copy = house.pool.do("VM.clone", ref, "mine")
        assert trials(house) == [ref]
    await house.outcome(task)
    assert house.pool.store.find("VM", copy) is not None


async def test_the_next_delta_is_one(house: House) -> None:
    """The check touches neither the snapshot that is the next base nor the chain."""
    await house.run(job(house, "delta"))
    house.pool.mutate(house.pool.disk_uuids(house.pool.vm("vm1"))[0], [1])
    outcome = await run(house, job(house, "delta"))
    assert outcome.status == "success"
    (export,) = outcome.of("export")
    assert export["data"]["isFull"] is False
    assert len(outcome.of("vmstart")) == 1


@pytest.mark.parametrize(
    ("tags", "chosen", "checked"),
    [
        ([], [], True),
        (["a"], [], True),
        (["a", "b"], ["b", "c"], True),
        (["a"], ["b"], False),
        ([], ["b"], False),
        (["xo:no-health-check"], [], False),
        (["xo:no-health-check=too large", "b"], ["b"], False),
        (["no-xo:no-health-check"], [], True),
    ],
)
def test_tags_choose(tags: list[str], chosen: list[str], checked: bool) -> None:
    settings = Settings(health_check_sr="sr", health_check_vms_with_tags=chosen)
    assert wanted(settings, tags) == (Wanted("sr", 600) if checked else None)
    assert is_filtered(settings, tags) != checked
    nowhere = Settings(health_check_vms_with_tags=chosen)
    assert wanted(nowhere, tags) is None
    assert not is_filtered(nowhere, tags)


@pytest.mark.parametrize("mode", MODES)
async def test_upstream_weakness_4_a_vm_that_its_tags_leave_out_is_told_once(
    house: House, mode: str
) -> None:
    """Below the VM; upstream's exports to SRs wait for their check then and never end."""
    tag(house, "xo:no-health-check=large")
    async with house.faulty("remote2") as faults:
        faults.add("create.commit", Fail(Unreachable("ENOSPC", code="ENOSPC")))
        settings = {"nRetriesVmBackupFailures": 1}
        remotes = ("remote1", "remote2")
        outcome = await run(house, job(house, mode, settings, remotes=remotes))
    assert outcome.status == "success"
    (check,) = outcome.of("health check")
    message = "This VM doesn't match the health check's tags for this schedule"
    assert check["data"] == {"name": "health check", "infos": [{"message": message}]}
    assert "tasks" not in check
    (vm,) = outcome.of("backup VM")
    assert check in vm["tasks"]
    assert all("end" in export for export in outcome.of("export"))


async def test_a_vm_without_a_new_backup_is_not_checked(house: House) -> None:
    house.pool.fail("VM.snapshot", error=("SR_FULL", "no"))
    outcome = await run(house, job(house, "full"))
    assert outcome.status == "failure"
    assert outcome.of("health check") == []


@pytest.mark.parametrize("level", ["", "VM", "remote1"])
async def test_any_level_may_name_the_sr(house: House, level: str) -> None:
    key = house.pool.vm_uuid("vm1") if level == "VM" else level
    request = house.request(mode="delta")
    levels = request.job["settings"]
    job = {**request.job, "settings": {**levels, key: {"healthCheckSr": sr(house)}}}
    async with stopped_at(house, "VM.start", replace(request, job=job)) as task:
        (ref,) = trials(house)
        (disk,) = house.pool.vms.disks(ref)
        assert house.pool.store.get("VDI", disk)["SR"] == house.pool.srs[1]
    assert (await house.outcome(task)).status == "success"


@pytest.mark.parametrize("mode", MODES)
async def test_two_remotes_are_checked_beside_each_other(house: House, mode: str) -> None:
    house.pool.boot_seconds = -1
    task = house.services.start_backup(job(house, mode, remotes=("remote1", "directories")))
    await until(lambda: len(trials(house)) == 2, 15)
    await until(lambda: all(running(house, ref) for ref in trials(house)))
    house.pool.boot_seconds = 0
    for ref in trials(house):
        house.pool.boot(ref)
    outcome = await house.outcome(task)
    assert outcome.status == "success", outcome.snapshot
    assert len(outcome.of("vmstart")) == 2
    await clean(house)


@pytest.mark.parametrize("mode", MODES)
async def test_a_distributed_backup_is_checked_where_it_is(house: House, mode: str) -> None:
    settings = {"distributeBackups": True}
    outcome = await house.run(job(house, mode, settings, remotes=("remote1", "remote2")))
    assert outcome.status == "success", outcome.snapshot
    assert len(outcome.of("vmstart")) == 1
    await clean(house)


def running(house: House, ref: str) -> bool:
    record = house.pool.store.find("VM", ref)
    return record is not None and record["power_state"] == "Running"


# -- the guest ------------------------------------------------------------------------------


def failed(outcome: Outcome) -> dict[str, Any]:
    """The error of the check; the backup is there, and nothing tried to make it again."""
    assert outcome.status == "failure"
    assert len(outcome.of("transfer")) == 2 * len(outcome.of("health check"))
    assert all(one["status"] == "success" for one in outcome.of("transfer"))
    ends = {record["id"]: record["status"] for record in outcome.log if record["type"] == "end"}
    assert ends[outcome.task.id] == "success", "a failing root would leave XO's log pending"
    return outcome.error("health check")


@pytest.mark.parametrize(
    ("mode", "script", "message"),
    [
        ("full", GuestScript("failure"), "Backup health check script failed for VM {} "),
        (
            "delta",
            GuestScript("failure", "no database"),
            "Backup health check script failed with message no database for VM {} ",
        ),
    ],
)
async def test_the_guests_own_test_fails(
    house: House, mode: str, script: GuestScript, message: str
) -> None:
    tag(house, SCRIPT_TAG)
    house.pool.guest_script = script
    retried = {"nRetriesVmBackupFailures": 2}
    outcome = await run(house, job(house, mode, retried))
    (check,) = outcome.of("health check")
    assert failed(outcome)["message"] == message.format(check["tasks"][0]["data"]["result"]["id"])
    assert failed(outcome)["code"] == "EHEALTHSCRIPT"
    assert outcome.of("backup VM")[0]["data"].get("warnings", []) == []
    assert len(house.backups()) == 1


@pytest.mark.parametrize("mode", MODES)
async def test_the_guests_own_test_succeeds(house: House, mode: str) -> None:
    tag(house, SCRIPT_TAG)
    house.pool.guest_script = GuestScript(seconds=0.05)
    vm = house.pool.vm("vm1")
    house.pool.store.update("VM", vm, xenstore_data={"vm-data/role": "db"})
    async with stopped_at(house, "VM.start", job(house, mode)) as task:
        (ref,) = trials(house)
        assert house.pool.store.get("VM", ref)["xenstore_data"] == {
            "vm-data/role": "db",
            guest.STATE: "planned",
        }
    outcome = await house.outcome(task)
    assert outcome.status == "success"
    (start,) = outcome.of("vmstart")
    assert start["data"]["infos"] == [
        {"message": "Backup health check script successfully executed"}
    ]
    assert house.pool.store.get("VM", vm)["xenstore_data"] == {"vm-data/role": "db"}
    await clean(house)


async def test_without_its_tag_no_script_is_waited_for(house: House) -> None:
    house.pool.guest_script = GuestScript(None)
    outcome = await run(house, job(house, "full"))
    assert outcome.status == "success"
    assert "infos" not in outcome.of("vmstart")[0]["data"]


SHORT = {"healthCheckTimeout": 400}
PHASES: dict[str, tuple[str, str]] = {
    "start": ("start", r"VM \S+ not started after 0.4 second"),
    "tools": ("tools", "check that they are installed"),
    "script": ("script", "did not end within 0.4 second"),
    "script not there": ("script", "did not end within 0.4 second"),
}


@pytest.mark.parametrize("phase", PHASES)
async def test_one_budget_of_time_for_all_phases(house: House, phase: str) -> None:
    mode = "full" if phase == "tools" else "delta"
    name, message = PHASES[phase]
    pool = house.pool
    if name == "script":
        tag(house, SCRIPT_TAG)
        pool.boot_seconds = 0.2
        pool.guest_script = GuestScript(None) if phase == "script" else None
    elif name == "start":
        pool.latencies["VM.start"] = 3600
    else:
        pool.boot_seconds = -1
    outcome = await run(house, job(house, mode, SHORT))
    error = failed(outcome)
    assert error["code"] == "ETIMEDOUT"
    assert error["phase"] == name
    assert error["seconds"] == 0.4
    assert re.search(message, error["message"])
    assert outcome.of("vmstart")[0]["end"] - outcome.of("vmstart")[0]["start"] < 5000


@pytest.mark.parametrize("mode", MODES)
async def test_a_guest_that_stops_is_a_failure_at_once(house: House, mode: str) -> None:
    house.pool.boot_seconds = -1
    task = house.services.start_backup(job(house, mode))
    await until(lambda: any(running(house, ref) for ref in trials(house)), 15)
    await trio.sleep(0.1)
    house.pool.vms.halt(trials(house)[0])
    outcome = await house.outcome(task)
    assert failed(outcome)["code"] == "VM_STOPPED"
    await clean(house)


async def test_memory_in_a_backup_is_not_brought_back(house: House) -> None:
    """It would wake up on the networks that it was on."""
    tag(house, "xo-memory-backup")
    async with stopped_at(house, "VM.start", job(house, "delta")) as task:
        (ref,) = trials(house)
        trial = house.pool.store.get("VM", ref)
        assert trial["power_state"] == "Halted"
        assert trial["VIFs"] == []
    outcome = await house.outcome(task)
    assert outcome.status == "success", outcome.snapshot
    assert "memory" in outcome.of("vmstart")[0]["data"]["infos"][0]["message"]
    assert trials(house) == []


# -- what fails -----------------------------------------------------------------------------

CALLS = [
    "VM.set_name_label",
    "VM.add_to_other_config",
    "VDI.add_to_other_config",
    "VIF.destroy",
    "VM.start",
    "VM.add_to_xenstore_data",
    "VM.get_VIFs",
    "VDI.destroy",
]


@asynccontextmanager
async def dressing(house: House, request: BackupRequest) -> AsyncIterator[Task]:
    """A run whose check has made its VM, when nothing else of it is at work on the pool."""
    async with stopped_at(house, "VM.add_tags", request) as task:
        # the last call of the backup itself
        done = "VM.update_allowed_operations"
        await until(lambda: any(call.method == done for call in house.pool.calls.log))
        await trio.sleep(0.05)
        yield task


@pytest.mark.parametrize(
    ("point", "mode"), [*((point, "delta") for point in CALLS), ("VM.set_name_label", "full")]
)
async def test_any_call_may_fail(house: House, mode: str, point: str) -> None:
    tag(house, SCRIPT_TAG)
    house.pool.guest_script = GuestScript()
    blocks = {"start": "keep off"}
    house.pool.store.update("VM", house.pool.vm("vm1"), blocked_operations=blocks)
    async with dressing(house, job(house, mode)) as task:
        fault = house.pool.fail(point, error=("INTERNAL_ERROR", "db"))
    outcome = await house.outcome(task)
    assert fault.hits == 1
    assert outcome.status == "failure"
    assert outcome.error("health check")["code"] == "INTERNAL_ERROR"
    assert trials(house) == []
    disks = house.pool.leftovers().get("vdis", [])
    assert len(disks) == (point == "VDI.destroy")
    assert len(house.backups()) == 1


async def test_a_vm_that_cannot_be_dressed_is_not_kept(house: House) -> None:
    house.pool.fail("VM.add_tags", error=("INTERNAL_ERROR", "db"))
    outcome = await run(house, job(house, "full"))
    assert outcome.error("health check")["code"] == "INTERNAL_ERROR"


async def test_a_test_vm_that_cannot_be_destroyed_is_a_failure(house: House) -> None:
    """Nothing else went wrong; it runs and takes memory: somebody must know."""
    house.pool.fail("VM.hard_shutdown", error=("INTERNAL_ERROR", "stuck"))
    outcome = await house.run(job(house, "delta"))
    assert outcome.status == "failure"
    assert outcome.error("health check")["code"] == "INTERNAL_ERROR"
    (ref,) = trials(house)
    assert running(house, ref)


async def test_after_another_error_its_destruction_is_told(house: House) -> None:
    house.pool.boot_seconds = -1
    house.pool.fail("VM.hard_shutdown", error=("INTERNAL_ERROR", "stuck"))
    outcome = await house.run(job(house, "full", SHORT))
    assert failed(outcome)["code"] == "ETIMEDOUT"
    (warning,) = outcome.of("health check")[0]["data"]["warnings"]
    assert warning["message"] == "could not destroy the VM of the health check"
    assert "stuck" in warning["data"]["error"]


@pytest.mark.parametrize("mode", MODES)
async def test_blocked_operations_of_the_vm_stop_nothing(house: House, mode: str) -> None:
    """They come back with it: backups keep them."""
    vm = house.pool.vm("vm1")
    blocks = dict.fromkeys(("destroy", "hard_shutdown", "start", "start_on"), "keep off")
    house.pool.store.update("VM", vm, blocked_operations=blocks)
    outcome = await house.run(job(house, mode))
    assert outcome.status == "success", outcome.snapshot
    assert trials(house) == []
    assert house.pool.store.get("VM", vm)["blocked_operations"] == blocks


async def test_a_start_that_goes_on_after_it_was_given_up(house: House) -> None:
    """The host finishes it; only then can the VM be stopped."""
    house.pool.fail("VM.start", ignore_cancel=True)
    house.pool.latencies["VM.start"] = 1.0
    outcome = await run(house, job(house, "full", SHORT))
    assert failed(outcome)["phase"] == "start"
    assert trials(house) == []


@pytest.mark.parametrize("mode", MODES)
async def test_a_backup_that_cannot_be_read(house: House, mode: str) -> None:
    async with house.faulty() as faults:
        error = Unreachable("EIO: input/output error", code="EIO")
        faults.add("read.*", Fail(error), path="*.xva" if mode == "full" else "*.vhd")
        outcome = await house.run(job(house, mode))
    assert outcome.status == "failure"
    assert outcome.error("health check")["code"] == "EIO"
    assert trials(house) == []


@pytest.mark.parametrize("mode", MODES)
async def test_upstream_weakness_9_a_retry_hides_no_failed_check(house: House, mode: str) -> None:
    """Only the remote that failed is tried again: what the other one's check found counts."""
    house.pool.fail("VM.start", error=("NO_HOSTS_AVAILABLE",))
    async with house.faulty("remote2") as faults:
        error = Unreachable("ENOSPC", code="ENOSPC")
        verb = "create.write" if mode == "full" else "create.commit"
        faults.add(verb, Fail(error))
        settings = {"nRetriesVmBackupFailures": 1}
        outcome = await house.run(job(house, mode, settings, remotes=("remote1", "remote2")))
    assert outcome.status == "failure"
    exports = [task["data"]["id"] for task in outcome.of("export")]
    assert sorted(exports) == ["remote1", "remote2", "remote2"]
    assert len(house.backups("remote1")) == len(house.backups("remote2")) == 1
    checks = outcome.of("health check")
    assert [check["status"] for check in checks] == ["failure", "success"]
    assert rendered(outcome.log)["status"] == "failure"


# -- where it is made -----------------------------------------------------------------------


def anything_done(house: House) -> list[str]:
    """Calls of a run that are not for looking."""
    looking = re.compile(r"session\.|pool\.get_|SR\.get_|event\.|system\.")
    return [call.method for call in house.pool.calls.log if not looking.match(call.method)]


@pytest.mark.parametrize("known", [False, True])
async def test_an_sr_that_is_nowhere_ends_the_run_before_anything(
    house: House, known: bool
) -> None:
    request = job(house, "full", {"healthCheckSr": "0815"})
    if known:
        pools = {**request.record_to_xapi, "0815": "xapi1"}
        request = replace(request, record_to_xapi=pools)
    outcome = await house.run(request)
    assert outcome.status == "failure"
    error = outcome.snapshot["data"]["error"]
    assert error["code"] == "ENOENT"
    assert "0815" in error["message"]
    assert "healthCheckSr" in error["message"]
    assert outcome.snapshot.get("tasks", []) == []
    assert anything_done(house) == []
    assert not house.folder().exists()


async def test_the_call_says_which_pool_has_the_sr(house: House) -> None:
    """As XO does it for an SR of the schedule: the other pools are not asked."""
    request = job(house, "full")
    dead = {"url": "http://127.0.0.1:1", "credentials": {"username": "a", "password": "b"}}
    request = replace(
        request,
        xapis={"dead": dead, **request.xapis},
        record_to_xapi={**request.record_to_xapi, sr(house): "xapi1"},
    )
    outcome = await run(house, request)
    assert outcome.status == "success"
    assert "warnings" not in outcome.snapshot["data"]


@pytest.mark.parametrize("mode", MODES)
async def test_a_pool_that_does_not_answer_loses_its_checks_only(house: House, mode: str) -> None:
    """Better a backup that nobody has tested than none."""
    dead = {"url": "http://127.0.0.1:1", "credentials": {"username": "a", "password": "b"}}
    request = job(house, mode, {"healthCheckSr": "elsewhere"})
    request = replace(
        request,
        xapis={**request.xapis, "dead": dead},
        record_to_xapi={**request.record_to_xapi, "elsewhere": "dead"},
    )
    outcome = await run(house, request)
    assert outcome.status == "failure"
    assert outcome.error("health check")["code"] == "ECONNREFUSED"
    (warning,) = outcome.snapshot["data"]["warnings"]
    assert warning["message"] == "the health check's SR cannot be looked at now"
    assert len(house.backups()) == 1
