"""The room's face: get, list, cancel, destroy."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.lowlevel
import trio.testing

from proxy.errors import Conflict, NoSuchObject, Refused
from proxy.runtime.threads import inline_threads
from proxy.tasks import JournalLimits, Task, Tasks, open_tasks

pytestmark = pytest.mark.virtual_clock


async def quick(root: Task) -> None:
    _ = root


async def done(tasks: Tasks, name: str = "backup run", **properties: Any) -> str:
    task = tasks.start(name, properties, quick)
    async for _ in tasks.watch(task):
        pass
    await tasks.flush()
    return task.id


async def everything(tasks: Tasks, **filters: Any) -> list[str]:
    return [json.loads(bytes(raw))["id"] async for raw in tasks.list(**filters)]


async def test_finished_tasks_leave_memory_and_are_still_found(tasks: Tasks) -> None:
    task_id = await done(tasks)
    assert tasks.live(task_id) is None
    assert json.loads(bytes(await tasks.get(task_id)))["status"] == "success"


async def test_unknown_tasks_are_a_clear_error(tasks: Tasks) -> None:
    for call in (tasks.get, tasks.cancel, tasks.destroy):
        with pytest.raises(NoSuchObject, match="no such task nope"):
            await call("nope")


async def test_list_filters_and_limits_newest_first(tasks: Tasks) -> None:
    ids = []
    for job in ("j1", "j2", "j1"):
        ids.append(await done(tasks, jobId=job))
        await trio.lowlevel.checkpoint()
    assert await everything(tasks) == sorted(ids, reverse=True)
    assert await everything(tasks, limit=2) == sorted(ids, reverse=True)[:2]
    assert await everything(tasks, job_id="j2") == [ids[1]]
    assert await everything(tasks, status="failure") == []
    start = json.loads(bytes(await tasks.get(ids[2])))["start"]
    assert ids[2] in await everything(tasks, since=start)
    assert await everything(tasks, since=start + 60_000) == []


async def test_list_pages_through_many(tasks: Tasks) -> None:
    ids = [await done(tasks) for _ in range(230)]
    assert sorted(await everything(tasks)) == sorted(ids)


async def test_cancel_of_a_finished_task_is_a_clear_error(tasks: Tasks) -> None:
    task_id = await done(tasks)
    with pytest.raises(Conflict, match="already finished") as caught:
        await tasks.cancel(task_id)
    assert caught.value.code == "EFINISHED"


async def test_destroy_refuses_a_pending_task_and_forgets_a_finished_one(tasks: Tasks) -> None:
    async def wait(root: Task) -> None:
        async with root.child("inner"):
            await trio.sleep_forever()

    task = tasks.start("backup run", {}, wait)
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(Conflict, match="still pending"):
        await tasks.destroy(task.id)
    with pytest.raises(Conflict, match="is part of"):
        await tasks.destroy(task.children[0].id)
    await tasks.cancel(task.id)
    async for _ in tasks.watch(task):
        pass
    await tasks.destroy(task.id)
    with pytest.raises(NoSuchObject):
        await tasks.get(task.id)


async def test_subtasks_are_found_while_their_run_lives(tasks: Tasks) -> None:
    async def wait(root: Task) -> None:
        async with root.child("inner"):
            await trio.sleep_forever()

    task = tasks.start("backup run", {}, wait)
    await trio.testing.wait_all_tasks_blocked()
    inner = task.children[0]
    assert json.loads(bytes(await tasks.get(inner.id)))["status"] == "pending"
    task.cancel()


async def test_tasks_left_pending_by_a_crash_become_interrupted(journal_path: str) -> None:

    async def wait(root: Task) -> None:
        async with root.child("backup VM"), root.child("finished"):
            pass
        async with root.child("transfer"):
            await trio.sleep_forever()

    with inline_threads():
        async with trio.open_nursery() as nursery:
            async with open_tasks(journal_path, nursery) as first:
                task = first.start("backup run", {}, wait)
                await trio.sleep(1)
            # The journal is closed while the run is pending, as after a kill.
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery, open_tasks(journal_path, nursery) as second:
            snapshot = json.loads(bytes(await second.get(task.id)))
    assert snapshot["status"] == "interrupted"
    assert snapshot["end"] >= snapshot["start"]
    assert [child["status"] for child in snapshot["tasks"]] == [
        "success",
        "success",
        "interrupted",
    ]


async def test_a_broken_journal_is_put_aside_and_the_daemon_starts(journal_path: str) -> None:
    from pathlib import Path

    Path(journal_path).write_bytes(b"this is no database" * 1000)
    with inline_threads():
        async with trio.open_nursery() as nursery, open_tasks(journal_path, nursery) as tasks:
            await done(tasks)
    assert list(Path(journal_path).parent.glob("tasks.db.corrupt-*"))


async def test_old_tasks_are_forgotten_beyond_the_limit(journal_path: str) -> None:
    with inline_threads():
        async with trio.open_nursery() as nursery:
            async with open_tasks(journal_path, nursery, JournalLimits(keep=3)) as tasks:
                for _ in range(8):
                    await done(tasks)
                await trio.sleep(3601)
                assert len(await everything(tasks)) == 3


async def test_the_daemons_log_says_why_a_run_failed(tasks: Tasks) -> None:
    """After a night it may be all that somebody has; the failure is deep in a run that went on."""

    async def one_vm(root: Task, name: str, error: Exception | None) -> None:
        with contextlib.suppress(Exception):
            async with root.child("backup VM", id="uuid", name_label=name) as vm:
                async with vm.child("export", id="r1"):
                    if error is not None:
                        raise error

    async def work(root: Task) -> None:
        await one_vm(root, "web", Refused("no space left", code="ENOSPC"))
        await one_vm(root, "mail", None)
        await one_vm(root, "db", KeyError("a fault of ours"))

    with structlog.testing.capture_logs() as lines:
        task = tasks.start("backup run", {"jobName": "nightly"}, work)
        async for _ in tasks.watch(task):
            pass
        await trio.testing.wait_all_tasks_blocked()
    told = [(one["log_level"], one["event"], one.get("reason") or one.get("what")) for one in lines]
    assert told == [
        ("info", "task began", "backup run nightly"),
        ("error", "internal error", None),
        ("warning", "task ended", "backup run nightly"),
        ("warning", "it failed", "backup VM web: export r1: no space left"),
        ("warning", "it failed", "backup VM db: export r1: 'a fault of ours'"),
    ]
    assert "in one_vm" in lines[1]["traceback"]


async def test_notes_outlive_the_daemon_until_they_are_cleared(tmp_path: Path) -> None:
    path = str(tmp_path / "journal.sqlite")
    async with trio.open_nursery() as nursery:
        async with open_tasks(path, nursery) as tasks:
            await tasks.note("damage", "a", {"x": 1})
            await tasks.note("damage", "b", [2])
            await tasks.note("damage", "a", {"x": 3})
            await tasks.note("other", "a", "4")
            await tasks.note("damage", "b", None)
            await tasks.note("damage", "never there", None)
        async with open_tasks(path, nursery) as tasks:
            assert await tasks.notes("damage") == {"a": {"x": 3}}
            assert await tasks.notes("other") == {"a": "4"}
            assert await tasks.notes("nothing") == {}


async def test_a_journal_that_fails_remembers_nothing_and_stops_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "journal.sqlite")
    async with trio.open_nursery() as nursery, open_tasks(path, nursery) as tasks:
        with sqlite3.connect(path) as other:
            other.execute("DROP TABLE note")
        other.close()
        await tasks.note("damage", "a", 1)
        assert await tasks.notes("damage") == {}
