"""How a run reads disks: NBD and changed blocks, every step down from there, memory, VTPMs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxy.simulator import SimulatedPool

from .conftest import House, Outcome
from .test_incremental_backup import (
    BLOCK,
    MIB,
    back_up,
    change,
    digests,
    disk_records,
    house_of,
    live,
    metadata,
    restored,
)

NBD: dict[str, Any] = {"preferNbd": True, "nbdConcurrency": 2}


def enable(pool: SimulatedPool, *, cbt: bool = True) -> None:
    pool.enable_nbd("insecure_nbd")
    if cbt:
        for ref in pool.vms.disks(pool.vm("vm1")):
            pool.do("VDI.enable_cbt", ref)


def messages(outcome: Outcome, kind: str = "infos") -> list[str]:
    (vm,) = outcome.of("backup VM")
    return [note["message"] for note in vm["data"].get(kind, [])]


def way(outcome: Outcome) -> tuple[str, str]:
    (record,) = disk_records(outcome)
    return record["got"], record["via"]


def stored(house: House, number: int = -1) -> int:
    return int(metadata(house, number)["size"])


async def test_a_delta_over_nbd_reads_only_what_changed(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        enable(house.pool)
        first = await back_up(house, **NBD)
        assert way(first) == ("full", "nbd")
        assert "Transfer data using NBD" in messages(first)
        change(house, 3, 3)
        second = await back_up(house, **NBD)
        assert way(second) == ("delta", "nbd+cbt")
        assert stored(house) == 512 + 1024 + 512 + 512 + BLOCK + 512
        assert await restored(house, house.backups()[-1]) == digests(house)
        assert not house.pool.leftovers().get("dom0_vbds")


async def test_without_changed_block_tracking_the_stream_tells_what_to_read(
    tmp_path: Path,
) -> None:
    async with house_of(tmp_path) as house:
        enable(house.pool, cbt=False)
        await back_up(house, **NBD)
        change(house, 2, 2)
        outcome = await back_up(house, **NBD)
        assert way(outcome) == ("delta", "nbd")
        (record,) = disk_records(outcome)
        assert [step["way"] for step in record["steps"]] == ["cbt"]
        assert await restored(house, house.backups()[-1]) == digests(house)


async def test_without_nbd_it_says_so_and_streams(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        outcome = await back_up(house, **NBD)
        assert outcome.status == "success"
        assert way(outcome) == ("full", "stream")
        assert messages(outcome, "warnings") == [
            "can't connect through NBD, fall back to stream export"
        ]
        assert await restored(house, house.backups()[-1]) == digests(house)


async def test_nbd_that_refuses_everybody_is_left_for_the_stream(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        enable(house.pool)
        await back_up(house, **NBD)
        change(house, 1, 1)
        house.pool.fail("NBD", drop="before", times=None)
        outcome = await back_up(house, **NBD)
        assert outcome.status == "success", outcome.snapshot
        assert way(outcome) == ("delta", "stream")
        assert await restored(house, house.backups()[-1]) == digests(house)
        assert not house.pool.leftovers().get("dom0_vbds")


async def test_a_connection_lost_in_the_middle_is_made_again(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        enable(house.pool)
        house.pool.fail("NBD", cut="reset", after_bytes=3 * MIB)
        outcome = await back_up(house, **NBD)
        assert outcome.status == "success", outcome.snapshot
        assert way(outcome) == ("full", "nbd")
        assert await restored(house, house.backups()[-1]) == digests(house)


# -- snapshots that keep only what changed -------------------------------------------------------


PURGE: dict[str, Any] = {**NBD, "cbtDestroySnapshotData": True}


async def test_the_data_of_an_exported_snapshot_is_destroyed_and_deltas_go_on(
    tmp_path: Path,
) -> None:
    async with house_of(tmp_path) as house:
        house.pool.enable_nbd("insecure_nbd")
        for number in range(3):
            change(house, number, number + 1)
            outcome = await back_up(house, **PURGE)
            assert outcome.status == "success", outcome.snapshot
            told = [each for each in messages(outcome) if "snapshot data" in each.lower()]
            assert told == ["will delete snapshot data", "Snapshot data has been deleted"]
            assert house.pool.snapshots() == []
            kept = [
                record
                for _, record in house.pool.store.all("VDI")
                if record["type"] == "cbt_metadata"
            ]
            assert len(kept) == 1
        assert way(outcome) == ("delta", "nbd+cbt")
        assert await restored(house, house.backups()[-1]) == digests(house)


async def test_upstream_weakness_15_data_stays_when_the_next_run_may_need_it(
    tmp_path: Path,
) -> None:
    """Seen on Xen Orchestra: the purge after an export without NBD made later runs fulls."""
    async with house_of(tmp_path) as house:
        outcome = await back_up(house, **PURGE)  # the pool has no NBD
        assert outcome.status == "success", outcome.snapshot
        assert "snapshot data is kept: the next run may need it" in messages(outcome)
        assert len(house.pool.snapshots()) == 1
        change(house, 0, 1)
        assert way(await back_up(house, **PURGE)) == ("delta", "stream")


async def test_upstream_weakness_15_a_failed_run_destroys_no_data(tmp_path: Path) -> None:
    """Seen on Xen Orchestra: the purge ran also when the transfer had failed."""
    async with house_of(tmp_path) as house:
        house.pool.enable_nbd("insecure_nbd")
        await back_up(house, **PURGE)
        change(house, 0, 1)
        async with house.faulty() as faults:
            faults.fill_after(0)
            outcome = await back_up(house, **PURGE)
            faults.fill_after(None)
        assert outcome.status == "failure"
        assert not [each for each in messages(outcome) if "delete snapshot data" in each]
        again = await back_up(house, **PURGE)
        assert way(again) == ("delta", "nbd+cbt")
        assert await restored(house, house.backups()[-1]) == digests(house)


# -- memory, TPMs ----------------------------------------------------------------------------------


async def test_a_suspended_vm_comes_back_with_its_memory(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        outcome = await back_up(house, checkpointSnapshot=True)
        assert outcome.status == "success", outcome.snapshot
        ways = {record["disk"]: record for record in disk_records(outcome)}
        memory = [record for record in ways.values() if record.get("reason") == "MEMORY"]
        assert len(memory) == 1
        task = await house.restore(house.backups()[0])
        done = await house.outcome(task)
        assert done.status == "success", done.snapshot
        ref = house.pool.store.by_uuid("VM", done.snapshot["data"]["result"]["id"])
        vm = house.pool.store.get("VM", ref)
        assert vm["power_state"] == "Suspended"
        original = metadata(house, 0)["vmSnapshot"]["suspend_VDI"]
        snapshot = house.pool.store.get("VDI", original)["uuid"]
        copy = house.pool.store.get("VDI", vm["suspend_VDI"])["uuid"]
        assert house.pool.digest(copy) == house.pool.digest(snapshot)
        assert len(house.chains()) == 2


async def test_memory_is_whole_in_every_backup_and_counts_as_no_fallback(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        for _ in range(2):
            outcome = await back_up(house, checkpointSnapshot=True)
        assert outcome.status == "success", outcome.snapshot
        assert "Backup fell back to a full" not in messages(outcome, "warnings")
        assert sorted(metadata(house, -1)["isVhdDifferencing"].values()) == [False, True]


async def test_the_content_of_a_tpm_comes_back(tmp_path: Path) -> None:
    async with house_of(tmp_path, running=False) as house:
        pool = house.pool
        tpm = pool.do("VTPM.create", pool.vm("vm1"), False)
        pool.do("VTPM.set_contents", tpm, "the TPM's secret")
        outcome = await back_up(house)
        assert outcome.status == "success", outcome.snapshot
        done = await house.outcome(await house.restore(house.backups()[0]))
        assert done.status == "success", done.snapshot
        ref = pool.store.by_uuid("VM", done.snapshot["data"]["result"]["id"])
        (copy,) = pool.store.get("VM", ref)["VTPMs"]
        assert pool.do("VTPM.get_contents", copy) == "the TPM's secret"


@pytest.mark.parametrize("at_once", [1, 0])
async def test_disks_are_read_so_many_at_once(tmp_path: Path, at_once: int) -> None:
    async with house_of(tmp_path, disks_per_vm=3) as house:
        gate = house.pool.pause_at("/export_raw_vdi", at_bytes=BLOCK)
        task = house.services.start_backup(
            house.request(mode="delta", settings={"diskPerVmConcurrency": at_once})
        )
        await gate.reached()
        if at_once:
            assert len(house.pool.transfers) == 1
        gate.release()
        outcome = await house.outcome(task)
        assert outcome.status == "success", outcome.snapshot
        assert await restored(house, house.backups()[0]) == digests(house)
        assert len(live(house)) == 3


# -- qcow2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbd", [False, True])
async def test_a_disk_of_qcow2_is_backed_up_by_deltas(tmp_path: Path, nbd: bool) -> None:
    """Its clusters are smaller than our blocks: the rest of a changed block is the base's."""
    async with house_of(tmp_path) as house:
        pool = house.pool
        (ref,) = pool.vms.disks(pool.vm("vm1"))
        pool.store.update("VDI", ref, sm_config={"image-format": "qcow2"})
        if nbd:
            pool.enable_nbd("insecure_nbd")
        settings = NBD if nbd else {}
        points: list[list[str]] = []
        for number in range(3):
            change(house, number, number + 1)  # a few KiB of a block
            points.append(digests(house))
            outcome = await back_up(house, exportRetention=5, **settings)
            assert outcome.status == "success", outcome.snapshot
        assert disk_records(outcome)[0]["got"] == "delta"
        for backup_id, point in zip(house.backups(), points, strict=True):
            assert await restored(house, backup_id) == point
