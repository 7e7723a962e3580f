"""Faults and gates on calls: the instrument of the cancel-at-every-stage tests."""

from __future__ import annotations

import httpx
import pytest
import trio

from proxy.simulator import GuestScript, SimulatedPool
from tests.simulator.conftest import Client, Failure


async def test_an_error_on_the_second_call(client: Client, pool: SimulatedPool) -> None:
    fault = pool.fail("VM.get_record", nth=2, error=("TOO_MANY_PENDING_TASKS",))
    vm = pool.vm("vm1")
    await client.call("VM.get_record", vm)
    with pytest.raises(Failure, match="TOO_MANY_PENDING_TASKS"):
        await client.call("VM.get_record", vm)
    await client.call("VM.get_record", vm)
    assert fault.hits == 1
    assert [call.error for call in pool.calls.log[-3:]] == [None, "TOO_MANY_PENDING_TASKS", None]


async def test_an_async_call_fails_in_its_task_or_at_once(
    client: Client, pool: SimulatedPool
) -> None:
    vm = pool.vm("vm1")
    pool.fail("VM.snapshot", error=("SR_FULL", "1", "2"))
    task = await client.settled(await client.call("Async.VM.snapshot", vm, "s"))
    assert (task["status"], task["error_info"]) == ("failure", ["SR_FULL", "1", "2"])
    pool.fail("VM.snapshot", error=("SR_FULL",), at_call=True)
    with pytest.raises(Failure, match="SR_FULL"):
        await client.call("Async.VM.snapshot", vm, "s")
    assert not pool.snapshots()


@pytest.mark.parametrize(("stage", "snapshots"), [("before", 0), ("after", 1)])
async def test_a_lost_answer_before_or_after_the_effect(
    client: Client, pool: SimulatedPool, stage: str, snapshots: int
) -> None:
    pool.fail("VM.snapshot", drop=stage)
    with pytest.raises(httpx.RemoteProtocolError):
        await client.call("VM.snapshot", pool.vm("vm1"), "s")
    assert len(pool.snapshots()) == snapshots


@pytest.mark.parametrize(("stage", "snapshots"), [("before", 0), ("after", 1)])
async def test_cancel_at_a_gate(
    client: Client, pool: SimulatedPool, stage: str, snapshots: int
) -> None:
    gate = pool.pause_at("VM.snapshot", stage="before" if stage == "before" else "after")
    task = await client.call("Async.VM.snapshot", pool.vm("vm1"), "s")
    await gate.reached()
    await client.call("task.cancel", task)
    assert (await client.settled(task))["status"] == "cancelled"
    assert len(pool.snapshots()) == snapshots
    assert "current_operations" not in pool.leftovers()


async def test_a_call_that_does_not_listen_to_cancel(client: Client, pool: SimulatedPool) -> None:
    pool.fail("VM.snapshot", ignore_cancel=True)
    gate = pool.pause_at("VM.snapshot")
    task = await client.call("Async.VM.snapshot", pool.vm("vm1"), "s")
    await gate.reached()
    await client.call("task.cancel", task)
    assert await client.call("task.get_status", task) == "cancelling"
    gate.release()
    assert (await client.settled(task))["status"] == "success"
    assert len(pool.snapshots()) == 1


async def test_a_task_that_hangs(client: Client, pool: SimulatedPool) -> None:
    pool.fail("VM.snapshot", hang=True)
    gate = pool.pause_at("VM.snapshot", stage="after")
    task = await client.call("Async.VM.snapshot", pool.vm("vm1"), "s")
    await gate.reached()
    gate.release()
    await gate.left()
    assert await client.call("task.get_status", task) == "pending"
    await client.call("task.destroy", task)
    assert await client.call("task.get_current_operations", task) == {task: "destroy"}
    await client.call("task.cancel", task)
    with trio.fail_after(2):
        while pool.store.find("task", task) is not None:
            await pool.store.changed.wait()


async def test_operations_exclude_each_other(client: Client, pool: SimulatedPool) -> None:
    vm = pool.vm("vm2")
    gate = pool.pause_at("VM.start")
    task = await client.call("Async.VM.start", vm, False, False)
    await gate.reached()
    assert await client.call("VM.get_current_operations", vm) == {task: "start"}
    with pytest.raises(Failure, match="OTHER_OPERATION_IN_PROGRESS"):
        await client.call("VM.destroy", vm)
    gate.release()
    assert (await client.settled(task))["status"] == "success"


async def test_health_check_of_a_guest(client: Client, pool: SimulatedPool) -> None:
    """xapi forgets at a start what an earlier life of the guest told."""
    vm = pool.vm("vm2")
    former = await client.call("VM.get_guest_metrics", vm)
    pool.boot_seconds = 0.05
    await client.call("VM.start", vm, False, False)
    assert await client.call("VM.get_guest_metrics", vm) == "OpaqueRef:NULL"
    assert pool.store.find("VM_guest_metrics", former) is None
    with trio.fail_after(2):
        while (metrics := await client.call("VM.get_guest_metrics", vm)) == "OpaqueRef:NULL":
            await pool.store.changed.wait()
    assert await client.call("VM_guest_metrics.get_PV_drivers_detected", metrics)
    assert await client.call("VM.get_power_state", vm) == "Running"


async def test_a_guest_tests_itself_when_that_is_planned(
    client: Client, pool: SimulatedPool
) -> None:
    pool.guest_script = GuestScript("failure", "no database")
    state = "vm-data/xo-backup-health-check"
    vm = pool.vm("vm2")
    await client.call("VM.add_to_xenstore_data", vm, "vm-data/other", "kept")
    await client.call("VM.add_to_xenstore_data", vm, state, "planned")
    await client.call("VM.start", vm, False, False)
    with trio.fail_after(2):
        while (data := await client.call("VM.get_xenstore_data", vm))[state] != "failure":
            await pool.store.changed.wait()
    assert data == {"vm-data/other": "kept", state: "failure", f"{state}-error": "no database"}


async def test_a_clone_has_what_its_source_reported_but_not_its_blocks(
    client: Client, pool: SimulatedPool
) -> None:
    """xen-api, ``xapi_vm_clone.ml``: no blocked operations, no HA, no appliance."""
    vm = pool.vm("vm2")
    pool.store.update(
        "VM", vm, blocked_operations={"start": "no"}, ha_always_run=True, start_delay=7
    )
    pool.store.update(
        "VM_guest_metrics", pool.store.get("VM", vm)["guest_metrics"], PV_drivers_detected=True
    )
    task = await client.call("Async.VM.copy", vm, "copy", pool.srs[1])
    record = await client.settled(task)
    assert record["status"] == "success"
    copy = pool.store.get("VM", pool.vm("copy"))
    assert copy["blocked_operations"] == {}
    assert not copy["ha_always_run"]
    assert copy["start_delay"] == 0
    assert pool.store.get("VM_guest_metrics", copy["guest_metrics"])["PV_drivers_detected"]
    assert {pool.store.get("VDI", disk)["SR"] for disk in pool.vms.disks(pool.vm("copy"))} == {
        pool.srs[1]
    }


async def test_the_log_holds_no_secret(client: Client, pool: SimulatedPool) -> None:
    await client.call("VM.get_all")
    text = repr(pool.calls.log)
    assert "simulated" not in text
    assert client.session not in text


async def test_in_process_on_a_virtual_clock(autojump_clock: object) -> None:
    """The pool needs no network: latencies cost nothing on trio's own clock."""
    del autojump_clock
    from proxy.simulator import Peer, serve_connection

    pool = SimulatedPool.small()
    pool.latencies["VM.snapshot"] = 3600
    async with pool.running():
        ours, theirs = trio.testing.memory_stream_pair()
        pool.spawn(serve_connection, pool, theirs, Peer(pool.master))
        session = pool.sessions.login("root", "simulated")
        body = (
            f'{{"jsonrpc":"2.0","id":0,"method":"VM.snapshot",'
            f'"params":["{session}","{pool.vm("vm1")}","s"]}}'
        ).encode()
        await ours.send_all(b"POST /jsonrpc HTTP/1.1\r\nhost: x\r\n")
        await ours.send_all(b"content-length: %d\r\n\r\n" % len(body) + body)
        started = trio.current_time()
        assert b"200 OK" in await ours.receive_some()
        assert trio.current_time() - started == 3600
        assert len(pool.snapshots()) == 1


def test_a_pool_follows_from_its_seed() -> None:
    def face(seed: int) -> tuple[str, str]:
        pool = SimulatedPool.small(seed=seed)
        uuid = pool.disk_uuids(pool.vm("vm1"))[0]
        return uuid, pool.digest(uuid)

    assert face(1) == face(1)
    assert face(1) != face(2)


async def test_standalone(nursery: trio.Nursery) -> None:
    from functools import partial

    from proxy.simulator import SimulatorOptions, run_standalone

    info = await nursery.start(
        partial(run_standalone, SimulatorOptions(vms=2, disks=2, disk_size=1 << 20))
    )
    assert sorted(info) == ["password", "pool", "srs", "url", "user", "vms"]
    assert [len(vm["vdis"]) for vm in info["vms"]] == [2, 2]
    async with httpx.AsyncClient() as http:
        client = Client(info["url"], http)
        await client.login()
        assert len(await client.call("VM.get_all")) == 3
