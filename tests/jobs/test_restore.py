"""A VM made from a backup: the same bytes, dressed as recorded, or nothing at all."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.errors import Corrupt, NotFound, ProxyError, Refused, Unreachable
from proxy.remotes.faults import Fail
from proxy.simulator import SimulatedPool

from . import archives
from .conftest import House, Outcome, open_house
from .test_full_backup import archive, live_disks, recorded, shape

MIB = 1024 * 1024
FIXTURES = Path(__file__).parents[1] / "fixtures"


@asynccontextmanager
async def backed_up(root: Path, **how: Any) -> AsyncIterator[House]:
    """A house with one backup of ``vm1``, halted, with two disks."""
    compression = how.pop("compression", "")
    vm = {"running": False, "disks_per_vm": 2, "fill": 0.5, **how}
    async with open_house(SimulatedPool.small(**vm), root) as house:
        assert (await house.run(house.request(compression=compression))).status == "success"
        await house.clean()
        yield house


async def restore(house: House, **settings: Any) -> Outcome:
    (backup, *_) = house.backups()
    return await house.outcome(await house.restore(backup, **settings))


def restored(house: House, outcome: Outcome) -> str:
    """The reference of the VM that the restore answers."""
    assert outcome.status == "success", outcome.snapshot
    ref: str = house.pool.store.by_uuid("VM", outcome.snapshot["data"]["result"]["id"])
    return ref


def disks_of(house: House, vm: str) -> dict[str, bytes]:
    return {
        house.pool.store.get("VDI", ref)["name_label"]: b"".join(
            house.pool.disks.contents[ref].chunks()
        )
        for ref in house.pool.vms.disks(vm)
    }


async def undone(house: House, outcome: Outcome, code: str) -> None:
    """The restore failed, as a whole and in its log, and left nothing on the pool."""
    assert outcome.status == "failure"
    assert outcome.snapshot["data"]["error"]["code"] == code, outcome.snapshot
    assert outcome.log[-1]["status"] == "failure"  # XO reads the root of a restore
    assert outcome.log[-1]["result"]["message"]
    with trio.move_on_after(3):
        while house.pool.leftovers(connections=True):
            await trio.sleep(0.01)
    assert house.pool.leftovers(connections=True) == {}


# -- what is made ---------------------------------------------------------------------------


async def test_the_log_is_the_recorded_one(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        outcome = await restore(house)
        assert shape(outcome.log) == shape(recorded("full-restore.ndjson"))
        start = outcome.log[0]["properties"]
        theirs = recorded("full-restore.ndjson")[0]["properties"]
        assert {**start, "backupId": "", "srId": "", "time": 0} == {
            **theirs,
            "backupId": "",
            "srId": "",
            "time": 0,
        }
        size = archive(house).stat().st_size
        results = [r["result"] for r in outcome.log if r["type"] == "end"]
        assert results[0] == results[1]
        assert results[0]["size"] == size


@pytest.mark.parametrize("compression", ["", "native", "zstd"])
async def test_every_byte_is_back(tmp_path: Path, compression: str) -> None:
    async with backed_up(tmp_path, compression=compression) as house:
        vm = restored(house, await restore(house))
        assert disks_of(house, vm) == live_disks(house)
        for disk in house.pool.vms.disks(vm):
            assert house.pool.store.get("VDI", disk)["SR"] == house.pool.srs[1]
        assert not [k for k in house.pool.leftovers() if k not in ("vms", "vdis")]


async def test_both_ways_tell_bytes_rate_and_what_limits_them(house: House) -> None:
    """While they run a total that is only an estimate says so; at the end all is known."""
    gate = house.pool.pause_at("/export", at_bytes=3 * 1024 * 1024)
    task = house.services.start_backup(house.request())
    with trio.fail_after(10):
        await gate.reached()
        while not (running := Outcome(task, [], json.loads(task.snapshot())).of("transfer")):
            await trio.sleep(0.01)
        while running[0]["data"]["transfer"]["done"] == 0:
            await trio.sleep(0.01)
            running = Outcome(task, [], json.loads(task.snapshot())).of("transfer")
    moved = running[0]["data"]["transfer"]
    assert moved["estimated"] is True
    assert 0 < moved["done"] < moved["total"]
    house.pool.gates.release_all()
    stored = await house.outcome(task)
    back = await house.outcome(await house.restore(house.backups()[0]))
    for outcome in (stored, back):
        (transfer,) = outcome.of("transfer")
        moved = transfer["data"]["transfer"]
        assert moved["done"] == moved["total"] == transfer["data"]["result"]["size"]
        assert moved["rate"] > 0
        assert moved["bottleneck"] in {"source", "network", "CPU", "target"}
        assert "estimated" not in moved
        assert "eta" not in moved


async def test_a_vm_dressed_as_recorded(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        vm = house.pool.store.get("VM", restored(house, await restore(house)))
        date = re.search(r"\d{8}T\d{6}Z", house.backups()[0])
        assert date is not None
        assert vm["name_label"] == f"vm1 ({date[0]})"
        assert re.fullmatch(
            r"Restored on \d{8}T\d{6}Z from remote1 - simulated VM", vm["name_description"]
        )
        assert vm["tags"] == ["restored from backup"]
        assert (vm["power_state"], vm["is_a_template"]) == ("Halted", False)
        assert set(vm["other_config"]) == {"base_template_name", "mac_seed"}
        assert vm["blocked_operations"] == {}


async def test_a_backup_of_a_running_vm_restores_without_its_keys(house: House) -> None:
    await house.run(house.request())
    outcome = await restore(house)
    ref = restored(house, outcome)
    vm = house.pool.store.get("VM", ref)
    assert vm["name_label"].startswith("vm1 (")  # not the snapshot's label
    configs = [house.pool.store.get("VDI", d)["other_config"] for d in house.pool.vms.disks(ref)]
    found = [key for config in [vm["other_config"], *configs] for key in config]
    assert not [key for key in found if key.startswith("xo:")]


async def test_upstream_weakness_29_no_migration_block_comes_back(tmp_path: Path) -> None:
    """A VM exported without snapshot carries our own block inside its archive."""
    async with backed_up(tmp_path) as house:
        (in_archive,) = archives.records(archives.unpacked(archive(house)))["VM"]
        assert set(in_archive["blocked_operations"]) == {"pool_migrate", "migrate_send"}
        vm = house.pool.store.get("VM", restored(house, await restore(house)))
        assert vm["blocked_operations"] == {}


async def test_somebody_elses_block_comes_back(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(running=False), tmp_path) as house:
        house.pool.do("VM.add_to_blocked_operations", house.pool.vm("vm1"), "start", "spare")
        await house.run(house.request())
        vm = house.pool.store.get("VM", restored(house, await restore(house)))
        assert vm["blocked_operations"] == {"start": "spare"}


async def test_upstream_weakness_12_the_additional_tag_is_set(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        outcome = await restore(house, additional_vm_tag="xo:no-bak=Health Check")
        vm = house.pool.store.get("VM", restored(house, outcome))
        assert sorted(vm["tags"]) == ["restored from backup", "xo:no-bak=Health Check"]


def macs(house: House, vm: str) -> list[str]:
    vifs = house.pool.store.get("VM", vm)["VIFs"]
    return [house.pool.store.get("VIF", ref)["MAC"] for ref in vifs]


async def test_upstream_weakness_12_new_mac_addresses_are_new(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        original = house.pool.vm("vm1")
        vm = restored(house, await restore(house, new_mac_addresses=True))
        assert len(macs(house, vm)) == 1
        assert not set(macs(house, vm)) & set(macs(house, original))
        seeds = [
            house.pool.store.get("VM", one)["other_config"]["mac_seed"] for one in (vm, original)
        ]
        assert seeds[0] != seeds[1]
        (vif,) = house.pool.store.get("VM", vm)["VIFs"]
        assert house.pool.store.get("VIF", vif)["network"] == house.pool.network


async def test_upstream_weakness_12_settings_without_effect_are_told(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        outcome = await restore(house, ignored=("mapVdisSrs", "useDifferentialRestore"))
        told = [r["message"] for r in outcome.log if r["type"] == "warning"]
        assert [("mapVdisSrs" in told[0]), ("useDifferentialRestore" in told[1])] == [True, True]
        assert outcome.status == "success"


async def test_a_backup_that_upstream_wrote(house: House) -> None:
    with tarfile.open(FIXTURES / "recorded-full-backup.tar.xz") as tar:
        tar.extractall(house.root, filter="data")
    house.remote_spec("remote1")
    for backup in house.backups():
        outcome = await house.outcome(await house.restore(backup))
        vm = restored(house, outcome)
        path = house.folder() / backup[1:].replace(".json", ".xva")
        assert disks_of(house, vm) == archives.disks(path.read_bytes())
        date = Path(backup).stem
        assert house.pool.store.get("VM", vm)["name_label"] == f"vm1 ({date})"


# -- what goes wrong on the pool ------------------------------------------------------------


async def test_an_import_that_fails_after_its_200(tmp_path: Path) -> None:
    """The answer 200 comes before the first byte is read; only the task tells."""
    async with backed_up(tmp_path) as house:
        house.pool.fail("/import", error=("IMPORT_ERROR_SOME_CHECKSUMS_FAILED",))
        await undone(house, await restore(house), "IMPORT_ERROR_SOME_CHECKSUMS_FAILED")


@pytest.mark.parametrize("cut", ["reset", "end"])
@pytest.mark.parametrize("after", [0, 2 * MIB])
async def test_a_connection_that_ends_within_the_import(
    tmp_path: Path, cut: Any, after: int
) -> None:
    async with backed_up(tmp_path) as house:
        house.pool.fail("/import", cut=cut, after_bytes=after, error=("SR_FULL", "1", "2"))
        await undone(house, await restore(house), "SR_FULL")


@pytest.mark.parametrize("status", [400, 403, 500])
async def test_a_refused_import(tmp_path: Path, status: int) -> None:
    async with backed_up(tmp_path) as house:
        house.pool.fail("/import", status=status, error=("SR_OPERATION_NOT_SUPPORTED", "iso"))
        await undone(house, await restore(house), "SR_OPERATION_NOT_SUPPORTED")


@pytest.mark.parametrize(
    "point",
    ["VM.add_tags", "VM.set_name_label", "VM.set_name_description", "VM.remove_from_other_config",
     "VM.remove_from_blocked_operations", "VM.get_uuid", "VIF.create", "VIF.destroy"],
)  # fmt: skip
async def test_a_step_that_fails_after_the_import(tmp_path: Path, point: str) -> None:
    """backup-runs.md §7.2: upstream leaves the VM there, half dressed."""
    async with open_house(SimulatedPool.small(running=False), tmp_path) as house:
        await house.run(house.request())
        house.pool.fail(point, at_call=True, error=("INTERNAL_ERROR", "db"))
        outcome = await restore(house, new_mac_addresses=True)
        await undone(house, outcome, "INTERNAL_ERROR")


async def test_an_unknown_sr(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        house.pool.fail("SR.get_by_uuid", at_call=True, error=("UUID_INVALID", "SR", "gone"))
        outcome = await restore(house)
        assert "no such SR" in outcome.log[-1]["result"]["message"]
        await undone(house, outcome, "ENOENT")


async def test_a_cancelled_daemon_undoes_its_restores(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        gate = house.pool.pause_at("/import", at_bytes=MIB)
        (backup,) = house.backups()
        task = await house.restore(backup)
        await gate.reached()
        house.services.cancel_all("the daemon stops")
        outcome = await house.outcome(task)
        assert outcome.status == "canceled"
        await house.services.wait_idle()
        assert house.pool.leftovers().keys() <= {"transfers"}


# -- what is wrong on the remote ------------------------------------------------------------


def edit(house: House, **fields: Any) -> None:
    (backup, *_) = house.backups()
    path = house.folder() / backup[1:]
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))


async def test_a_truncated_archive_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        with archive(house).open("r+b") as file:
            file.truncate(3 * MIB)
        outcome = await restore(house)
        await undone(house, outcome, "ECORRUPT")
        assert "complete" in outcome.snapshot["data"]["error"]["message"]
        assert [one.path for one in house.pool.transfer_log] == ["/export"]


@pytest.mark.parametrize("size", [0, 600, 3 * MIB])
async def test_a_truncated_archive_of_which_the_metadata_agrees(tmp_path: Path, size: int) -> None:
    """What upstream has written after a reset export (recorded): the host finds out."""
    async with backed_up(tmp_path) as house:
        with archive(house).open("r+b") as file:
            file.truncate(size)
        edit(house, size=size)
        outcome = await restore(house)
        await undone(house, outcome, outcome.snapshot["data"]["error"]["code"])


async def test_a_missing_archive(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        archive(house).unlink()
        await undone(house, await restore(house), "ENOENT")


@pytest.mark.parametrize(
    "xva",
    ["../../etc/passwd", "/etc/passwd", "..", ".", "", "./../x.xva", "a/b.xva", ".hidden.xva",
     "..\\..\\x", "x\0.xva", None, 3, ["x"]],
)  # fmt: skip
async def test_hostile_metadata_leads_nowhere(tmp_path: Path, xva: Any) -> None:
    async with backed_up(tmp_path) as house:
        (house.folder() / "xo-vm-backups" / "x.xva").write_bytes(b"not yours")
        edit(house, xva=xva)
        outcome = await restore(house)
        assert outcome.status == "failure"
        code = outcome.snapshot["data"]["error"]["code"]
        assert code in ("ECORRUPT", "ENOENT", "EINVAL", "EPERM")
        await undone(house, outcome, code)
        assert [one.path for one in house.pool.transfer_log] == ["/export"]


@pytest.mark.parametrize(
    "vm",
    [{}, {"name_label": 3}, {"name_label": None}, {"name_label": ["x"], "name_description": {}}],
)
async def test_a_vm_record_without_a_name_is_no_reason_to_lose_the_vm(
    tmp_path: Path, vm: dict[str, Any]
) -> None:
    async with backed_up(tmp_path) as house:
        edit(house, vm=vm)
        found = house.pool.store.get("VM", restored(house, await restore(house)))
        assert re.search(r"\(\d{8}T\d{6}Z\)$", found["name_label"])


@pytest.mark.parametrize(
    "fields", [{"size": "many"}, {"size": -1}, {"size": 1e300}, {"timestamp": "x"}]
)
async def test_numbers_that_are_none(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with backed_up(tmp_path) as house:
        edit(house, **fields)
        outcome = await restore(house)
        if outcome.status == "failure":
            await undone(house, outcome, "ECORRUPT")


async def test_a_remote_that_fails_while_it_is_read(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        async with house.faulty() as faults:
            error = Unreachable("EIO: input/output error", code="EIO")
            faults.add("read.read_into", Fail(error), skip=1)
            outcome = await restore(house)
        await undone(house, outcome, "EIO")


@pytest.mark.parametrize(
    ("content", "kind"), [(b"no JSON", Corrupt), (b"[]", Corrupt), (b'{"vm": 3}', Corrupt)]
)
async def test_broken_metadata_makes_no_task(
    tmp_path: Path, content: bytes, kind: type[ProxyError]
) -> None:
    async with backed_up(tmp_path) as house:
        (backup,) = house.backups()
        (house.folder() / backup[1:]).write_bytes(content)
        with pytest.raises(kind):
            await house.restore(backup)
        assert house.services.running_jobs() == []


@pytest.mark.parametrize(
    "backup_id",
    ["", "/", "../../etc/passwd", "/xo-vm-backups/../../etc/passwd.json", "/etc/passwd",
     "/xo-vm-backups/x/y.xva", "xo-config-backups/a/b"],
)  # fmt: skip
async def test_a_hostile_id_is_refused(tmp_path: Path, backup_id: str) -> None:
    async with backed_up(tmp_path) as house:
        with pytest.raises(ProxyError):
            await house.restore(backup_id)


async def test_upstream_rpc_weakness_6_nothing_stays_open_when_the_metadata_is_missing(
    tmp_path: Path,
) -> None:
    async with backed_up(tmp_path) as house:
        with pytest.raises(NotFound):
            await house.restore(f"{house.backups()[0].rpartition('/')[0]}/20010101T000000Z.json")
        with trio.move_on_after(3):
            while house.pool.leftovers(connections=True):
                await trio.sleep(0.01)
        await house.clean()


async def test_an_incremental_backup_is_refused_before_anything(tmp_path: Path) -> None:
    async with backed_up(tmp_path) as house:
        edit(house, mode="delta")
        with pytest.raises(Refused) as caught:
            await restore(house)
        assert caught.value.code == "ENOTSUP"
