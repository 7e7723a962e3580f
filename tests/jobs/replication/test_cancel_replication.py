"""A replication is blocked at every stage and cancelled: the pool is as it was, and the next
transfer is a delta to the same VM."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.tasks import Task
from tests.jobs.conftest import Outcome

from .conftest import MIB, Pair, open_pair, state
from .test_incremental_replication import got
from .test_rollback import check_kept, forget, troubles

Stage = tuple[str, dict[str, Any]]


async def cancel(pair: Pair, task: Task) -> Outcome:
    await pair.house.services.tasks.cancel(task.id)
    assert task.pending, "task.cancel answers at once: it waits for nothing of the run"
    with trio.fail_after(2):  # data stops moving
        while pair.here.transfers or pair.there.transfers:
            await trio.sleep(0.005)
    await trio.sleep(0.02)
    for pool in (pair.here, pair.there):
        pool.gates.release_all()  # a host does what it was told, whether its caller waits or not
    return await pair.house.outcome(task)


async def stop_at(pair: Pair, stage: Stage, **how: Any) -> bool:
    """Whether the replica is there all the same; else the pool must be as it was."""
    point, where = stage
    before, replicas = state(pair.there), pair.replicas()
    gate = pair.there.pause_at(point, **where)
    task = pair.start(**how)
    with trio.fail_after(10):
        await gate.reached()
    outcome = await cancel(pair, task)
    assert outcome.status == "canceled", stage
    assert not troubles(outcome), (stage, troubles(outcome))
    await pair.quiet()
    return check_kept(pair, before, replicas, str(stage))


BOTH: list[Stage] = [
    ("VM.get_all_records", {}),
    ("VBD.create", {"stage": "after"}),
    ("VIF.create", {"stage": "after"}),
    ("VTPM.set_contents", {}),
    ("/import_raw_vdi", {"at_bytes": MIB}),
    ("/import_raw_vdi", {"stage": "after"}),
    ("VDI.add_to_other_config", {}),
    ("VM.snapshot", {"stage": "after"}),
    ("VM.set_is_a_template", {"stage": "after"}),
    ("VM.set_blocked_operations", {}),
]
UPDATE: list[Stage] = [
    ("VDI.get_all_records_where", {}),
    ("/export_raw_vdi", {"at_bytes": 1000}),
    ("VDI.clone", {"stage": "after"}),
    ("VDI.set_other_config", {"stage": "after"}),
    ("VDI.set_other_config", {"nth": 2, "stage": "after"}),
    ("VBD.destroy", {"stage": "after"}),
    ("VTPM.destroy", {"stage": "after"}),
    ("VM.set_name_description", {"stage": "after"}),
    ("VM.set_memory_limits", {"stage": "after"}),
    ("VM.set_other_config", {"stage": "after"}),
]
CREATE: list[Stage] = [
    ("VDI.create", {"stage": "after"}),
    ("VM.create", {"stage": "after"}),
    ("VM.add_to_blocked_operations", {"stage": "after"}),
]


@contextlib.asynccontextmanager
async def prepared(root: Path) -> AsyncIterator[Pair]:
    async with open_pair(root, disk_size=4 * MIB) as pair:
        tpm = pair.here.store.create("VTPM", VM=pair.here.vm("vm1"), is_unique=False)
        pair.here.vtpm_contents[tpm] = "secrets"
        yield pair


async def test_an_update_cancelled_at_any_stage(tmp_path: Path) -> None:
    async with prepared(tmp_path) as pair:
        await pair.good()
        (ref,) = pair.vms()
        here = pair.here.store
        here.update("VM", pair.here.vm("vm1"), memory_static_max=4096 * MIB)
        pair.change(1, 1)
        for stage in [*BOTH, *UPDATE]:
            if stage[0] != "VM.set_blocked_operations":  # they are blocked already
                assert not await stop_at(pair, stage), stage
        outcome = await pair.good()
        assert got(outcome) == ["delta"]
        assert pair.vms() == [ref]
        assert pair.digests(ref) == pair.live()


async def test_a_first_transfer_cancelled_at_any_stage(tmp_path: Path) -> None:
    async with prepared(tmp_path) as pair:
        for stage in [*BOTH, *CREATE]:
            if not stage[0].startswith("VM.get_all"):
                assert not await stop_at(pair, stage), stage
        await pair.good()
        assert pair.digests(pair.vms()[0]) == pair.live()


async def test_a_cancel_behind_the_commit_finishes_the_replica(tmp_path: Path) -> None:
    """From its name on the snapshot is a replica: what is left to do is done."""
    async with prepared(tmp_path) as pair:
        await pair.good()
        for nth, fill in ((1, 1), (2, 2)):
            pair.change(1, fill)
            point: Stage = ("VDI.destroy", {}) if nth == 1 else ("VM.remove_from_other_config", {})
            assert await stop_at(pair, point)
            assert len([1 for _, vdi in pair.there.store.all("VDI") if vdi["managed"]]) == 2 + nth
        pair.change(1, 3)
        assert got(await pair.good()) == ["delta"]
        assert len(pair.vms()) == 1


FULL: list[Stage] = [
    ("VM.get_all_records", {}),
    ("/import", {}),
    ("/import", {"at_bytes": MIB}),
    ("/import", {"stage": "after"}),
    ("VM.set_name_label", {"stage": "after"}),
    ("VM.add_to_blocked_operations", {"stage": "after"}),
    ("VM.add_tags", {"stage": "after"}),
    ("VDI.add_to_other_config", {"stage": "after"}),
    ("VM.add_to_other_config", {"nth": 3, "stage": "after"}),
]


async def test_a_full_replication_cancelled_at_any_stage(tmp_path: Path) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        for stage in FULL:
            assert not await stop_at(pair, stage, mode="full"), stage
            assert pair.vms() == []
        await pair.good(mode="full")
        assert pair.digests(pair.vms()[0]) == pair.live()


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_a_cancel_while_an_old_replica_is_deleted_leaves_no_disk_of_it(
    tmp_path: Path, mode: str
) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        keep: dict[str, Any] = {"mode": mode, "settings": {"copyRetention": 1}}
        await pair.good(**keep)
        pair.change(1, 1)
        gate = pair.there.pause_at("VM.destroy", stage="after")
        task = pair.start(**keep)
        with trio.fail_after(10):
            await gate.reached()
        assert (await cancel(pair, task)).status == "canceled"
        assert pair.orphans() == []
        assert pair.digests(pair.vms()[0]) == pair.live()
        assert len(pair.vms()) == 1
        await pair.quiet()


async def test_one_sr_is_cancelled_alone(tmp_path: Path) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        srs = (pair.sr_uuid(0), pair.sr_uuid(1))
        gate = pair.there.pause_at("/import_raw_vdi", at_bytes=MIB)
        task = pair.start(srs=srs, remotes=("remote1",))
        await gate.reached()
        (vm,) = task.children
        export = next(each for each in vm.children if each.properties.get("id") == srs[1])
        await pair.house.services.tasks.cancel(export.id)
        gate.release()
        outcome = await pair.house.outcome(task)
        ended = {each["data"]["id"]: each["status"] for each in outcome.of("export")}
        assert ended == {"remote1": "success", srs[0]: "success", srs[1]: "canceled"}
        (ref,) = pair.vms()
        assert pair.digests(ref) == pair.live()
        assert len(pair.house.backups()) == 1
        await pair.quiet()


async def test_an_sr_that_is_cancelled_while_another_fails_is_not_tried_again(
    tmp_path: Path,
) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        srs = (pair.sr_uuid(0), pair.sr_uuid(1))
        gate = pair.there.pause_at("/import_raw_vdi", at_bytes=MIB)
        task = pair.start(srs=srs, settings={"nRetriesVmBackupFailures": 1})
        await gate.reached()
        (vm,) = task.children
        export = next(each for each in vm.children if each.properties.get("id") == srs[1])
        pair.there.fail("VM.create", error=("SR_FULL", "no"))
        await pair.house.services.tasks.cancel(export.id)
        gate.release()
        outcome = await pair.house.outcome(task)
        ended = [(each["data"]["id"], each["status"]) for each in outcome.of("export")]
        assert ended == [(srs[0], "failure"), (srs[1], "canceled"), (srs[0], "success")]
        assert outcome.status == "canceled"
        (ref,) = pair.vms()
        assert pair.digests(ref) == pair.live()
        await pair.quiet()


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_weakness_4_every_export_ends_and_only_failed_targets_are_tried_again(
    tmp_path: Path, mode: str
) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        srs = (pair.sr_uuid(0), pair.sr_uuid(1))
        point = "/import" if mode == "full" else "/import_raw_vdi"
        pair.there.fail(point, error=("SR_FULL", "no"))
        outcome = await pair.run(
            mode=mode,
            srs=srs,
            remotes=("remote1",),
            settings={"nRetriesVmBackupFailures": 1},
        )
        assert outcome.status == "success", outcome.snapshot
        exports = outcome.of("export")
        assert all("end" in export for export in exports)
        assert len(exports) == 4, "the target that failed, and nobody else, once more"
        assert [pair.digests(ref) for ref in pair.vms()] == [pair.live()] * 2
        assert len(pair.house.backups()) == 1
        forget(pair)


async def test_weakness_3_a_target_that_fails_beside_others_fails_the_run(tmp_path: Path) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        pair.there.fail("/import_raw_vdi", error=("SR_FULL", "no"))
        outcome = await pair.run(remotes=("remote1",))
        assert outcome.status == "failure"
        ended = {each["data"]["id"]: each["status"] for each in outcome.of("export")}
        assert ended == {"remote1": "success", pair.sr: "failure"}
        # the next run: the remote has the base, the SR has none: whole for both
        outcome = await pair.good(remotes=("remote1",))
        assert got(outcome) == ["full"]
        assert got(await pair.good(remotes=("remote1",))) == ["delta"]
