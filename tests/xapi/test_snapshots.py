"""Snapshots, marks and migration blocks: what they do, and that nothing stays when they fail."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal

import pytest
import trio

from proxy.errors import Conflict, ProxyError, Refused, XapiError
from proxy.simulator import SimulatedPool
from proxy.tasks.records import new_id
from proxy.xapi import Xapi, migration, ownership, snapshots, vms

from .conftest import clean


def config(pool: SimulatedPool, kind: str, ref: str) -> dict[str, str]:
    return dict(pool.store.get(kind, ref)["other_config"])


def disks(pool: SimulatedPool, vm: str) -> list[str]:
    return [pool.store.by_uuid("VDI", uuid) for uuid in pool.disk_uuids(vm)]


async def test_a_snapshot_has_every_disk_and_the_marks(pool: SimulatedPool, xapi: Xapi) -> None:
    vm = pool.vm("vm1")
    ref = await snapshots.take_snapshot(xapi, vm, marks={ownership.RUN: "run-1"})
    record = pool.store.get("VM", ref)
    assert record["name_label"] == "xo-backup-temp-snapshot-name"
    assert not record["is_a_template"]
    assert len(pool.disk_uuids(ref)) == 2
    assert config(pool, "VM", ref)[ownership.RUN] == "run-1"
    assert ownership.RUN not in config(pool, "VM", vm)
    await vms.destroy_vm(xapi, ref)
    await clean(pool)


@pytest.mark.parametrize("is_old", [False, True])
async def test_disks_marked_nobak_are_left_out(
    pool: SimulatedPool, xapi: Xapi, is_old: bool
) -> None:
    pool.is_old = is_old
    vm = pool.vm("vm1")
    pool.do("VDI.set_name_label", disks(pool, vm)[1], "scratch [NOBAK]")
    ref = await snapshots.take_snapshot(xapi, vm)
    assert len(pool.disk_uuids(ref)) == 1
    assert len(pool.disk_uuids(vm)) == 2
    await vms.destroy_vm(xapi, ref)
    await clean(pool)


async def test_only_that_mismatch_drops_the_list_of_disks(pool: SimulatedPool, xapi: Xapi) -> None:
    """Upstream drops the last argument whatever the counts are."""
    vm = pool.vm("vm1")
    pool.do("VDI.set_name_label", disks(pool, vm)[1], "scratch [NOBAK]")
    pool.fail("VM.snapshot", error=("MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.snapshot", "5", "3"))
    with pytest.raises(XapiError):
        await snapshots.take_snapshot(xapi, vm)
    await clean(pool)


async def test_a_checkpoint_of_a_halted_vm_is_a_snapshot(pool: SimulatedPool, xapi: Xapi) -> None:
    vm = pool.vm("vm1")
    running = await snapshots.take_snapshot(xapi, vm, checkpoint=True)
    assert pool.store.get("VM", running)["power_state"] == "Suspended"
    await vms.clean_shutdown(xapi, vm)
    halted = await snapshots.take_snapshot(xapi, vm, checkpoint=True)
    assert pool.store.get("VM", halted)["power_state"] == "Halted"
    for ref in (running, halted):
        await vms.destroy_vm(xapi, ref)
    await clean(pool)


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("ignore_cancel", [False, True])
async def test_a_cancelled_snapshot_leaves_nothing(
    pool: SimulatedPool, xapi: Xapi, stage: Literal["before", "after"], ignore_cancel: bool
) -> None:
    if ignore_cancel:
        pool.fail("VM.snapshot", ignore_cancel=True)
    gate = pool.pause_at("VM.snapshot", stage=stage)
    take = partial(snapshots.take_snapshot, xapi, pool.vm("vm1"), marks={ownership.RUN: "r"})
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await gate.reached()
            nursery.cancel_scope.cancel()
            if ignore_cancel:
                gate.release()
    await clean(pool)
    assert ownership.RUN not in config(pool, "VM", pool.vm("vm1"))


@pytest.mark.parametrize(
    "method",
    [
        "VM.get_record",
        "VDI.get_all_records_where",
        "VM.add_to_other_config",
        "VM.remove_from_other_config",
        "VM.set_is_a_template",
        "task.destroy",
    ],
)
async def test_a_cancel_around_the_snapshot_leaves_nothing(
    pool: SimulatedPool, xapi: Xapi, method: str
) -> None:
    gate = pool.pause_at(method)
    take = partial(snapshots.take_snapshot, xapi, pool.vm("vm1"), marks={ownership.RUN: "r"})
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await gate.reached()
            nursery.cancel_scope.cancel()
            gate.release()
    await clean(pool)
    assert ownership.RUN not in config(pool, "VM", pool.vm("vm1"))


@pytest.mark.parametrize("drop", ["before", "after"])
async def test_a_lost_call_leaves_no_snapshot(
    pool: SimulatedPool, xapi: Xapi, drop: Literal["before", "after"]
) -> None:
    pool.fail("VM.snapshot", drop=drop)
    with pytest.raises(ProxyError):
        await snapshots.take_snapshot(xapi, pool.vm("vm1"))
    assert pool.leftovers().get("snapshots") is None


async def test_an_unhealthy_chain_is_refused_with_xos_message(
    pool: SimulatedPool, xapi: Xapi, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = pool.vm("vm1")
    (_, leaf, record), *_ = await vms.disks(xapi, await xapi.record("VM", vm))
    sr = record["SR"]
    chain: list[dict[str, Any]] = [
        {**record, "uuid": f"p{i}", "managed": False, "sm_config": {"vhd-parent": f"p{i + 1}"}}
        for i in range(4)
    ]
    head = {**record, "sm_config": {"vhd-parent": "p0"}}

    async def found(_: str, query: str) -> dict[str, dict[str, Any]]:
        assert sr in query
        return {leaf: head, **{f"OpaqueRef:{vdi['uuid']}": vdi for vdi in chain}}

    monkeypatch.setattr(xapi, "records_where", found)
    with pytest.raises(Refused) as caught:
        await snapshots.take_snapshot(xapi, vm)
    assert caught.value.message == "unhealthy VDI chain"
    del chain[2:]  # one uncoalesced parent is tolerated
    await snapshots.check_chains(xapi, [({}, leaf, head)])


# Marks


async def test_keys_are_set_and_reset_on_the_vm_and_its_disks(
    pool: SimulatedPool, xapi: Xapi
) -> None:
    vm = pool.vm("vm1")
    before = config(pool, "VM", vm)
    await ownership.set_keys(xapi, vm, {ownership.JOB: "j", ownership.SR: "s"})
    for kind, ref in [("VM", vm), *(("VDI", disk) for disk in disks(pool, vm))]:
        assert config(pool, kind, ref)[ownership.JOB] == "j"
    await ownership.reset_keys(xapi, vm)
    assert config(pool, "VM", vm) == {**before, ownership.SR: "s"}


async def test_keys_that_are_right_already_cost_no_call(pool: SimulatedPool, xapi: Xapi) -> None:
    vm = pool.vm("vm1")
    await ownership.reset_keys(xapi, vm)
    assert not [call for call in pool.calls.log if "other_config" in call.method]


# Migration


def blocked(pool: SimulatedPool) -> dict[str, str]:
    return dict(pool.store.get("VM", pool.vm("vm1"))["blocked_operations"])


def owner(installation: str, *, days_ago: float = 0) -> ownership.Owner:
    return ownership.Owner(installation, new_id(int((time.time() - days_ago * 86400) * 1000)))


OURS = owner("ours")


async def test_migration_is_blocked_meanwhile(pool: SimulatedPool, xapi: Xapi) -> None:
    vm = pool.vm("vm1")
    pool.do("VM.add_to_blocked_operations", vm, "pool_migrate", "pinned")
    pool.do("VM.add_to_blocked_operations", vm, "migrate_send", migration.REASON)  # of a crash
    async with migration.block_migration(xapi, vm):
        assert blocked(pool) == {"pool_migrate": "pinned", "migrate_send": migration.REASON}
    assert blocked(pool) == {"pool_migrate": "pinned"}
    assert pool.calls.log[-1].method == "VM.update_allowed_operations"


@pytest.mark.parametrize(
    ("method", "nth"),
    [
        ("VM.add_to_other_config", 1),
        ("VM.add_to_blocked_operations", 1),
        ("VM.add_to_blocked_operations", 2),
    ],
)
async def test_a_cancel_while_migration_is_blocked_restores_it(
    pool: SimulatedPool, xapi: Xapi, method: str, nth: int
) -> None:
    vm = pool.vm("vm1")
    pool.do("VM.add_to_blocked_operations", vm, "start", "pinned")
    before = pool.store.get("VM", vm)["other_config"]
    gate = pool.pause_at(method, nth=nth)

    async def run() -> None:
        with ownership.acting_for(OURS):
            async with migration.block_migration(xapi, vm):
                await trio.sleep_forever()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await gate.reached()
            nursery.cancel_scope.cancel()
            gate.release()  # the host does what it was told: the undo must come after that
    assert blocked(pool) == {"start": "pinned"}
    assert pool.store.get("VM", vm)["other_config"] == before


async def test_a_block_that_somebody_else_changed_is_theirs(
    pool: SimulatedPool, xapi: Xapi
) -> None:
    vm = pool.vm("vm1")
    async with migration.block_migration(xapi, vm):
        pool.do("VM.remove_from_blocked_operations", vm, "pool_migrate")
        pool.do("VM.add_to_blocked_operations", vm, "pool_migrate", "by the operator")
    assert blocked(pool) == {"pool_migrate": "by the operator"}


@pytest.mark.parametrize(
    "second", [owner("ours"), owner("another")], ids=lambda one: one.installation
)
async def test_the_last_of_two_runs_lifts_the_block(
    pool: SimulatedPool, xapi: Xapi, second: ownership.Owner
) -> None:
    vm = pool.vm("vm1")
    both = dict.fromkeys(migration.OPERATIONS, migration.REASON)
    begun, go_on = trio.Event(), trio.Event()

    async def other() -> None:
        with ownership.acting_for(second):
            async with migration.block_migration(xapi, vm):
                begun.set()
                await go_on.wait()

    async with trio.open_nursery() as nursery:
        with ownership.acting_for(OURS):
            async with migration.block_migration(xapi, vm):
                nursery.start_soon(other)
                await begun.wait()
                marked = ownership.blocked_by(pool.store.get("VM", vm))
                assert set(marked) == {OURS, second}
        assert blocked(pool) == both
        assert ownership.blocked_by(pool.store.get("VM", vm)) == [second]
        go_on.set()
    assert blocked(pool) == {}
    assert ownership.blocked_by(pool.store.get("VM", vm)) == []


@pytest.mark.parametrize(("days", "left"), [(29, 2), (31, 0)])
async def test_a_mark_older_than_any_run_does_not_keep_the_block(
    pool: SimulatedPool, xapi: Xapi, days: float, left: int
) -> None:
    vm = pool.vm("vm1")
    other = owner("another", days_ago=days)
    mark = f"another/{pool.vm_uuid('vm1')}"
    pool.do("VM.add_to_other_config", vm, ownership.BLOCKED + other.run, mark)
    async with migration.block_migration(xapi, vm):
        pass
    assert len(blocked(pool)) == left


async def test_a_run_that_comes_while_the_block_is_lifted_keeps_it(
    pool: SimulatedPool, xapi: Xapi
) -> None:
    vm, other = pool.vm("vm1"), owner("another")
    gate = pool.pause_at("VM.remove_from_blocked_operations")

    async def interfere() -> None:
        await gate.reached()
        mark = f"another/{pool.vm_uuid('vm1')}"
        pool.do("VM.add_to_other_config", vm, ownership.BLOCKED + other.run, mark)
        gate.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interfere)
        async with migration.block_migration(xapi, vm):
            pass
    assert blocked(pool) == dict.fromkeys(migration.OPERATIONS, migration.REASON)


async def test_marks_of_interventions_do_not_count_on_a_copy(
    pool: SimulatedPool, xapi: Xapi
) -> None:
    vm = pool.vm("vm1")
    uuid = pool.vm_uuid("vm1")
    pool.do("VM.add_to_other_config", vm, ownership.BLOCKED + OURS.run, f"ours/{uuid}")
    pool.do("VM.add_to_other_config", vm, ownership.SHUT_DOWN, ownership.shut_down_mark(OURS, uuid))
    record = pool.store.get("VM", vm)
    assert (ownership.blocked_by(record), ownership.shut_down_by(record)) == ([OURS], OURS)
    copy = {**record, "uuid": "another"}
    assert (ownership.blocked_by(copy), ownership.shut_down_by(copy)) == ([], None)
    await ownership.forget_interventions(xapi, vm)
    left = pool.store.get("VM", vm)["other_config"]
    assert not [key for key in left if key.startswith("xo:backup:")]


# Destroying


async def test_destroying_is_verified_and_repeatable(pool: SimulatedPool, xapi: Xapi) -> None:
    ref = await snapshots.take_snapshot(xapi, pool.vm("vm1"))
    await vms.destroy_vm(xapi, ref)
    await vms.destroy_vm(xapi, ref)
    await clean(pool)


async def test_a_vm_that_survives_its_destruction_is_told(pool: SimulatedPool, xapi: Xapi) -> None:
    ref = await snapshots.take_snapshot(xapi, pool.vm("vm1"))
    real = xapi.call_async

    async def pretend(method: str, *args: Any, **how: Any) -> Any:
        return None if method == "VM.destroy" else await real(method, *args, **how)

    xapi.call_async = pretend  # type: ignore[method-assign]
    with pytest.raises(Conflict):
        await vms.destroy_vm(xapi, ref)


async def test_a_block_on_destroy_is_respected_or_bypassed(pool: SimulatedPool, xapi: Xapi) -> None:
    ref = await snapshots.take_snapshot(xapi, pool.vm("vm1"))
    pool.do("VM.add_to_blocked_operations", ref, "destroy", "precious")
    with pytest.raises(Refused, match="precious"):
        await vms.destroy_vm(xapi, ref)
    await vms.destroy_vm(xapi, ref, bypass_blocked=True)
    await clean(pool)


async def test_weakness_6_a_disk_in_use_is_disconnected_and_tried_again(
    pool: SimulatedPool, xapi: Xapi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vms, "_IN_USE_DELAY", 0.01)
    ref = await snapshots.take_snapshot(xapi, pool.vm("vm1"))
    for disk in disks(pool, ref):
        pool.disks.attach_to_dom0(disk)
    await vms.destroy_vm(xapi, ref)
    await clean(pool)


async def test_a_running_vm_is_not_started_again(pool: SimulatedPool, xapi: Xapi) -> None:
    vm = pool.vm("vm1")
    await vms.start(xapi, vm)
    await vms.clean_shutdown(xapi, vm)
    assert pool.store.get("VM", vm)["power_state"] == "Halted"
    await vms.start(xapi, vm)
    assert pool.store.get("VM", vm)["power_state"] == "Running"
