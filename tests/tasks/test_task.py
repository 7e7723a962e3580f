"""Trees of tasks: outcomes, records, cancel."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Canceled, Many, Refused
from proxy.runtime import secrets
from proxy.tasks import Task, Tasks

pytestmark = pytest.mark.virtual_clock


async def records(tasks: Tasks, task: Task) -> list[dict[str, Any]]:
    return [json.loads(record) async for record in tasks.watch(task)]


async def finish(tasks: Tasks, task: Task) -> dict[str, Any]:
    await records(tasks, task)
    snapshot: dict[str, Any] = json.loads(task.snapshot())
    return snapshot


def shape(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    names = {r["id"]: r["properties"]["name"] for r in log if r["type"] == "start"}
    return [(names[r["id"]], r.get("status", r["type"])) for r in log]


async def test_records_have_upstreams_shapes(tasks: Tasks) -> None:
    async def work(root: Task) -> str:
        root.info("vms", {"vms": ["a"]})
        async with root.child("backup VM", id="a", type="VM") as vm:
            vm.warning("careful")
            vm.result = {"size": 12}
        return "done"

    root = tasks.start("backup run", {"mode": "full"}, work)
    log = await records(tasks, root)
    for record in log:
        assert record.pop("timestamp") > 1_700_000_000_000
    vm_id = log[2]["id"]
    assert log == [
        {"properties": {"name": "backup run", "mode": "full"}, "id": root.id, "type": "start"},
        {"data": {"vms": ["a"]}, "message": "vms", "id": root.id, "type": "info"},
        {
            "properties": {"id": "a", "type": "VM", "name": "backup VM"},
            "parentId": root.id,
            "id": vm_id,
            "type": "start",
        },
        {"message": "careful", "id": vm_id, "type": "warning"},
        {"status": "success", "result": {"size": 12}, "id": vm_id, "type": "end"},
        {"status": "success", "result": "done", "id": root.id, "type": "end"},
    ]


async def test_what_is_handed_out_stands_in_the_log_alone(tasks: Tasks) -> None:
    """It must come as it is, and it may be full of secrets."""
    secrets.remember("hunter2-hunter2")
    content = '{"password":"hunter2-hunter2","url":"smb://u:hunter2-hunter2@h"}'

    async def work(root: Task) -> None:
        root.handed_out = content
        async with root.child("left") as child:
            child.handed_out = {"data": content}

    root = tasks.start("metadataRestore", {}, work)
    log = await records(tasks, root)
    assert [r["result"] for r in log if r["type"] == "end"] == [{"data": content}, content]
    assert list(log[-1]) == ["status", "result", "id", "timestamp", "type"]
    assert b"hunter2" not in root.snapshot()
    assert b"hunter2" not in bytes(await tasks.get(root.id))

    async def failing(root: Task) -> None:
        root.handed_out = content
        raise Refused("no")

    log = await records(tasks, tasks.start("metadataRestore", {}, failing))
    assert log[-1]["result"]["message"] == "no"


async def test_ids_sort_by_time_and_have_upstreams_form(tasks: Tasks) -> None:
    async def nothing(root: Task) -> None:
        _ = root

    ids = [tasks.start("backup run", {}, nothing).id for _ in range(3)]
    assert all(len(one.split("-")[0]) == 9 for one in ids)
    assert len(set(ids)) == 3


async def test_parent_is_never_better_than_its_children(tasks: Tasks) -> None:
    async def work(root: Task) -> None:
        try:
            async with root.child("backup VM"):
                raise Refused("ENOSPC: no space left", code="ENOSPC")
        except Refused:
            pass  # a VM's failure does not end the job

    root = tasks.start("backup run", {}, work)
    log = await records(tasks, root)
    assert log[-1]["status"] == "success", (
        "XO derives the failure; a failing root would stay pending"
    )
    snapshot = json.loads(root.snapshot())
    assert snapshot["status"] == "failure"
    assert snapshot["tasks"][0]["data"]["error"]["code"] == "ENOSPC"


async def test_skipped_is_upstreams_exact_message(tasks: Tasks) -> None:
    async def work(root: Task) -> None:
        raise Refused("unhealthy VDI chain")

    snapshot = await finish(tasks, tasks.start("backup VM", {}, work))
    assert snapshot["status"] == "skipped"


async def test_a_replaced_attempt_does_not_count(tasks: Tasks) -> None:
    async def work(root: Task) -> None:
        try:
            async with root.child("snapshot"):
                raise Refused("no")
        except Refused as error:
            root.retry("Retry the VM backup due to an error", {"error": str(error)})
        async with root.child("snapshot"):
            pass

    root = tasks.start("backup VM", {}, work)
    log = await records(tasks, root)
    assert json.loads(root.snapshot())["status"] == "success"
    assert [r["data"]["isRetry"] for r in log if r["type"] == "warning"] == [True]


async def test_what_is_not_done_again_goes_on_to_count(tasks: Tasks) -> None:
    """A retry for one target hides nothing that went wrong on another."""

    async def work(root: Task) -> None:
        for target in ("R1", "R2"):
            with contextlib.suppress(Refused):
                async with root.child("export", id=target):
                    raise Refused("no")
        root.retry("Retry the VM backup due to an error", {"error": "no"}, kept={"R1"})
        async with root.child("export", id="R2"):
            pass

    assert (await finish(tasks, tasks.start("backup VM", {}, work)))["status"] == "failure"


async def test_cancel_of_the_root_runs_the_undo_then_ends(tasks: Tasks) -> None:
    undone = trio.Event()
    started = trio.Event()

    async def work(root: Task) -> None:
        async with root.child("transfer"):
            try:
                started.set()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(5)
                    undone.set()

    root = tasks.start("backup run", {}, work)
    await started.wait()
    await tasks.cancel(root.id)
    assert root.pending, "cancel answers at once, the task ends when its undo did"
    log = await records(tasks, root)
    assert undone.is_set()
    assert shape(log) == [
        ("backup run", "start"),
        ("transfer", "start"),
        ("backup run", "abortionRequested"),
        ("transfer", "abortionRequested"),
        ("transfer", "failure"),
        ("backup run", "failure"),
    ]
    snapshot = json.loads(root.snapshot())
    assert (snapshot["status"], snapshot["tasks"][0]["status"]) == ("canceled", "canceled")


async def test_a_subtask_begun_after_the_cancel_tells_its_reason(tasks: Tasks) -> None:
    """Such as the task of a VM that was still in the queue."""

    async def work(root: Task) -> None:
        try:
            await trio.sleep_forever()
        finally:
            async with root.child("backup VM"):
                await trio.lowlevel.checkpoint()

    root = tasks.start("backup run", {}, work)
    await trio.testing.wait_all_tasks_blocked()
    root.cancel("the daemon stops")
    await records(tasks, root)
    snapshot = json.loads(root.snapshot())
    assert snapshot["tasks"][0]["data"]["error"]["message"] == "the daemon stops"


async def test_one_subtask_is_cancelled_alone_and_its_siblings_go_on(tasks: Tasks) -> None:
    go_on = trio.Event()
    vms: dict[str, Task] = {}

    async def one(root: Task, name: str) -> None:
        try:
            async with root.child("backup VM", id=name) as vm:
                vms[name] = vm
                await go_on.wait()
        except Canceled:
            pass

    async def work(root: Task) -> None:
        async with trio.open_nursery() as nursery:
            for name in "ab":
                nursery.start_soon(one, root, name)

    root = tasks.start("backup run", {}, work)
    await trio.testing.wait_all_tasks_blocked()
    await tasks.cancel(vms["a"].id)
    await trio.testing.wait_all_tasks_blocked()
    go_on.set()
    snapshot = await finish(tasks, root)
    statuses = {one["data"]["id"]: one["status"] for one in snapshot["tasks"]}
    assert statuses == {"a": "canceled", "b": "success"}
    assert snapshot["status"] == "canceled"


async def test_work_that_ended_before_the_cancel_reached_it_is_a_success(tasks: Tasks) -> None:
    async def work(root: Task) -> str:
        root.cancel()
        return "committed"

    snapshot = await finish(tasks, tasks.start("backup run", {}, work))
    assert snapshot["status"] == "success"
    assert snapshot["data"]["result"] == "committed"


async def test_a_real_failure_beats_the_cancel_that_came_with_it(tasks: Tasks) -> None:
    async def work(root: Task) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise Refused("disk full")

    snapshot = await finish(tasks, tasks.start("backup run", {}, work))
    assert snapshot["status"] == "failure"
    assert snapshot["data"]["error"]["message"] == "disk full"


async def test_errors_keep_code_data_cause_and_inner_errors(tasks: Tasks) -> None:
    async def work(root: Task) -> None:
        raise Many.all_targets("writer.run()", [Refused("a", code="ENOSPC")]) from OSError("below")

    snapshot = await finish(tasks, tasks.start("backup VM", {}, work))
    error = snapshot["data"]["error"]
    assert error["message"] == "all targets have failed, step: writer.run()"
    assert error["errors"][0]["code"] == "ENOSPC"
    assert error["cause"] == {"message": "below", "name": "OSError"}
    assert "test_task.py" in error["stack"]
    assert "/home" not in error["stack"]
    assert not error["stack"].count(__file__), "no absolute path of the appliance"


async def test_secrets_reach_neither_log_nor_snapshot(tasks: Tasks) -> None:
    secret = "s3cr3t-passphrase"

    async def work(root: Task) -> None:
        root.info("x", {"url": f"smb://me:{secret}@d\\\\h\\s", "password": secret})
        raise Refused(f"cannot open file:///a?encryptionKey=%22{secret}%22")

    root = tasks.start("backup run", {"xapi": {"credentials": {"password": secret}}}, work)
    log = [record async for record in tasks.watch(root)]
    assert secret not in b"".join(log).decode()
    assert secret not in root.snapshot().decode()


async def test_progress_is_monotone_and_ends_at_100_once(tasks: Tasks) -> None:
    step = trio.Event()

    async def work(root: Task) -> None:
        async with root.child("transfer") as transfer:
            for done in (0, 10, 50, 40, 90):
                transfer.progress(done, 100, bottleneck="target")
                await trio.sleep(1)
            transfer.complete_progress()
            step.set()

    root = tasks.start("backup run", {}, work)
    log = await records(tasks, root)
    values = [r["value"] for r in log if r.get("name") == "progress"]
    assert values == sorted(values)
    assert values[-1] == 100
    assert values.count(100) == 1
    transfer = json.loads(root.snapshot())["tasks"][0]["data"]["transfer"]
    assert transfer["bottleneck"] == "target"
    assert transfer["rate"] == 18


async def test_progress_tells_rate_and_eta(tasks: Tasks) -> None:
    async def work(root: Task) -> None:
        for second in range(6):
            root.progress(second * 100, 1000, estimated=True)
            await trio.sleep(1)
        described = json.loads(root.snapshot())["data"]["transfer"]
        assert described == {"done": 500, "total": 1000, "estimated": True, "rate": 100, "eta": 5}

    snapshot = await finish(tasks, tasks.start("restore", {}, work))
    assert snapshot["status"] == "success", snapshot


async def test_slow_watcher_costs_only_an_index(tasks: Tasks) -> None:
    async def work(root: Task) -> None:
        for done in range(100):
            root.progress(done, 100)
            await trio.lowlevel.checkpoint()
        await trio.sleep(1)

    root = tasks.start("backup run", {}, work)
    seen = []
    async for record in tasks.watch(root):
        seen.append(json.loads(record))
        await trio.sleep(0.5)
    assert len(seen) < 10, "progress is coalesced for a client that does not keep up"
    assert seen[-1]["type"] == "end"


STEPS = st.recursive(
    st.sampled_from(["ok", "fail", "swallow"]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@given(tree=STEPS)
def test_random_trees_keep_the_order_of_records_and_the_truth(tree: Any) -> None:
    """XO's consumer drops a log that starts a child before its parent or speaks after an end."""

    async def main() -> None:
        from proxy.runtime.threads import inline_threads
        from proxy.tasks import open_tasks

        failures = 0

        async def walk(task: Task, node: Any) -> None:
            nonlocal failures
            if node == "fail":
                failures += 1
                raise Refused("x")
            if node == "swallow":
                failures += 1
                try:
                    async with task.child("swallowed"):
                        raise Refused("y")
                except Refused:
                    return
            if isinstance(node, list):
                for inner in node:
                    async with task.child("child") as child:
                        await walk(child, inner)

        async with trio.open_nursery() as nursery:
            with inline_threads():
                async with open_tasks(":memory:", nursery) as room:
                    root = room.start("backup run", {}, lambda task: walk(task, tree))
                    log = await records(room, root)
                    snapshot = json.loads(root.snapshot())
        state: dict[str, str] = {}
        for record in log:
            if record["type"] == "start":
                assert record["id"] not in state
                assert "parentId" not in record or state[record["parentId"]] == "open"
                state[record["id"]] = "open"
            else:
                assert state[record["id"]] == "open"
            if record["type"] == "end":
                state[record["id"]] = "closed"
        assert set(state.values()) == {"closed"}
        assert log[-1]["id"] == root.id
        assert (snapshot["status"] == "failure") is (failures > 0)

    trio.run(main)


@pytest.mark.parametrize("again", [1, 2])
async def test_cancelling_twice_is_fine(tasks: Tasks, again: int) -> None:
    async def work(root: Task) -> None:
        await trio.sleep_forever()

    root = tasks.start("backup run", {}, work)
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(again):
        await tasks.cancel(root.id)
    log = await records(tasks, root)
    assert [r["type"] for r in log].count("abortionRequested") == 1
