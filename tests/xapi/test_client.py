"""Host tasks, records and waits, cancelled at every stage, against the simulated pool."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
import trio

from proxy.errors import NoSuchObject, Unreachable, XapiError
from proxy.simulator import SimulatedPool
from proxy.xapi import Xapi, XapiOptions, client, connect, ownership

from .conftest import FakeHost, cancel_at, clean


async def test_an_async_call_returns_its_result_and_leaves_no_task(
    pool: SimulatedPool, xapi: Xapi
) -> None:
    ref = await xapi.call_async("VM.snapshot", pool.vm("vm1"), "s")
    assert pool.snapshots() == [ref]
    assert not pool.leftovers().get("tasks")


async def test_a_failed_task_raises_the_hosts_error(pool: SimulatedPool, xapi: Xapi) -> None:
    pool.fail("VM.snapshot", error=("SR_FULL", "1", "2"))
    with pytest.raises(XapiError) as caught:
        await xapi.call_async("VM.snapshot", pool.vm("vm1"), "s")
    assert (caught.value.code, caught.value.params) == ("SR_FULL", ["1", "2"])
    assert caught.value.data["method"] == "VM.snapshot"
    await clean(pool)


async def test_a_task_cancelled_on_the_pool_is_a_failure(pool: SimulatedPool, xapi: Xapi) -> None:
    gate = pool.pause_at("VM.snapshot")
    async with trio.open_nursery() as nursery:

        async def operator() -> None:
            await gate.reached()
            for ref, _ in list(pool.store.all("task")):
                pool.do("task.cancel", ref)

        nursery.start_soon(operator)
        with pytest.raises(XapiError) as caught:
            await xapi.call_async("VM.snapshot", pool.vm("vm1"), "s")
    assert caught.value.code == "TASK_CANCELLED"
    await clean(pool)


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("ignore_cancel", [False, True])
async def test_cancel_while_the_task_runs(
    pool: SimulatedPool, xapi: Xapi, stage: Literal["before", "after"], ignore_cancel: bool
) -> None:
    """A task that listens is cancelled; one that ends all the same is undone."""
    late: list[str] = []

    async def undo(result: Any) -> None:
        late.append(result)
        await xapi.call_async("VM.destroy", result)
        for vdi in list(pool.store.all("VDI")):
            if vdi[1]["is_a_snapshot"]:
                await xapi.call_async("VDI.destroy", vdi[0])

    if ignore_cancel:
        pool.fail("VM.snapshot", ignore_cancel=True)
    gate = pool.pause_at("VM.snapshot", stage=stage)
    call = partial(xapi.call_async, "VM.snapshot", pool.vm("vm1"), "s", on_late_success=undo)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await gate.reached()
            nursery.cancel_scope.cancel()
            if ignore_cancel:
                gate.release()
    assert len(late) == (1 if ignore_cancel else 0)
    if not ignore_cancel and stage == "after":
        for ref in pool.snapshots():  # the pool kept the effect of a cancelled task: not ours
            pool.do("VM.destroy", ref)
        return
    await clean(pool)


async def test_cancel_before_the_task_is_known(host: FakeHost, options: XapiOptions) -> None:
    """The answer that names the task is waited for, so that the task can be cancelled."""
    arrived, go = trio.Event(), trio.Event()

    async def start(*_: Any) -> str:
        arrived.set()
        await go.wait()
        return host.new_task()

    host.results["Async.VM.snapshot"] = start
    async with connect(options) as xapi:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(xapi.call_async, "VM.snapshot", "OpaqueRef:vm", "s")
                await arrived.wait()
                nursery.cancel_scope.cancel()
                go.set()
        assert "task.cancel" in host.methods()
        assert host.tasks == {}


async def test_a_task_that_does_not_end_is_given_up(
    host: FakeHost, options: XapiOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SETTLE_SECONDS", 0.1)

    async def deaf(_: str) -> str:
        return ""

    async def start(*_: Any) -> str:
        return host.new_task()

    host.results |= {"Async.VM.snapshot": start, "task.cancel": deaf}
    async with connect(options) as xapi:
        with pytest.raises(Unreachable) as caught, trio.fail_after(5):
            await xapi.call_async("VM.snapshot", "OpaqueRef:vm", "s", timeout=0.05)
        assert caught.value.data["deadline"] == "XAPI: VM.snapshot"
        assert host.tasks == {}


async def test_a_task_that_vanishes_is_an_error(host: FakeHost, options: XapiOptions) -> None:
    async def start(*_: Any) -> str:
        return "OpaqueRef:nowhere"

    host.results["Async.VM.snapshot"] = start
    async with connect(options) as xapi:
        with pytest.raises(XapiError) as caught:
            await xapi.call_async("VM.snapshot", "OpaqueRef:vm", "s")
    assert caught.value.code == "TASK_DESTROYED"


async def test_a_label_task_is_settled_and_destroyed(pool: SimulatedPool, xapi: Xapi) -> None:
    async with xapi.task("[XO] work", "of vm1") as ref:
        assert pool.store.get("task", ref)["name_label"] == "[XO] work"
    with pytest.raises(LookupError):
        async with xapi.task("[XO] work"):
            raise LookupError
    await clean(pool)
    assert "task.cancel" not in [call.method for call in pool.calls.log]


async def test_a_label_task_is_marked_with_the_run_that_acts(
    pool: SimulatedPool, xapi: Xapi
) -> None:
    with ownership.acting_for(ownership.Owner("ours", "run-1")):
        async with xapi.task("[XO] work") as ref:
            marks = pool.store.get("task", ref)["other_config"]
    assert marks == {ownership.PROXY: "ours", ownership.RUN: "run-1"}
    async with xapi.task("[XO] work") as ref:
        assert pool.store.get("task", ref)["other_config"] == {}
    with ownership.acting_for(ownership.Owner("ours", "run-1")):
        pool.fail("task.set_other_config", error=("INTERNAL_ERROR", "no"))
        async with xapi.task("[XO] work") as ref:
            assert pool.store.get("task", ref)["other_config"] == {}
    await clean(pool)


async def test_cancel_while_a_label_task_is_created(pool: SimulatedPool, xapi: Xapi) -> None:
    gate = pool.pause_at("task.create", stage="after")

    async def work() -> None:
        async with xapi.task("[XO] work"):
            await trio.sleep_forever()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await gate.reached()
            nursery.cancel_scope.cancel()
            gate.release()
    await clean(pool)


async def test_weakness_15_waits_end(pool: SimulatedPool, xapi: Xapi) -> None:
    with pytest.raises(Unreachable) as caught:
        await xapi.wait_for(
            "VM", pool.vm("vm1"), lambda vm: vm["name_label"] == "x", name="a name", timeout=0.1
        )
    assert caught.value.message == "a name: nothing happened for 0.1 s"


async def test_a_wait_sees_the_change(pool: SimulatedPool, xapi: Xapi) -> None:
    vm = pool.vm("vm1")
    async with trio.open_nursery() as nursery:

        async def rename() -> None:
            await trio.sleep(0.1)
            pool.do("VM.set_name_label", vm, "renamed")

        nursery.start_soon(rename)
        record = await xapi.wait_for(
            "VM", vm, lambda vm: vm["name_label"] == "renamed", name="a name", timeout=5
        )
    assert record["uuid"] == pool.store.get("VM", vm)["uuid"]


async def test_a_wait_for_what_is_destroyed_ends(pool: SimulatedPool, xapi: Xapi) -> None:
    task = pool.do("task.create", "x", "")
    async with trio.open_nursery() as nursery:

        async def destroy() -> None:
            await trio.sleep(0.1)
            pool.do("task.destroy", task)

        nursery.start_soon(destroy)
        with pytest.raises(XapiError) as caught:
            await xapi.wait_for("task", task, lambda _: False, name="never", timeout=5)
    assert caught.value.code == "HANDLE_INVALID"


async def test_unknown_uuids_are_no_such_object(pool: SimulatedPool, xapi: Xapi) -> None:
    assert await xapi.by_uuid("VM", pool.vm_uuid("vm1")) == pool.vm("vm1")
    with pytest.raises(NoSuchObject):
        await xapi.by_uuid("VM", "00000000-0000-0000-0000-000000000000")


async def test_records_are_found_by_query(pool: SimulatedPool, xapi: Xapi) -> None:
    found = await xapi.records_where("VM", f'field "uuid" = "{pool.vm_uuid("vm1")}"')
    assert list(found) == [pool.vm("vm1")]


async def test_a_map_entry_is_added_replaced_and_removed(pool: SimulatedPool, xapi: Xapi) -> None:
    vm = pool.vm("vm1")
    before = dict(pool.store.get("VM", vm)["other_config"])
    await xapi.update_map("VM", vm, "other_config", {"a": "1", "b": "2"})
    await xapi.update_map("VM", vm, "other_config", {"a": "3", "b": None, "c": None})
    assert pool.store.get("VM", vm)["other_config"] == {**before, "a": "3"}


async def test_a_fought_over_map_entry_ends(host: FakeHost, options: XapiOptions) -> None:
    """Upstream repeats without bound while somebody else adds the entry too."""
    from .conftest import Failure

    async def duplicate(*_: Any) -> Any:
        raise Failure("MAP_DUPLICATE_KEY", "VM", "other_config", "OpaqueRef:1", "k")

    async def removed(*_: Any) -> str:
        return ""

    host.results |= {
        "VM.add_to_other_config": duplicate,
        "VM.remove_from_other_config": removed,
    }
    async with connect(options) as xapi:
        with pytest.raises(XapiError) as caught:
            await xapi.update_map("VM", "OpaqueRef:1", "other_config", {"k": "v"})
    assert caught.value.code == "MAP_DUPLICATE_KEY"
    assert host.methods().count("VM.add_to_other_config") == 6


async def test_calls_given_up_leave_the_session_usable(pool: SimulatedPool, xapi: Xapi) -> None:
    gate = pool.pause_at("VM.get_record")
    await cancel_at(gate, partial(xapi.record, "VM", pool.vm("vm1")))
    assert (await xapi.record("VM", pool.vm("vm1")))["name_label"] == "vm1"
