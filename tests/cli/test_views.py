from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from proxy.cli.following import follow_tasks, transfers
from proxy.cli.tasks import outline, table
from proxy.cli.views import TaskView

RUN: dict[str, Any] = {
    "id": "r1",
    "start": 1_000,
    "end": 63_000,
    "status": "canceled",
    "data": {"name": "backup run", "jobName": "nightly [x]", "error": {"message": "by request"}},
    "tasks": [
        {
            "id": "v1",
            "start": 1_000,
            "end": 2_500,
            "status": "success",
            "data": {"name": "backup VM", "id": "uuid", "name_label": "web"},
            "tasks": [
                {
                    "id": "t1",
                    "start": 1_000,
                    "status": "pending",
                    "data": {
                        "name": "transfer",
                        "progress": 40,
                        "transfer": {"done": 4, "total": 10, "rate": 2, "eta": 3},
                        "warnings": [{"message": "slow", "data": {"error": "no room"}}],
                    },
                }
            ],
        }
    ],
}


def test_a_task_is_outlined_with_its_children() -> None:
    assert outline(TaskView.read(RUN)) == [
        "backup run nightly [x]: canceled 1:02 (by request)",
        "  backup VM web: success 1.5 s",
        "    transfer: pending 40 %",
        "      warning: slow: no room",
    ]


def test_an_error_stands_where_it_came_from() -> None:
    full: dict[str, Any] = {"name": "", "error": {"message": "disk full"}}
    ended: dict[str, Any] = {"start": 0, "end": 1000, "status": "failure"}
    transfer = {**ended, "id": "t", "data": {**full, "name": "transfer"}}
    vm = {**ended, "id": "v", "data": {**full, "name": "backup VM"}, "tasks": [transfer]}
    assert outline(TaskView.read(vm)) == [
        "backup VM: failure 1.0 s",
        "  transfer: failure 1.0 s (disk full)",
    ]


def test_an_error_has_the_code_to_look_it_up_by() -> None:
    task: dict[str, Any] = {"id": "t", "start": 0, "end": 1000, "status": "failure"}
    error = {"message": "the credentials of root", "code": "EAUTH"}
    (line,) = outline(TaskView.read({**task, "data": {"name": "backup VM", "error": error}}))
    assert line == "backup VM: failure 1.0 s (the credentials of root; EAUTH)"
    error = {"message": "ENOSPC: no space left on device", "code": "ENOSPC"}
    (line,) = outline(TaskView.read({**task, "data": {"name": "transfer", "error": error}}))
    assert line == "transfer: failure 1.0 s (ENOSPC: no space left on device)"
    stopped = {**task, "status": "canceled"}
    error = {"message": "by request", "code": "ECANCELED"}
    (line,) = outline(TaskView.read({**stopped, "data": {"name": "transfer", "error": error}}))
    assert line == "transfer: canceled 1.0 s (by request)"


def test_the_outline_says_how_each_disk_was_read_and_why_whole() -> None:
    told = [
        {
            "disk": "d1",
            "wanted": "full",
            "reason": "NO_BACKUP",
            "message": "the remote has no backup of this disk",
            "got": "full",
            "via": "nbd",
            "steps": [{"way": "cbt", "code": "CBT_DISABLED", "message": "not tracked"}],
        },
        {"disk": "d2", "wanted": "delta", "base": "b", "got": "delta", "via": "stream"},
        {"disk": "d3", "wanted": "delta"},
    ]
    waits = {"message": "waiting for whoever holds it", "data": {"reason": "Lock by h1"}}
    infos = [
        {"message": "vms", "data": {"vms": ["v"]}},
        {"message": "disks", "data": {"disks": told}},
        waits,
        {"message": "disks", "data": "another program's"},
        {"message": "alone"},
    ]
    task = {"id": "t", "start": 0, "end": 1000, "status": "success"}
    assert outline(TaskView.read({**task, "data": {"name": "backup VM", "infos": infos}}))[1:] == [
        (
            "  disk d1: full over nbd, NO_BACKUP (the remote has no backup of this disk),"
            " not cbt: CBT_DISABLED"
        ),
        "  disk d2: delta over stream",
        "  disk d3: delta",
        "  info: waiting for whoever holds it: Lock by h1",
        "  info: disks",
        "  info: alone",
    ]


def test_names_are_no_markup() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(table([TaskView.read(RUN)]))
    assert "nightly [x]" in out.getvalue()


def test_transfers_are_found_with_the_vm_that_they_belong_to() -> None:
    found = [(task.id, title) for task, title in transfers(TaskView.read(RUN))]
    assert found == [("t1", "web transfer")]


class Pages:
    """Stands for the client: answers ``event.from`` page after page."""

    def __init__(self, *pages: list[Any]) -> None:
        self.pages = list(pages)
        self.tokens: list[str] = []

    def scalar(self, method: str, params: dict[str, Any]) -> Any:
        assert method == "event.from"
        self.tokens.append(params["token"])
        events = [{"operation": "mod", "snapshot": task} for task in self.pages.pop(0)]
        return {"events": events, "token": f"after-{len(self.tokens)}"}


@pytest.mark.parametrize("terminal", [True, False])
def test_following_shows_runs_from_now_on(terminal: bool) -> None:
    pending = {**RUN, "status": "pending"}
    old = {**RUN, "id": "old"}
    pages = Pages([old], [pending], [pending], [RUN])
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=terminal)
    follow_tasks(pages, console, until=lambda task: task.status == "canceled")  # type: ignore[arg-type]
    assert pages.tokens == ["", "after-1", "after-2", "after-3"]
    assert "old" not in out.getvalue()
    assert "r1  backup run nightly [x]: pending" in out.getvalue()
    assert "(by request)" in out.getvalue()
    assert ("40 %" in out.getvalue()) is terminal
