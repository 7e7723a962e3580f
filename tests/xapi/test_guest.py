"""Waiting for guests: what counts as up, what ends the wait, what xenstore keeps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from proxy.errors import Conflict, XapiError
from proxy.simulator import GuestScript, SimulatedPool
from proxy.xapi import Xapi, guest

Wait = Callable[[Xapi, str], Awaitable[object]]


@pytest.fixture
def vm(pool: SimulatedPool) -> str:
    """A halted VM whose guest needs a while to come up."""
    ref = pool.vm("vm1")
    pool.vms.halt(ref)
    pool.boot_seconds = 0.05
    return ref


async def test_the_tools_of_an_earlier_life_do_not_count(
    pool: SimulatedPool, xapi: Xapi, vm: str
) -> None:
    assert pool.store.get("VM", vm)["guest_metrics"] != "OpaqueRef:NULL"
    pool.boot_seconds = -1
    await xapi.call_async("VM.start", vm, False, False)
    with trio.move_on_after(0.2) as scope:
        await guest.tools_seen(xapi, vm)
    assert scope.cancelled_caught


async def test_the_tools_are_seen_when_they_report(
    pool: SimulatedPool, xapi: Xapi, vm: str
) -> None:
    await xapi.call_async("VM.start", vm, False, False)
    with trio.fail_after(5):
        await guest.running(xapi, vm)
        await guest.tools_seen(xapi, vm)
    metrics = pool.store.get("VM", vm)["guest_metrics"]
    assert pool.store.get("VM_guest_metrics", metrics)["PV_drivers_detected"]


async def test_tools_that_report_their_drivers_later(
    pool: SimulatedPool, xapi: Xapi, vm: str
) -> None:
    """The record is there before its drivers are; the host may replace it in between."""
    pool.boot_seconds = -1
    await xapi.call_async("VM.start", vm, False, False)
    first = pool.store.create("VM_guest_metrics")
    pool.store.update("VM", vm, guest_metrics=first)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.tools_seen, xapi, vm)
        await trio.sleep(0.1)
        pool.store.destroy("VM_guest_metrics", first)
        second = pool.store.create("VM_guest_metrics")
        pool.store.update("VM", vm, guest_metrics=second)
        await trio.sleep(0.1)
        assert nursery.child_tasks
        pool.store.update("VM_guest_metrics", second, PV_drivers_detected=True)
        nursery.cancel_scope.deadline = trio.current_time() + 5
    assert not nursery.cancel_scope.cancelled_caught


@pytest.mark.parametrize("wait", [guest.tools_seen, guest.script_result])
async def test_a_guest_that_stops_ends_the_wait(
    pool: SimulatedPool, xapi: Xapi, vm: str, wait: Wait
) -> None:
    pool.boot_seconds = -1
    await xapi.call_async("VM.start", vm, False, False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_halt_soon, pool, vm)
        with pytest.raises(Conflict, match="halted") as caught:
            await wait(xapi, vm)
    assert caught.value.code == "VM_STOPPED"


async def _halt_soon(pool: SimulatedPool, vm: str) -> None:
    await trio.sleep(0.1)
    pool.vms.halt(vm)


@pytest.mark.parametrize("wait", [guest.tools_seen, guest.script_result])
async def test_a_vm_that_is_gone_ends_the_wait(xapi: Xapi, wait: Wait) -> None:
    with pytest.raises(XapiError, match="HANDLE_INVALID"):
        await wait(xapi, "OpaqueRef:gone")


async def test_upstream_weakness_18_planning_the_script_keeps_what_xenstore_holds(
    pool: SimulatedPool, xapi: Xapi, vm: str
) -> None:
    """A guest may need its other values to boot; an answer from an earlier test goes."""
    pool.store.update(
        "VM",
        vm,
        xenstore_data={"vm-data/role": "db", guest.STATE: "failure", guest.ERROR: "long ago"},
    )
    await guest.plan_script(xapi, vm)
    assert pool.store.get("VM", vm)["xenstore_data"] == {
        "vm-data/role": "db",
        guest.STATE: "planned",
    }


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (GuestScript(), guest.ScriptResult(succeeded=True, message="")),
        (GuestScript(seconds=0.1), guest.ScriptResult(succeeded=True, message="")),
        (GuestScript("failure"), guest.ScriptResult(succeeded=False, message="")),
        (
            GuestScript("failure", "no database"),
            guest.ScriptResult(succeeded=False, message="no database"),
        ),
        (
            GuestScript("failure", "x" * 100_000),
            guest.ScriptResult(succeeded=False, message="x" * 1000),
        ),
    ],
)
async def test_what_the_script_says(
    pool: SimulatedPool,
    xapi: Xapi,
    vm: str,
    script: GuestScript,
    expected: guest.ScriptResult,
) -> None:
    pool.guest_script = script
    await guest.plan_script(xapi, vm)
    await xapi.call_async("VM.start", vm, False, False)
    with trio.fail_after(5):
        assert await guest.script_result(xapi, vm) == expected


async def test_a_script_that_never_ends_is_waited_for(
    pool: SimulatedPool, xapi: Xapi, vm: str
) -> None:
    pool.guest_script = GuestScript(None)
    await guest.plan_script(xapi, vm)
    await xapi.call_async("VM.start", vm, False, False)
    with trio.move_on_after(0.3) as scope:
        await guest.script_result(xapi, vm)
    assert scope.cancelled_caught
    assert guest.script_state(pool.store.get("VM", vm)) == "running"


async def test_no_interface_is_left(pool: SimulatedPool, xapi: Xapi, vm: str) -> None:
    for device in ("1", "2"):
        record = {"VM": vm, "network": pool.network, "device": device, "MAC": ""}
        pool.do("VIF.create", record)
    await guest.remove_interfaces(xapi, vm)
    assert pool.store.get("VM", vm)["VIFs"] == []


def _does_nothing(kind: str, ref: str) -> None:
    del kind, ref


async def test_an_interface_that_stays_is_told(
    pool: SimulatedPool, xapi: Xapi, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that says it did so: what counts is what is there."""
    monkeypatch.setattr(pool.devices, "destroy", _does_nothing)
    with pytest.raises(Conflict) as caught:
        await guest.remove_interfaces(xapi, vm)
    assert caught.value.code == "EVIF"
