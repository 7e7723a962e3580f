"""``event.from``: tokens, waiters, restarts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.runtime.threads import inline_threads
from proxy.tasks import EventPage, JournalLimits, Task, Tasks, open_tasks

pytestmark = pytest.mark.virtual_clock


def read(page: EventPage) -> list[tuple[str, str, str]]:
    events: list[dict[str, Any]] = [json.loads(bytes(event)) for event in page.events]
    assert all(event["class"] == "Task" for event in events)
    return [(e["operation"], e["snapshot"]["id"], e["snapshot"]["status"]) for e in events]


async def quick(root: Task) -> None:
    _ = root


async def run_one(tasks: Tasks) -> str:
    task = tasks.start("backup run", {}, quick)
    async for _ in tasks.watch(task):
        pass
    await tasks.flush()
    return task.id


async def test_empty_token_answers_the_present_tasks_at_once(tasks: Tasks) -> None:
    first = await run_one(tasks)
    page = await tasks.events("", timeout=30)
    assert read(page) == [("add", first, "success")]
    assert not page.reset
    assert trio.current_time() < 1


async def test_empty_token_with_no_tasks_answers_at_once_with_a_good_token(tasks: Tasks) -> None:
    page = await tasks.events("", timeout=30)
    assert page.events == []
    task = await run_one(tasks)
    assert read(await tasks.events(page.token, timeout=30)) == [("add", task, "success")]


async def test_timeout_answers_nothing_and_the_same_token(tasks: Tasks) -> None:
    await run_one(tasks)
    token = (await tasks.events("", 0)).token
    before = trio.current_time()
    page = await tasks.events(token, timeout=30)
    assert (page.events, page.token) == ([], token)
    assert trio.current_time() - before == 30


async def test_a_change_is_one_event_with_subtasks_nested(tasks: Tasks) -> None:
    token = (await tasks.events("", 0)).token

    async def work(root: Task) -> None:
        async with root.child("backup VM"):
            pass

    root = tasks.start("backup run", {}, work)
    page = await tasks.events(token, 30)
    assert [e[:2] for e in read(page)] == [("add", root.id)]
    await trio.sleep(1)
    final = json.loads(bytes(await tasks.get(root.id)))
    assert [child["data"]["name"] for child in final["tasks"]] == ["backup VM"]


async def test_a_new_task_is_seen_before_its_first_change(tasks: Tasks) -> None:
    token = (await tasks.events("", 0)).token

    async def silent(root: Task) -> None:
        await trio.sleep(20)

    root = tasks.start("backup run", {}, silent)
    assert read(await tasks.events(token, 10)) == [("add", root.id, "pending")]
    assert trio.current_time() < 1


async def test_at_most_four_events_a_second_per_task(tasks: Tasks) -> None:
    async def busy(root: Task) -> None:
        for done in range(1000):
            root.progress(done, 1000)
            await trio.sleep(0.01)

    tasks.start("backup run", {}, busy)
    token, pages = (await tasks.events("", 0)).token, 0
    with trio.move_on_after(8):
        while True:
            page = await tasks.events(token, 30)
            token, pages = page.token, pages + 1
    assert 25 <= pages <= 34


async def test_a_deleted_task_is_a_del_until_compaction(tasks: Tasks) -> None:
    first = await run_one(tasks)
    token = (await tasks.events("", 0)).token
    await tasks.destroy(first)
    page = await tasks.events(token, 30)
    assert read(page) == [("del", first, "success")]
    assert await tasks.events(token, 30) == page, "a del stays for whoever has the old token"
    assert read(await tasks.events("", 0)) == []


async def test_a_task_born_and_gone_between_two_calls_is_no_event(tasks: Tasks) -> None:
    token = (await tasks.events("", 0)).token
    await tasks.destroy(await run_one(tasks))
    assert read(await tasks.events(token, 1)) == []


async def test_unknown_tokens_answer_everything_with_reset(tasks: Tasks) -> None:
    first = await run_one(tasks)
    good = (await tasks.events("", 0)).token
    journal, boot, seq = good.split(".")
    for bad in (
        "nonsense",
        "0.0.0",
        f"ffffffff.{boot}.{seq}",
        f"{journal}.{int(boot) + 1}.{seq}",
        f"{journal}.{boot}.{int(seq) + 5}",
        f"{journal}.{boot}.x",
        "9" * 5000,
    ):
        page = await tasks.events(bad, 30)
        assert page.reset, bad
        assert read(page) == [("add", first, "success")]


async def test_a_compacted_token_is_a_reset(journal_path: str) -> None:
    with inline_threads():
        async with trio.open_nursery() as nursery:
            async with open_tasks(journal_path, nursery, JournalLimits(keep_deleted=1)) as tasks:
                first = await run_one(tasks)
                token = (await tasks.events("", 0)).token
                for task in (first, await run_one(tasks), await run_one(tasks)):
                    await tasks.destroy(task)
                await trio.sleep(3601)
                page = await tasks.events(token, 0)
    assert page.reset


async def test_tokens_survive_a_restart(journal_path: str) -> None:
    with inline_threads():
        async with trio.open_nursery() as nursery, open_tasks(journal_path, nursery) as tasks:
            await run_one(tasks)
            token = (await tasks.events("", 0)).token
            second = await run_one(tasks)
        async with trio.open_nursery() as nursery, open_tasks(journal_path, nursery) as tasks:
            page = await tasks.events(token, 30)
            assert read(page) == [("add", second, "success")]
            third = await run_one(tasks)
            assert read(await tasks.events(page.token, 30)) == [("add", third, "success")]


async def test_numbers_lost_by_a_crashed_machine_are_not_mistaken(journal_path: str) -> None:
    """A power cut loses the last commits; the numbers come again for other changes."""
    import shutil

    with inline_threads():
        async with trio.open_nursery() as nursery, open_tasks(journal_path, nursery) as tasks:
            await run_one(tasks)
        shutil.copy(journal_path, journal_path + ".old")
        async with (
            trio.open_nursery() as nursery,
            open_tasks(journal_path + ".old", nursery) as tasks,
        ):
            first = await run_one(tasks)
            lost = (await tasks.events("", 0)).token
        # the same boot again, from the older file, as if its commits never reached the disk
        async with trio.open_nursery() as nursery, open_tasks(journal_path, nursery) as tasks:
            pass
        async with trio.open_nursery() as nursery, open_tasks(journal_path, nursery) as tasks:
            for _ in range(3):
                await run_one(tasks)
            page = await tasks.events(lost, 0)
    assert page.reset
    assert first not in [event[1] for event in read(page)]


async def test_a_thousand_waiters_wake_by_one_change(tasks: Tasks) -> None:
    token = (await tasks.events("", 0)).token
    woken: list[EventPage] = []

    async def wait() -> None:
        woken.append(await tasks.events(token, 50))

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert tasks.statistics().waiters == 1000
        task = await run_one(tasks)
    assert all(read(page)[0][:2] == ("add", task) for page in woken)
    assert tasks.statistics().waiters == 0


async def test_a_cancelled_waiter_leaves_nothing(tasks: Tasks) -> None:
    token = (await tasks.events("", 0)).token
    with trio.move_on_after(1):
        await tasks.events(token, 50)
    assert tasks.statistics().waiters == 0


async def test_stopping_releases_the_waiters(tasks: Tasks) -> None:
    token = (await tasks.events("", 0)).token
    pages: list[EventPage] = []

    async def wait() -> None:
        pages.append(await tasks.events(token, 50))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        tasks.release_waiters()
    assert [page.token for page in pages] == [token]
    assert trio.current_time() < 1


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.sampled_from(["run", "destroy", "poll", "restart", "stale"]), max_size=25))
def test_a_client_that_follows_the_feed_knows_the_truth(steps: list[str]) -> None:
    """Model: whatever happens between, applying the events gives the tasks that exist."""
    import tempfile
    from pathlib import Path

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder, inline_threads():
            path = str(Path(folder) / "t.db")
            token, mirror, old = "", dict[str, str](), ["bogus"]
            alive: list[str] = []
            pending = [*steps, "poll"]
            while pending:
                async with trio.open_nursery() as nursery, open_tasks(path, nursery) as tasks:
                    while pending:
                        step = pending.pop(0)
                        if step == "restart":
                            break
                        if step == "run":
                            alive.append(await run_one(tasks))
                        elif step == "destroy" and alive:
                            await tasks.destroy(alive.pop(0))
                        elif step == "stale":
                            token = old.pop(0) if old else token
                        elif step == "poll":
                            page = await tasks.events(token, 0)
                            if page.reset or token == "":
                                mirror.clear()
                            for operation, task, status in read(page):
                                if operation == "del":
                                    mirror.pop(task)
                                else:
                                    assert (operation == "add") is (task not in mirror)
                                    mirror[task] = status
                            token = page.token
            assert sorted(mirror) == sorted(alive)

    trio.run(main)
