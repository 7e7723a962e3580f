"""Long chains, retention over them, and chains that Xen Orchestra made."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import pyvhdi

from proxy.repository import delete_backups
from proxy.simulator import SimulatedPool

from .conftest import House, open_house
from .test_incremental_backup import (
    FIXTURES,
    KINDS,
    MIB,
    back_up,
    change,
    digests,
    disk_records,
    house_of,
    live,
    restored,
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("remote", KINDS)
async def test_every_point_of_thirty_deltas_before_and_after_merges(
    tmp_path: Path, remote: str
) -> None:
    async with house_of(tmp_path, disk_size=8 * MIB) as house:
        points: dict[str, list[str]] = {}
        for number in range(31):
            change(house, number % 4, number + 1)
            point = digests(house)
            outcome = await back_up(house, remote, exportRetention=99)
            assert outcome.status == "success", outcome.snapshot
            points[house.backups(remote)[-1]] = point
        assert len(points) == 31
        for backup_id, point in points.items():
            assert await restored(house, backup_id, remote) == point
        # retention takes some away, and the merges that it makes necessary change the others
        for kept in (20, 7, 1):
            await back_up(house, remote, exportRetention=kept + 1)
            left = house.backups(remote)
            assert len(left) == kept + 1
            for backup_id in left[:-1]:
                if backup_id in points:
                    assert await restored(house, backup_id, remote) == points[backup_id]


async def test_at_most_so_many_old_backups_go_in_one_run(tmp_path: Path) -> None:
    """Seen on Xen Orchestra: the limit that its configuration ships has no effect."""
    async with house_of(tmp_path) as house:
        for _ in range(5):
            await back_up(house, exportRetention=9)
        oldest = house.backups()
        await back_up(house, exportRetention=2, maxMergedDeltasPerRun=2)
        assert house.backups()[:-1] == oldest[2:], "the two oldest went"
        assert await restored(house, house.backups()[0]) == digests(house)


async def test_old_backups_may_go_first(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house, exportRetention=1)
        first = house.backups()
        change(house, 1, 1)
        gate = house.pool.pause_at("/export_raw_vdi")
        settings = {"exportRetention": 1, "deleteFirst": True}
        task = house.services.start_backup(house.request(mode="delta", settings=settings))
        await gate.reached()
        gate.release()
        outcome = await house.outcome(task)
        assert outcome.status == "success", outcome.snapshot
        assert set(house.backups()).isdisjoint(first)
        assert await restored(house, house.backups()[0]) == digests(house)


async def test_long_term_retention_keeps_the_first_of_each_day(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        kept: dict[str, Any] = {
            "longTermRetention": {"daily": {"retention": 2, "settings": {}}},
            "timezone": "Europe/Paris",
        }
        for _ in range(4):
            outcome = await back_up(house, exportRetention=1, **kept)
            assert outcome.status == "success", outcome.snapshot
        first, newest = house.backups()
        tags = [
            json.loads((house.root / "remote1" / each[1:]).read_bytes())["tags"]
            for each in (first, newest)
        ]
        assert len(tags[0]) == 1
        assert tags[0][0].startswith("daily=")
        assert tags[1] == []
        assert await restored(house, first) == digests(house)


async def test_a_removed_disk_goes_out_of_the_next_backup(tmp_path: Path) -> None:
    async with house_of(tmp_path, disks_per_vm=2, running=False) as house:
        await back_up(house)
        pool = house.pool
        drives = dict(pool.vms.vbds(pool.vm("vm1")))
        second = next(ref for ref, drive in drives.items() if drive["userdevice"] == "1")
        pool.do("VBD.destroy", second)
        change(house, 0, 9)
        outcome = await back_up(house)
        assert [record["got"] for record in disk_records(outcome)] == ["delta"]
        assert await restored(house, house.backups()[-1]) == digests(house)
        assert len(live(house)) == 1


def _edit_interface(house: House, **vif: Any) -> None:
    """Change what the backup's metadata says of the VM's interface."""
    path = house.root / "remote1" / house.backups()[0][1:]
    metadata = json.loads(path.read_bytes())
    (record,) = metadata["vifs"].values()
    record.update(vif)
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("vif", "expected"),
    [
        ({}, "original"),
        ({"$network$uuid": "gone", "$network$VLAN": 7, "$network$name_label": "seven"}, "seven"),
        ({"$network$uuid": "gone", "$network$VLAN": 7, "$network$name_label": "other"}, "seven"),
        ({"$network$uuid": "gone", "$network$VLAN": 99}, None),
    ],
    ids=["same", "VLAN and name", "VLAN", "none"],
)
async def test_an_interface_goes_to_the_network_that_fits(
    tmp_path: Path, vif: dict[str, Any], expected: str | None
) -> None:
    async with house_of(tmp_path) as house:
        pool = house.pool
        seven = pool.store.create("network", name_label="seven")
        pool.store.create("PIF", network=seven, host=pool.master, VLAN=7, IP="127.0.0.7")
        await back_up(house)
        _edit_interface(house, **vif)
        outcome = await house.outcome(await house.restore(house.backups()[0]))
        assert outcome.status == "success", outcome.snapshot
        ref = pool.store.by_uuid("VM", outcome.snapshot["data"]["result"]["id"])
        found = [
            pool.store.get("VIF", each)["network"] for each in pool.store.get("VM", ref)["VIFs"]
        ]
        wanted = {"original": [pool.network], "seven": [seven], None: []}[expected]
        assert found == wanted
        assert ("warnings" in outcome.snapshot["data"]) == (expected is None)


# -- what Xen Orchestra wrote ----------------------------------------------------------------------


def _content(path: Path) -> str:
    """SHA-256 of a recorded disk, read by another program through its chain."""
    files: list[Any] = []
    for each in sorted(path.parent.glob("*.vhd")):
        if each.name <= path.name:
            file = pyvhdi.file()
            file.open(str(each))
            if files:
                file.set_parent(files[-1])
            files.append(file)
    digest = hashlib.sha256(files[-1].read(files[-1].get_media_size())).hexdigest()
    for file in reversed(files):
        file.close()
    return digest


async def test_recorded_backups_are_restored_merged_and_verified(tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / "disks" / "recorded-files.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    expected: dict[str, list[str]] = {}
    for path in sorted(tmp_path.glob("remote1/xo-vm-backups/*/*.json")):
        vhds = json.loads(path.read_bytes())["vhds"].values()
        backup_id = f"/{path.relative_to(tmp_path / 'remote1')}"
        expected[backup_id] = [_content(path.parent / vhd) for vhd in vhds]
    assert len(expected) == 2
    async with open_house(SimulatedPool.small(), tmp_path) as house:
        house.remote_spec("remote1")
        for backup_id, content in expected.items():
            assert await restored(house, backup_id) == content
        older, newer = expected
        async with house.services.remote(house.remote_spec("remote1")) as remote:
            await delete_backups(remote, [older])
        assert [len(names) for names in house.chains().values()] == [2, 2], "merged by the next run"
        assert await restored(house, newer) == expected[newer]
