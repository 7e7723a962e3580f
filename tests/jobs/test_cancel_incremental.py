"""An incremental run or restore is blocked at every stage and cancelled: nothing is left, and the
next run is a delta."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.remotes.faults import Gate as RemoteGate
from proxy.simulator import SimulatedPool

from .conftest import House, open_house
from .test_cancel import at_pool, cancel_and_wait
from .test_incremental_backup import back_up, change, digests, disk_records, restored

MIB = 1024 * 1024

Block = Callable[[House, str], AbstractAsyncContextManager[Callable[[], Any]]]


def on_pool(point: str, **where: Any) -> Block:
    def block(house: House, _: str) -> AbstractAsyncContextManager[Callable[[], Any]]:
        return at_pool(point, **where)(house)

    return block


def on_remote(verb: str, path: str = "*", **where: Any) -> Block:
    @asynccontextmanager
    async def block(house: House, remote: str) -> AsyncIterator[Callable[[], Any]]:
        async with house.faulty(remote) as faults:
            gate = faults.add(verb, RemoteGate(**where), path=path)
            yield gate.reached.wait

    return block


BOTH: dict[str, Block] = {
    "reading the VM": on_pool("VM.get_record"),
    "the clean before": on_remote("list", "xo-vm-backups/*"),
    "blocking migration": on_pool("VM.add_to_blocked_operations"),
    "looking for the base": on_remote("list", "*/vdis/*"),
    "snapshot, before its effect": on_pool("VM.snapshot"),
    "snapshot, after its effect": on_pool("VM.snapshot", stage="after"),
    "keys of the snapshot": on_pool("VDI.add_to_other_config", stage="after"),
    "export, before the first byte": on_pool("/export_raw_vdi"),
    "export, at its first byte": on_pool("/export_raw_vdi", at_bytes=0),
    "export, mid-transfer": on_pool("/export_raw_vdi", at_bytes=2 * MIB + 5000),
    "export, sent but its task has not ended": on_pool("/export_raw_vdi", stage="after"),
}
FILES: dict[str, Block] = {
    "opening the disk on the remote": on_remote("create.open", "*.vhd"),
    "writing the disk": on_remote("create.write", "*.vhd"),
    "naming the disk": on_remote("create.commit", "*.vhd"),
    "the disk has its name": on_remote("create.commit", "*.vhd", after=True),
}
DIRECTORIES: dict[str, Block] = {
    "writing a block": on_remote("batch.write"),
    "making the blocks durable": on_remote("batch.commit"),
    "before the alias": on_remote("batch.commit", after=True),
}
STAGES = [
    *((name, stage, "remote1") for name, stage in {**BOTH, **FILES}.items()),
    *((name, stage, "directories1") for name, stage in {**BOTH, **DIRECTORIES}.items()),
]


@asynccontextmanager
async def house_with_a_base(root: Path, remote: str) -> AsyncIterator[House]:
    async with open_house(SimulatedPool.small(disk_size=16 * MIB), root) as house:
        assert (await back_up(house, remote)).status == "success"
        for block in (0, 2, 5):
            change(house, block, 7)
        house.pool.mark()
        yield house


@pytest.mark.parametrize(
    ("stage", "remote"),
    [(stage, remote) for _, stage, remote in STAGES],
    ids=[f"{name} ({remote})" for name, _, remote in STAGES],
)
async def test_cancelled_at(tmp_path: Path, stage: Block, remote: str) -> None:
    """Seen on Xen Orchestra: a failed delta lost its base, so that the next run was a full."""
    async with house_with_a_base(tmp_path, remote) as house:
        snapshots, files = house.pool.snapshots(), house.files(remote)
        async with stage(house, remote) as reached:
            task = house.services.start_backup(house.request(mode="delta", remotes=(remote,)))
            with trio.fail_after(10):
                await reached()
            outcome = await cancel_and_wait(house, task)
        assert outcome.status == "canceled"
        assert house.pool.snapshots() == snapshots
        assert house.files(remote) == files
        await house.clean()
        again = await back_up(house, remote)
        assert again.status == "success", again.snapshot
        assert [record["got"] for record in disk_records(again)] == ["delta"]
        assert await restored(house, house.backups(remote)[-1], remote) == digests(house)


async def test_a_cancel_after_the_metadata_keeps_the_backup_and_its_base(tmp_path: Path) -> None:
    """From its metadata on it is a backup, and its snapshot the base of the next."""
    async with house_with_a_base(tmp_path, "remote1") as house:
        async with house.faulty() as faults:
            stand = faults.add("write_file", RemoteGate(after=True), path="*.json")
            task = house.services.start_backup(house.request(mode="delta"))
            await stand.reached.wait()
            await house.services.tasks.cancel(task.id)
            await trio.sleep(0.05)
            assert task.pending, "it waits for the outcome of what it began"
            stand.release.set()
            await house.outcome(task)
        assert len(house.backups()) == 2
        change(house, 3, 3)
        again = await back_up(house)
        assert [record["got"] for record in disk_records(again)] == ["delta"]
        assert await restored(house, house.backups()[-1]) == digests(house)
        assert len(house.pool.snapshots()) == 1


async def test_one_target_is_cancelled_alone(tmp_path: Path) -> None:
    async with house_with_a_base(tmp_path, "remote1") as house:
        gate = house.pool.pause_at("/export_raw_vdi", at_bytes=2 * MIB + 5000)
        task = house.services.start_backup(
            house.request(mode="delta", remotes=("remote1", "remote2"))
        )
        await gate.reached()
        (vm,) = task.children
        export = next(each for each in vm.children if each.properties.get("id") == "remote2")
        await house.services.tasks.cancel(export.id)
        gate.release()
        outcome = await house.outcome(task)
        assert [each["status"] for each in outcome.of("export")] == ["success", "canceled"]
        assert (len(house.backups("remote1")), house.backups("remote2")) == (2, [])
        assert await restored(house, house.backups()[-1]) == digests(house)


RESTORE: dict[str, Block] = {
    "opening the chain": on_remote("read.open", "*.vhd"),
    "making a disk": on_pool("VDI.create"),
    "a disk is made": on_pool("VDI.create", stage="after"),
    "making the VM": on_pool("VM.create"),
    "the VM is made": on_pool("VM.create", stage="after"),
    "the drive": on_pool("VBD.create", stage="after"),
    "the interface": on_pool("VIF.create"),
    "import, before the first byte": on_pool("/import_raw_vdi"),
    "import, mid-transfer": on_pool("/import_raw_vdi", at_bytes=2 * MIB + 5000),
    "reading a block": on_remote("read.read_at", "*.vhd"),
    "the VM's name": on_pool("VM.set_name_label"),
    "the description": on_pool("VM.set_name_description", stage="after"),
}


@pytest.mark.parametrize("stage", RESTORE.values(), ids=RESTORE)
async def test_a_restore_cancelled_at(tmp_path: Path, stage: Block) -> None:
    async with house_with_a_base(tmp_path, "remote1") as house:
        async with stage(house, "remote1") as reached:
            task = await house.restore(house.backups()[0])
            with trio.fail_after(10):
                await reached()
            outcome = await cancel_and_wait(house, task)
        assert outcome.status == "canceled"
        await house.clean()
        # and the same restore works
        again = await house.outcome(await house.restore(house.backups()[0]))
        assert again.status == "success", again.snapshot
