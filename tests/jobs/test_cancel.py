"""A run is blocked at every stage and cancelled: nothing may be left behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.remotes.faults import Gate as RemoteGate
from proxy.simulator import Gate, SimulatedPool
from proxy.tasks import Task

from .conftest import House, Outcome, open_house

MIB = 1024 * 1024

Block = Callable[[House], AbstractAsyncContextManager[Callable[[], Any]]]
"""Arranges that a run stops somewhere; gives a wait for it to get there."""


def at_pool(point: str, **where: Any) -> Block:
    @asynccontextmanager
    async def block(house: House) -> AsyncIterator[Callable[[], Any]]:
        gate: Gate = house.pool.pause_at(point, **where)
        yield gate.reached
        # nothing releases the gate: only the cancel may end the wait

    return block


def at_remote(verb: str, path: str = "*", **where: Any) -> Block:
    @asynccontextmanager
    async def block(house: House) -> AsyncIterator[Callable[[], Any]]:
        async with house.faulty() as faults:
            gate = faults.add(verb, RemoteGate(**where), path=path)
            yield gate.reached.wait

    return block


@asynccontextmanager
async def behind_a_lock(house: House) -> AsyncIterator[Callable[[], Any]]:
    async with (
        house.services.remote(house.remote_spec("remote1")) as remote,
    ):
        vm = house.pool.vm_uuid("vm1")
        await remote.mktree(f"xo-vm-backups/{vm}")
        async with remote.lock(f"xo-vm-backups/{vm}", owner="somebody else"):

            async def waiting() -> None:
                while not house.pool.calls.log or not any(
                    call.method == "VM.get_record" for call in house.pool.calls.log
                ):
                    await trio.sleep(0.005)
                await trio.sleep(0.05)

            yield waiting


STAGES: dict[str, Block] = {
    "login": at_pool("session.login_with_password"),
    "reading the VM": at_pool("VM.get_record"),
    "the lock of the VM's directory": behind_a_lock,
    "blocking migration": at_pool("VM.add_to_blocked_operations"),
    "blocking migration, second half": at_pool("VM.add_to_blocked_operations", nth=2),
    "snapshot, before its effect": at_pool("VM.snapshot"),
    "snapshot, after its effect": at_pool("VM.snapshot", stage="after"),
    "keys of the snapshot": at_pool("VDI.add_to_other_config", stage="after"),
    "name of the snapshot": at_pool("VM.set_name_label"),
    "export, before the first byte": at_pool("/export"),
    "export, at its first byte": at_pool("/export", at_bytes=0),
    "export, mid-transfer": at_pool("/export", at_bytes=2 * MIB + 17),
    "export, sent but its task has not ended": at_pool("/export", stage="after"),
    "opening the archive on the remote": at_remote("create.open"),
    "writing the archive": at_remote("create.write"),
    "naming the archive": at_remote("create.commit"),
    "the archive has its name": at_remote("create.commit", after=True),
    "writing the checksum": at_remote("write_file", "*.checksum"),
    "after the checksum": at_remote("write_file", "*.checksum", after=True),
}


async def cancel_and_wait(house: House, task: Task) -> Outcome:
    await house.services.tasks.cancel(task.id)
    assert task.pending, "task.cancel answers at once: it waits for nothing of the run"
    with trio.fail_after(2):  # data stops moving
        while house.pool.transfers:
            await trio.sleep(0.005)
    await trio.sleep(0.05)
    house.pool.gates.release_all()  # a host does what it was told, whether its caller waits or not
    return await house.outcome(task)


@pytest.mark.parametrize("stage", STAGES)
async def test_cancelled_at(house: House, stage: str) -> None:
    before = house.pool.snapshots()
    async with STAGES[stage](house) as reached:
        task = house.services.start_backup(house.request())
        with trio.fail_after(10):
            await reached()
        outcome = await cancel_and_wait(house, task)
    assert outcome.status == "canceled"
    assert outcome.log[-1]["status"] == "failure"
    assert [task["data"].get("warnings") for task in outcome.of("backup VM")] in ([], [None])
    assert house.backups() == []
    assert house.pool.snapshots() == before
    await house.clean()
    # the next run of the same job works at once
    again = await house.run(house.request())
    assert again.status == "success", again.snapshot
    assert [task["data"].get("warnings") for task in again.of("backup VM")] == [None]
    await house.clean()


@pytest.mark.parametrize(
    "gate",
    [("write_file", "*.json", True), ("write_file", "*/cache.json.gz", False)],
    ids=["the metadata is written", "the listing cache"],
)
async def test_a_cancel_after_the_metadata_keeps_the_backup(
    house: House, gate: tuple[str, str, bool]
) -> None:
    """From its metadata on it is a backup: undoing it would lose data that somebody may see."""
    verb, path, after = gate
    async with house.faulty() as faults:
        stand = faults.add(verb, RemoteGate(after=after), path=path)
        task = house.services.start_backup(house.request())
        await stand.reached.wait()
        await house.services.tasks.cancel(task.id)
        await trio.sleep(0.05)
        assert task.pending, "it waits for the outcome of what it began"
        stand.release.set()
        await house.outcome(task)
    assert len(house.backups()) == 1
    await house.clean()


async def test_a_queued_vm_ends_without_work(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(vms=2), tmp_path) as house:
        gate = house.pool.pause_at("VM.snapshot")
        vms = [house.pool.vm_uuid(name) for name in ("vm1", "vm2")]
        task = house.services.start_backup(house.request(vms=vms, settings={"concurrency": 1}))
        await gate.reached()
        outcome = await cancel_and_wait(house, task)
        assert [vm["status"] for vm in outcome.of("backup VM")] == ["canceled", "canceled"]
        assert sum(call.method == "Async.VM.snapshot" for call in house.pool.calls.log) == 1
        await house.clean()


async def test_one_vm_of_a_run_is_cancelled_alone(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(vms=2), tmp_path) as house:
        gate = house.pool.pause_at("/export", at_bytes=MIB)
        vms = [house.pool.vm_uuid(name) for name in ("vm1", "vm2")]
        task = house.services.start_backup(house.request(vms=vms))
        await gate.reached()
        while sum(vm.pending for vm in task.children) > 1:
            await trio.sleep(0.005)  # the other one finishes
        (stuck,) = [vm for vm in task.children if vm.pending]
        await house.services.tasks.cancel(stuck.id)
        outcome = await house.outcome(task)
        assert sorted(vm["status"] for vm in outcome.of("backup VM")) == ["canceled", "success"]
        assert outcome.status == "canceled"
        assert len(house.backups()) == 1
        await house.clean()


async def test_one_target_of_a_run_is_cancelled_alone(house: House) -> None:
    async with house.faulty("remote2") as faults:
        gate = faults.add("create.write", RemoteGate())
        settings = {"nRetriesVmBackupFailures": 3}  # a cancelled target is not tried again
        task = house.services.start_backup(
            house.request(remotes=("remote1", "remote2"), settings=settings)
        )
        await gate.reached.wait()
        (vm,) = task.children
        (export,) = [one for one in vm.children if one.properties.get("id") == "remote2"]
        await house.services.tasks.cancel(export.id)
        outcome = await house.outcome(task)
    exports = {one["data"]["id"]: one["status"] for one in outcome.of("export")}
    assert exports == {"remote1": "success", "remote2": "canceled"}
    assert (len(house.backups("remote1")), house.backups("remote2")) == (1, [])
    await house.clean()


@pytest.mark.parametrize("setting", ["offlineBackup", "offlineSnapshot"])
@pytest.mark.parametrize(
    "stage",
    [
        at_pool("VM.clean_shutdown"),
        at_pool("VM.clean_shutdown", stage="after"),
        at_pool("/export", at_bytes=MIB),
        at_pool("VM.start"),
    ],
    ids=["while it shuts down", "when it is down", "mid-transfer", "while it starts again"],
)
async def test_a_vm_that_we_shut_down_is_started_again(
    house: House, setting: str, stage: Block
) -> None:
    async with stage(house) as reached:
        task = house.services.start_backup(house.request(settings={setting: True}))
        with trio.fail_after(10):
            await reached()
        task.cancel()
        house.pool.gates.release_all()
        await house.outcome(task)
    vm = house.pool.store.get("VM", house.pool.vm("vm1"))
    assert vm["power_state"] == "Running"
    assert not any(key.startswith("xo:backup") for key in vm["other_config"])
    await house.clean()


async def test_retention_is_finished_for_the_backup_at_hand(house: House) -> None:
    for _ in range(2):
        await house.run(house.request(settings={"exportRetention": 2}))
        await trio.sleep(1.01)  # names have seconds
    async with house.faulty() as faults:
        gate = faults.add("unlink", RemoteGate(), path="*.xva")
        task = house.services.start_backup(house.request(settings={"exportRetention": 1}))
        await gate.reached.wait()
        await house.services.tasks.cancel(task.id)
        gate.release.set()
        await house.outcome(task)
    await house.clean()
    assert len(house.backups()) == 2, "one of the two old ones is gone whole, the other stays"


RESTORE_STAGES: dict[str, Block] = {
    "the SR": at_pool("SR.get_by_uuid"),
    "import, before its answer": at_pool("/import"),
    "import, mid-transfer": at_pool("/import", at_bytes=2 * MIB),
    "import, done but its task does not end": at_pool("/import", stage="after"),
    "tags": at_pool("VM.add_tags"),
    "name": at_pool("VM.set_name_label", stage="after"),
    "description": at_pool("VM.set_name_description"),
    "uuid": at_pool("VM.get_uuid"),
    "reading the archive": at_remote("read.read_into"),
}


@pytest.mark.parametrize("stage", RESTORE_STAGES)
async def test_restore_cancelled_at(house: House, stage: str) -> None:
    await house.run(house.request())
    await house.clean()
    (backup,) = house.backups()
    async with RESTORE_STAGES[stage](house) as reached:
        task = await house.restore(backup)
        with trio.fail_after(10):
            await reached()
        outcome = await cancel_and_wait(house, task)
    assert outcome.status == "canceled"
    assert json.dumps(outcome.log[-1]["result"]["code"]) == '"ECANCELED"'
    await house.clean()
    assert house.backups() == [backup]


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_a_cancel_while_an_old_snapshot_is_destroyed_leaves_no_disk_of_it(
    house: House, mode: str
) -> None:
    """There are more than retention keeps when the run begins: it was made shorter."""
    for _ in range(2):
        keep = house.request(mode=mode, settings={"snapshotRetention": 2})
        assert (await house.run(keep)).status == "success"
    gate = house.pool.pause_at("VM.destroy", stage="after")
    request = house.request(mode=mode, settings={"snapshotRetention": 1})
    task = house.services.start_backup(request)
    with trio.fail_after(10):
        await gate.reached()
    task.cancel()
    await trio.sleep(0.05)
    gate.release()
    assert (await house.outcome(task)).status == "canceled"
    assert len(house.pool.snapshots()) == 1
    assert house.pool.leftovers().keys() <= {"snapshots"}
