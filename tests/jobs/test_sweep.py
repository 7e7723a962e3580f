"""What dead runs left on a pool is swept at the next contact, and nothing else (promise I7)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.jobs.sweep import Fate, sweep_pool
from proxy.simulator import SimulatedPool
from proxy.xapi import XapiOptions, connect, ownership
from proxy.xapi.snapshots import TEMPORARY_NAME

from .conftest import JOB, SCHEDULE, House, Outcome, open_house
from .test_incremental_backup import back_up

MIB = 1024 * 1024
IMPORTING = "[Importing…] vm9"


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(SimulatedPool.small(vms=2, disk_size=4 * MIB), tmp_path) as opened:
        yield opened


async def dead_run(house: House) -> str:
    """The id of a run that failed."""
    house.pool.fail("VM.snapshot", error=("SR_FULL", "no"))
    outcome = await house.run(house.request())
    assert outcome.status == "failure"
    return outcome.task.id


async def good_run(house: House) -> Outcome:
    outcome = await house.run(house.request())
    assert outcome.status == "success", outcome.snapshot
    return outcome


def marks(house: House, run: str) -> dict[str, str]:
    return {ownership.PROXY: house.services.installation, ownership.RUN: run}


def make_disk(pool: SimulatedPool, keys: dict[str, str], name: str = IMPORTING) -> str:
    ref: str = pool.do(
        "VDI.create",
        {
            "name_label": name,
            "SR": pool.default_sr,
            "virtual_size": 2 * MIB,
            "type": "user",
            "sharable": False,
            "read_only": False,
            "other_config": keys,
        },
    )
    return ref


def make_vm(pool: SimulatedPool, keys: dict[str, str], name: str = IMPORTING) -> tuple[str, str]:
    """A half-made VM as a restore leaves it, with one disk."""
    vm = pool.store.create(
        "VM",
        name_label=name,
        other_config=keys,
        power_state="Halted",
        blocked_operations={"start": "Importing…"},
    )
    disk = make_disk(pool, keys, name)
    pool.store.create("VBD", VM=vm, VDI=disk, type="Disk", userdevice="0")
    return vm, disk


def exists(pool: SimulatedPool, *refs: str) -> list[bool]:
    return [any(pool.store.find(kind, ref) for kind in ("VM", "VDI")) for ref in refs]


def swept(outcome: Outcome) -> list[dict[str, str]]:
    return [
        one
        for info in outcome.snapshot["data"].get("infos", [])
        for one in info.get("data", {}).get("swept", [])
    ]


async def test_the_next_run_sweeps_before_anything_else(house: House) -> None:
    run, pool = await dead_run(house), house.pool
    vm, disk = make_vm(pool, marks(house, run))
    lone = make_disk(pool, marks(house, run))
    snapshot = pool.do("VM.snapshot", pool.vm("vm2"), TEMPORARY_NAME)
    for key, value in marks(house, run).items():
        pool.do("VM.add_to_other_config", snapshot, key, value)
    gate = pool.pause_at("VM.snapshot")
    task = house.services.start_backup(house.request())
    with trio.fail_after(10):
        await gate.reached()
    assert exists(pool, vm, disk, lone, snapshot) == [False] * 4
    gate.release()
    outcome = await house.outcome(task)
    assert outcome.status == "success"
    assert sorted(one["type"] for one in swept(outcome)) == ["VDI", "VM", "VM"]
    assert {one["run"] for one in swept(outcome)} == {run}
    assert swept(await good_run(house)) == []


async def test_a_restore_sweeps_too(house: House) -> None:
    await good_run(house)
    vm, disk = make_vm(house.pool, marks(house, await dead_run(house)))
    outcome = await house.outcome(await house.restore(house.backups()[0]))
    assert outcome.status == "success"
    assert exists(house.pool, vm, disk) == [False, False]
    assert len(swept(outcome)) == 1


async def test_what_may_not_be_ours_or_may_be_in_use_stays(house: House) -> None:
    pool, run = house.pool, await dead_run(house)
    good = (await good_run(house)).task.id
    await dead_run(house)
    ours = marks(house, run)
    kept = [
        *make_vm(pool, {**ours, ownership.PROXY: "other"}),
        *make_vm(pool, {ownership.PROXY: house.services.installation}),
        *make_vm(pool, marks(house, "0mwv00000-unknownrun")),
        *make_vm(pool, marks(house, good)),
        *make_vm(pool, ours, "vm9 (20261124T120000Z)"),
        make_disk(pool, ours, "a disk that was detached"),
    ]
    running, its_disk = make_vm(pool, ours)
    pool.store.update("VM", running, power_state="Running")
    memory = make_disk(pool, ours)
    pool.store.create("VM", name_label="suspended", power_state="Suspended", suspend_VDI=memory)
    snapshot = pool.do("VM.snapshot", pool.vm("vm2"), "of a user")
    for key, value in ours.items():
        pool.do("VM.add_to_other_config", snapshot, key, value)
    kept += [running, its_disk, memory, snapshot]
    assert swept(await good_run(house)) == []
    assert exists(pool, *kept) == [True] * len(kept)


async def test_a_live_run_is_left_alone(house: House) -> None:
    await good_run(house)
    gate = house.pool.pause_at("/import", at_bytes=MIB)
    restore = await house.restore(house.backups()[0])
    with trio.fail_after(10):
        await gate.reached()
    await dead_run(house)
    vm, disk = make_vm(house.pool, marks(house, restore.id))
    assert swept(await good_run(house)) == []
    assert exists(house.pool, vm, disk) == [True, True]
    gate.release()
    assert (await house.outcome(restore)).status == "success"


async def test_a_pool_is_read_whole_only_when_there_may_be_something(house: House) -> None:
    def reads() -> int:
        return sum(call.method == "VDI.get_all_records" for call in house.pool.calls.log)

    await good_run(house)
    before = reads()
    await good_run(house)
    assert reads() == before
    await dead_run(house)
    await good_run(house)
    assert reads() == before + 1


async def test_a_sweep_that_fails_is_told_and_tried_again(house: House) -> None:
    vm, _ = make_vm(house.pool, marks(house, await dead_run(house)))
    house.pool.fail("VM.destroy", error=("INTERNAL_ERROR", "no"))
    outcome = await good_run(house)
    messages = [each["message"] for each in outcome.snapshot["data"]["warnings"]]
    assert messages == ["could not sweep what dead runs left"]
    assert exists(house.pool, vm) == [True]
    assert len(swept(await good_run(house))) == 1
    assert exists(house.pool, vm) == [False]


async def test_a_sweep_that_dies_between_a_vm_and_its_disks_goes_on_later(house: House) -> None:
    vm, disk = make_vm(house.pool, marks(house, await dead_run(house)))
    house.pool.do("VDI.set_name_label", disk, "vm9_0")  # released already
    house.pool.do("VDI.set_other_config", disk, {})
    house.pool.fail("VDI.destroy", error=("INTERNAL_ERROR", "no"), times=2)
    await good_run(house)
    assert exists(house.pool, vm, disk) == [False, True]
    await good_run(house)
    assert exists(house.pool, disk) == [False]


@pytest.mark.parametrize("mode", ["delta", "full"])
async def test_disks_of_a_snapshot_that_is_gone_are_pruned(house: House, mode: str) -> None:
    """A run was killed after it destroyed a snapshot and before the disks."""
    pool = house.pool
    keys = {
        ownership.JOB: JOB,
        ownership.SCHEDULE: SCHEDULE,
        ownership.VM: pool.vm_uuid("vm1"),
        ownership.DATETIME: "20261124T10:00:00Z",
    }
    disk = pool.do("VDI.snapshot", pool.vms.disks(pool.vm("vm1"))[0], {})
    pool.store.update("VDI", disk, other_config=keys)
    outcome = await (back_up(house) if mode == "delta" else house.run(house.request()))
    assert outcome.status == "success", outcome.snapshot
    assert exists(pool, disk) == [False]


async def dead(run: str) -> Fate:
    return Fate.DEAD if run else Fate.UNKNOWN


async def _no_tasks(sweep: object) -> dict[str, Any]:
    del sweep
    return {}


@asynccontextmanager
async def restoring(house: House, mode: str, point: str, **where: Any) -> AsyncIterator[None]:
    assert (await house.run(house.request(mode=mode))).status == "success"
    house.pool.mark()
    gate = house.pool.pause_at(point, **where)
    task = await house.restore(house.backups()[0])
    with trio.fail_after(10):
        await gate.reached()
    yield
    gate.release()
    assert (await house.outcome(task)).status == "failure"


@pytest.mark.parametrize(
    ("mode", "point", "where"),
    [
        ("delta", "VM.create", {"stage": "after"}),
        ("delta", "VDI.create", {"stage": "after"}),
        ("delta", "/import_raw_vdi", {"at_bytes": MIB}),
        ("delta", "VDI.set_name_label", {"stage": "after"}),
        ("delta", "VDI.remove_from_other_config", {"stage": "after", "nth": 2}),
        ("delta", "VM.remove_from_blocked_operations", {"stage": "after"}),
        ("delta", "VM.set_name_description", {"stage": "after"}),
        ("full", "VM.set_other_config", {"stage": "after"}),
        ("full", "VM.add_tags", {}),
    ],
)
async def test_a_restore_that_dies_anywhere_is_recognised(
    house: House, mode: str, point: str, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep of another connection finds all that exists at that moment."""
    pool = house.pool
    # The restore is not dead in truth: it would react when its task is stopped.
    monkeypatch.setattr("proxy.jobs.sweep.pool_sweep._Sweep._stop_tasks", _no_tasks)
    async with restoring(house, mode, point, **where):
        options = XapiOptions.from_record(house.xapi_spec, {})
        async with connect(options) as xapi:
            found = await sweep_pool(xapi, house.services.installation, dead)
        assert found.swept
        assert found.errors == []
        left = pool.leftovers()
        assert {key: left[key] for key in ("vms", "vdis", "importing") if key in left} == {}


async def test_runs_that_contact_no_pool_are_let_go_of(house: House) -> None:
    """A daemon may live for months on mirrors and metadata alone."""
    ended = []
    for _ in range(3):
        outcome = await house.run(replace(house.request(remotes=()), xapis={}))
        ended.append(weakref.ref(outcome.task))
        del outcome
    await house.services.tasks.flush()
    gc.collect()
    assert [each() for each in ended[:-1]] == [None, None]
