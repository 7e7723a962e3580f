"""Incremental backups against the simulated pool: chains, fallbacks, retention, restores."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.errors import Refused, Unreachable
from proxy.remotes.faults import Fail
from proxy.repository import delete_backups
from proxy.simulator import SimulatedPool
from proxy.xapi import ownership

from .conftest import House, Outcome, open_house
from .test_full_backup import shape, untouched

MIB = 1024 * 1024
BLOCK = 2 * MIB
FIXTURES = Path(__file__).parents[1] / "fixtures"

KINDS = ("remote1", "directories1")
"""Names of remotes: one that keeps disks as files, one that keeps them as directories."""


@asynccontextmanager
async def house_of(root: Path, **pool: Any) -> AsyncIterator[House]:
    options = {"disk_size": 16 * MIB, **pool}
    async with open_house(SimulatedPool.small(**options), root) as house:
        yield house


def live(house: House, vm: str = "vm1") -> list[str]:
    return house.pool.disk_uuids(house.pool.vm(vm))


def digests(house: House, vm: str = "vm1") -> list[str]:
    return [house.pool.digest(uuid) for uuid in live(house, vm)]


def change(house: House, block: int, fill: int, disk: int = 0) -> None:
    house.pool.write(live(house)[disk], block * BLOCK + 4096, bytes([fill]) * 8192)


async def back_up(house: House, remote: str = "remote1", **settings: Any) -> Outcome:
    return await house.run(house.request(mode="delta", remotes=(remote,), settings=settings))


async def restored(house: House, backup_id: str, remote: str = "remote1", **how: Any) -> list[str]:
    """Digests of the disks of the VM that a backup becomes."""
    outcome = await house.outcome(await house.restore(backup_id, remote, **how))
    assert outcome.status == "success", outcome.snapshot
    ref = house.pool.store.by_uuid("VM", outcome.snapshot["data"]["result"]["id"])
    return [house.pool.digest(uuid) for uuid in house.pool.disk_uuids(ref)]


def disk_records(outcome: Outcome) -> list[dict[str, Any]]:
    """What the log says of each disk."""
    (vm,) = outcome.of("backup VM")
    found: list[dict[str, Any]] = [
        info["data"]["disks"] for info in vm["data"].get("infos", []) if info["message"] == "disks"
    ][-1]
    return found


def metadata(house: House, number: int, remote: str = "remote1") -> dict[str, Any]:
    path = house.root / remote / house.backups(remote)[number].removeprefix("/")
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


# -- chains ---------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", KINDS)
async def test_a_chain_of_backups_restores_at_every_point(tmp_path: Path, remote: str) -> None:
    async with house_of(tmp_path, disks_per_vm=2) as house:
        points: list[list[str]] = []
        for number in range(4):
            change(house, number, number + 1)
            change(house, 7, number + 1, disk=1)
            points.append(digests(house))
            outcome = await back_up(house, remote, exportRetention=10)
            assert outcome.status == "success", outcome.snapshot
            kinds = {record["got"] for record in disk_records(outcome)}
            assert kinds == ({"full"} if number == 0 else {"delta"})
        assert [len(names) for names in house.chains(remote).values()] == [4, 4]
        for backup_id, point in zip(house.backups(remote), points, strict=True):
            assert await restored(house, backup_id, remote) == point


@pytest.mark.parametrize("remote", KINDS)
async def test_upstream_weakness_24_retention_merges_in_the_run_and_its_log(
    tmp_path: Path, remote: str
) -> None:
    async with house_of(tmp_path) as house:
        points: list[list[str]] = []
        for number in range(5):
            change(house, number, number + 1)
            change(house, 0, number + 100)
            points.append(digests(house))
            outcome = await back_up(house, remote, exportRetention=2)
            assert outcome.status == "success", outcome.snapshot
            assert len(outcome.of("merge")) == (number >= 2)
        assert len(house.backups(remote)) == 2
        assert [len(names) for names in house.chains(remote).values()] == [2]
        found = [await restored(house, each, remote) for each in house.backups(remote)]
        assert found == points[-2:]
        merged, newest = (metadata(house, number, remote) for number in (0, 1))
        assert list(merged["isVhdDifferencing"].values()) == [False]
        assert list(newest["isVhdDifferencing"].values()) == [True]


async def test_the_logs_are_the_recorded_ones(tmp_path: Path) -> None:
    async with house_of(tmp_path, disks_per_vm=2, disk_size=8 * MIB) as house:
        for run in ("delta-run1", "delta-run2", "delta-run3"):
            outcome = await house.run(house.request(mode="delta", settings={"exportRetention": 2}))
            ours = [record for record in outcome.log if record.get("message") != "disks"]
            lines = (FIXTURES / "jobs" / f"{run}.ndjson").read_text().splitlines()
            assert shape(ours) == shape([json.loads(line) for line in lines][1:])
            change(house, 0, 7)
            change(house, 1, 7, disk=1)


async def test_the_metadata_has_the_recorded_fields_in_their_order(tmp_path: Path) -> None:
    recorded = json.loads((FIXTURES / "jobs" / "delta-metadata.json").read_text())
    async with house_of(tmp_path, disks_per_vm=2) as house:
        await back_up(house)
        await back_up(house)
        ours = metadata(house, -1)
    assert list(ours) == list(recorded)
    for field in ("vbds", "vdis", "vifs"):
        mine, theirs = (next(iter(record[field].values())) for record in (ours, recorded))
        assert set(theirs) - set(mine) == set()
        assert {k for k in mine if k.startswith("$")} == {k for k in theirs if k.startswith("$")}
    vdi = next(iter(ours["vdis"].values()))
    assert set(vdi["other_config"]) >= {ownership.BASE_DELTA_VDI, ownership.VM}


async def test_several_remotes_get_the_same_points(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        points: list[list[str]] = []
        for number in range(3):
            change(house, number, number + 1)
            points.append(digests(house))
            outcome = await house.run(house.request(mode="delta", remotes=KINDS))
            assert outcome.status == "success", outcome.snapshot
        for remote in KINDS:
            found = [await restored(house, each, remote) for each in house.backups(remote)]
            assert found == points[-2:]


# -- which disks are read whole, and why ------------------------------------------------------


async def test_the_full_interval_makes_a_key_backup_and_says_so(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        got: list[tuple[str, str | None]] = []
        for _ in range(5):
            outcome = await back_up(house, exportRetention=9, fullInterval=2)
            (record,) = disk_records(outcome)
            got.append((record["got"], record.get("reason")))
        assert got == [
            ("full", "NO_SNAPSHOT"),
            ("delta", None),
            ("full", "FULL_INTERVAL"),
            ("delta", None),
            ("full", "FULL_INTERVAL"),
        ]


async def test_upstream_weakness_16_each_disk_knows_the_length_of_its_own_chain(
    tmp_path: Path,
) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house)
        pool = house.pool
        vdi = pool.do(
            "VDI.create",
            {
                "name_label": "added",
                "SR": pool.default_sr,
                "virtual_size": 4 * MIB,
                "type": "user",
                "sharable": False,
                "read_only": False,
                "other_config": {},
            },
        )
        pool.do(
            "VBD.create",
            {
                "VM": pool.vm("vm1"),
                "VDI": vdi,
                "userdevice": "1",
                "bootable": False,
                "mode": "RW",
                "type": "Disk",
                "empty": False,
                "other_config": {},
                "qos_algorithm_type": "",
                "qos_algorithm_params": {},
            },
        )
        change(house, 1, 5, disk=1)
        outcome = await back_up(house)
        assert outcome.status == "success"
        assert [(r["got"], r.get("reason")) for r in disk_records(outcome)] == [
            ("delta", None),
            ("full", "NEW_DISK"),
        ]
        (snapshot,) = pool.snapshots()
        lengths = [
            pool.store.get("VDI", pool.store.by_uuid("VDI", uuid))["other_config"][
                ownership.DELTA_CHAIN_LENGTH
            ]
            for uuid in pool.disk_uuids(snapshot)
        ]
        assert lengths == ["1", "0"]
        assert await restored(house, house.backups()[-1]) == digests(house)


@pytest.mark.parametrize("remote", KINDS)
async def test_a_disk_that_grew_stays_a_delta(tmp_path: Path, remote: str) -> None:
    """Seen on Xen Orchestra: a grown disk that was merged into a directory was unreadable."""
    async with house_of(tmp_path, running=False) as house:
        await back_up(house, remote)
        house.pool.do("VDI.resize", house.pool.store.by_uuid("VDI", live(house)[0]), 24 * MIB)
        change(house, 10, 9)
        point = digests(house)
        outcome = await back_up(house, remote)
        assert [record["got"] for record in disk_records(outcome)] == ["delta"]
        for _ in range(2):  # the grown disk is merged into the key backup
            await back_up(house, remote)
        assert await restored(house, house.backups(remote)[-1], remote) == point


async def test_a_remote_without_the_base_makes_the_disk_full_for_all(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house)
        outcome = await house.run(house.request(mode="delta", remotes=("remote1", "remote2")))
        (record,) = disk_records(outcome)
        assert (record["got"], record["reason"]) == ("full", "NO_BACKUP")
        assert record["evidence"]["target"] == "remote2"


async def test_a_host_that_cannot_compute_the_difference_sends_everything(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house)
        house.pool.fail("/export_raw_vdi", status=500, error=("VDI_IO_ERROR", "no delta"))
        outcome = await back_up(house)
        assert outcome.status == "success", outcome.snapshot
        (record,) = disk_records(outcome)
        assert (record["wanted"], record["got"]) == ("delta", "full")
        assert record["steps"][0]["way"] == "delta"
        (vm,) = outcome.of("backup VM")
        messages = [warning["message"] for warning in vm["data"]["warnings"]]
        assert "Backup fell back to a full" in messages
        assert await restored(house, house.backups()[-1]) == digests(house)


async def test_upstream_weakness_8_another_codec_does_not_make_every_run_a_full(
    tmp_path: Path,
) -> None:
    from proxy.config import Config
    from proxy.config.schema import BackupsConfig, RemotesConfig
    from proxy.config.values import Seconds

    config = Config(
        remotes=RemotesConfig(disable_file_remotes=False),
        resource_cache_delay=Seconds(0),
        backups=BackupsConfig(vhd_directory_compression="gzip"),
    )
    pool = SimulatedPool.small(disk_size=8 * MIB)
    async with open_house(pool, tmp_path, config=config) as house:
        for number in range(3):
            change(house, 1, number + 1)
            outcome = await back_up(house, "directories1", exportRetention=9)
        assert [record["got"] for record in disk_records(outcome)] == ["delta"]
        assert await restored(house, house.backups("directories1")[-1], "directories1") == digests(
            house
        )


# -- failures leave the next run a delta --------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"cut": "reset", "after_bytes": 1 * MIB},
        {"cut": "end", "after_bytes": 1 * MIB},
        {"error": ("VDI_IO_ERROR", "late")},
    ],
    ids=["reset", "cut", "failed late"],
)
async def test_a_broken_export_lists_no_backup_and_keeps_the_base(
    tmp_path: Path, fault: dict[str, Any]
) -> None:
    """Seen on Xen Orchestra: a cut export left a listed backup, the run after a failed
    transfer met ELOCKED, and the base was lost so that it was a key backup."""
    async with house_of(tmp_path) as house:
        await back_up(house)
        change(house, 1, 1)
        change(house, 5, 1)
        snapshots = house.pool.snapshots()
        house.pool.fail("/export_raw_vdi", **fault)
        outcome = await back_up(house)
        assert outcome.status == "failure"
        assert len(house.backups()) == 1
        assert house.pool.snapshots() == snapshots
        again = await back_up(house)
        assert again.status == "success", again.snapshot
        assert [record["got"] for record in disk_records(again)] == ["delta"]
        assert await restored(house, house.backups()[-1]) == digests(house)


@pytest.mark.parametrize("remote", KINDS)
async def test_a_full_disk_fails_its_target_only(tmp_path: Path, remote: str) -> None:
    async with house_of(tmp_path) as house, house.faulty(remote) as faults:
        faults.fill_after(3 * MIB)
        request = house.request(mode="delta", remotes=(remote, "remote2"))
        outcome = await house.run(request)
        faults.fill_after(None)
        assert outcome.status == "failure"
        assert [task["status"] for task in outcome.of("export")].count("success") == 1
        assert house.backups(remote) == []
        assert len(house.backups("remote2")) == 1
        assert await restored(house, house.backups("remote2")[0], "remote2") == digests(house)


@pytest.mark.parametrize("at_once", [0, 1])
@pytest.mark.parametrize("room", [1000, 3 * MIB])
async def test_a_full_disk_is_told_also_where_other_disks_were_never_read(
    tmp_path: Path, room: int, at_once: int
) -> None:
    async with house_of(tmp_path, disks_per_vm=3) as house, house.faulty() as faults:
        await back_up(house)
        for disk in range(3):
            change(house, 1, 7, disk=disk)
        faults.fill_after(room)
        outcome = await back_up(house, diskPerVmConcurrency=at_once)
        faults.fill_after(None)
        assert outcome.error("backup VM")["code"] == "ENOSPC"
        assert len(house.backups()) == 1
        again = await back_up(house)
        assert {record["got"] for record in disk_records(again)} == {"delta"}
        assert await restored(house, house.backups()[-1]) == digests(house)


async def test_a_disk_that_cannot_be_read_fails_the_vm_and_leaves_nothing(tmp_path: Path) -> None:
    async with house_of(tmp_path, disks_per_vm=2) as house:
        house.pool.fail(
            "/export_raw_vdi", status=500, error=("SR_BACKEND_FAILURE_46", "bad"), times=None
        )
        outcome = await back_up(house)
        assert outcome.status == "failure"
        assert outcome.of("backup VM")[0]["data"]["error"]["code"] == "SR_BACKEND_FAILURE_46"
        untouched(house)
        await house.clean()


async def test_metadata_that_cannot_be_written_leaves_no_disk(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house, house.faulty() as faults:
        faults.add("write_file", Fail(Refused("full", code="ENOSPC")), path="*.json")
        outcome = await back_up(house)
        assert outcome.status == "failure"
        await house.clean()


async def test_a_retry_is_a_delta_and_writes_only_what_is_missing(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house)
        change(house, 2, 2)
        house.pool.fail("/export_raw_vdi", cut="reset", after_bytes=MIB)
        outcome = await back_up(house, nRetriesVmBackupFailures=1)
        assert outcome.status == "success", outcome.snapshot
        assert [record["got"] for record in disk_records(outcome)] == ["delta"]
        assert len(house.backups()) == 2


# -- snapshots on the pool ----------------------------------------------------------------------


async def test_one_snapshot_stays_as_the_next_base(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        for number in range(3):
            await back_up(house)
            (ref,) = house.pool.snapshots()
            record = house.pool.store.get("VM", ref)
            assert record["other_config"][ownership.EXPORTED] == "true"
            assert record["other_config"][ownership.DELTA_CHAIN_LENGTH] == str(number)
        untouched(house)


async def test_rolling_snapshots_and_the_base_are_counted_apart(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        for _ in range(4):
            await back_up(house, snapshotRetention=2)
        assert len(house.pool.snapshots()) == 2


# -- restores -----------------------------------------------------------------------------------


async def test_a_restore_maps_disks_to_srs_and_leaves_out_what_is_null(tmp_path: Path) -> None:
    async with house_of(tmp_path, disks_per_vm=2) as house:
        await back_up(house)
        first, second = (vdi["uuid"] for vdi in metadata(house, 0)["vdis"].values())
        sr = house.pool.store.get("SR", house.pool.srs[0])["uuid"]
        task = await house.restore(
            house.backups()[0],
            map_vdis_srs={first: sr, second: None},
            new_mac_addresses=True,
            additional_vm_tag="tested",
        )
        outcome = await house.outcome(task)
        assert outcome.status == "success", outcome.snapshot
        ref = house.pool.store.by_uuid("VM", outcome.snapshot["data"]["result"]["id"])
        vm = house.pool.store.get("VM", ref)
        assert set(vm["tags"]) >= {"restored from backup", "tested"}
        assert vm["blocked_operations"] == {}
        assert not [key for key in vm["other_config"] if key.startswith("xo:backup")]
        (uuid,) = house.pool.disk_uuids(ref)
        vdi = house.pool.store.get("VDI", house.pool.store.by_uuid("VDI", uuid))
        assert vdi["SR"] == house.pool.srs[0]
        original = house.pool.store.get("VM", house.pool.vm("vm1"))
        mac = [
            house.pool.store.get("VIF", each)["MAC"] for each in (*vm["VIFs"], *original["VIFs"])
        ]
        assert len(set(mac)) == 2


@pytest.mark.parametrize(
    "fail",
    [
        lambda pool: pool.fail("VBD.create", error=("INTERNAL_ERROR", "no")),
        lambda pool: pool.fail("/import_raw_vdi", cut="reset", after_bytes=MIB),
        lambda pool: pool.fail("/import_raw_vdi", error=("VDI_IO_ERROR", "late")),
        lambda pool: pool.fail("VIF.create", error=("INTERNAL_ERROR", "no")),
        lambda pool: pool.fail("VM.set_name_description", error=("INTERNAL_ERROR", "no")),
    ],
    ids=["drive", "reset", "late", "interface", "description"],
)
async def test_a_failed_restore_leaves_nothing(
    tmp_path: Path, fail: Callable[[SimulatedPool], Any]
) -> None:
    async with house_of(tmp_path, disks_per_vm=2) as house:
        await back_up(house)
        house.pool.mark()
        fail(house.pool)
        outcome = await house.outcome(await house.restore(house.backups()[0]))
        assert outcome.status == "failure"
        with trio.move_on_after(5):
            while house.pool.leftovers():
                await trio.sleep(0.01)
        assert house.pool.leftovers() == {}


async def test_a_remote_that_vanishes_in_a_restore_leaves_nothing(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house)
        house.pool.mark()
        async with house.faulty() as faults:
            faults.add("read.*", Fail(Unreachable("gone")), path="*.vhd", skip=4, times=99)
            outcome = await house.outcome(await house.restore(house.backups()[0]))
        assert outcome.status == "failure"
        assert house.pool.leftovers() == {}


async def test_a_differential_restore_sends_only_what_changed(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house, exportRetention=5)
        point = digests(house)
        change(house, 3, 3)
        await back_up(house, exportRetention=5)
        sr = house.pool.store.get("SR", house.pool.default_sr)["uuid"]
        uuid = next(iter(metadata(house, 0)["vdis"].values()))["uuid"]
        task = await house.restore(
            house.backups()[0], use_differential_restore=True, map_vdis_srs={uuid: sr}
        )
        outcome = await house.outcome(task)
        assert outcome.status == "success", outcome.snapshot
        result = outcome.snapshot["data"]["result"]
        assert result["size"] == BLOCK
        ref = house.pool.store.by_uuid("VM", result["id"])
        assert [house.pool.digest(each) for each in house.pool.disk_uuids(ref)] == point


async def test_a_deleted_backup_leaves_what_the_others_need(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        points: list[list[str]] = []
        for number in range(3):
            change(house, number, number + 1)
            points.append(digests(house))
            await back_up(house, exportRetention=9)
        first, middle, last = house.backups()
        async with house.services.remote(house.remote_spec("remote1")) as remote:
            await delete_backups(remote, [middle])
            assert await restored(house, last) == points[2]
            assert await restored(house, first) == points[0]
            await delete_backups(remote, [last])
        assert len(next(iter(house.chains().values()))) == 1, "nobody needs the newest two disks"
        assert await restored(house, first) == points[0]


async def test_a_backup_deleted_while_it_is_restored_is_told(tmp_path: Path) -> None:
    """The disks that it is read from may then be merged into the next one's."""
    async with house_of(tmp_path) as house:
        await back_up(house)
        house.pool.mark()
        gate = house.pool.pause_at("/import_raw_vdi", at_bytes=BLOCK)
        task = await house.restore(house.backups()[0])
        await gate.reached()
        (house.root / "remote1" / house.backups()[0][1:]).unlink()
        gate.release()
        outcome = await house.outcome(task)
        assert outcome.error("restore")["code"] == "EDELETED"
        assert house.pool.leftovers() == {}


async def test_a_restore_goes_on_while_its_chain_is_merged(tmp_path: Path) -> None:
    """Seen on Xen Orchestra: a restore that was started while a merge ran met ENOENT."""
    async with house_of(tmp_path) as house:
        for number in range(3):
            change(house, number, number + 1)
            point = digests(house)
            await back_up(house, "directories1", exportRetention=9)
        gate = house.pool.pause_at("/import_raw_vdi", at_bytes=BLOCK)
        task = await house.restore(house.backups("directories1")[-1], "directories1")
        await gate.reached()
        done = await back_up(house, "directories1", exportRetention=2)
        assert done.of("merge"), "there was a merge meanwhile"
        gate.release()
        outcome = await house.outcome(task)
        assert outcome.status == "success", outcome.snapshot
        ref = house.pool.store.by_uuid("VM", outcome.snapshot["data"]["result"]["id"])
        assert [house.pool.digest(each) for each in house.pool.disk_uuids(ref)] == point


async def test_a_run_whose_targets_are_all_away_keeps_the_base(tmp_path: Path) -> None:
    """It takes its rolling snapshot only, and the next run is a delta all the same."""
    async with house_of(tmp_path, disk_size=4 * MIB) as house:
        keep: dict[str, Any] = {"snapshotRetention": 1}
        assert (await back_up(house, **keep)).status == "success"
        spec = house.remotes.pop("remote1")
        house.remotes["remote1"] = {**spec, "url": "nope://x"}
        for _ in range(2):
            away = await back_up(house, **keep)
            assert away.status == "failure"
            assert away.of("snapshot")
        house.remotes["remote1"] = spec
        change(house, 1, 1)
        back = await back_up(house, **keep)
        assert back.status == "success", back.snapshot
        assert [record["got"] for record in disk_records(back)] == ["delta"]
        assert len(house.pool.snapshots()) == 1


async def test_snapshots_of_a_vm_without_disks_are_pruned(tmp_path: Path) -> None:
    async with house_of(tmp_path, disks_per_vm=0) as house:
        for _ in range(3):
            outcome = await back_up(house, snapshotRetention=1)
            assert outcome.status == "success", outcome.snapshot
        assert len(house.pool.snapshots()) == 1
