"""``xo-proxy tasks``: what the daemon does and did, live if asked."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from proxy.cli.client import Client, Stream, connection
from proxy.cli.failures import Failure
from proxy.cli.following import follow_tasks
from proxy.cli.views import TaskView

_STYLES = {
    "pending": "cyan",
    "success": "green",
    "skipped": "yellow",
    "interrupted": "magenta",
    "canceled": "yellow",
    "failure": "red",
}


@click.group(invoke_without_command=True)
@click.option("--follow", is_flag=True, help="Show progress until interrupted.")
@click.option("--limit", default=20, show_default=True, help="How many tasks to list.")
@click.option("--status", type=click.Choice(sorted(_STYLES)), help="Only tasks in this state.")
@connection
def tasks(client: Client, follow: bool, limit: int, status: str | None) -> None:
    """List the daemon's tasks, newest first."""
    if follow:
        follow_tasks(client, Console())
        return
    given: dict[str, Any] = {"limit": limit}
    if status is not None:
        given["filter"] = {"status": status}
    with client.call("task.getAll", given) as reply:
        if not isinstance(reply, Stream):
            raise Failure("the daemon sent no list of tasks")
        found = [TaskView.read(item) for item in reply.items]
    Console(width=None if sys.stdout.isatty() else 140).print(table(found))


@tasks.command()
@click.argument("task_id", metavar="ID")
@connection
def cancel(client: Client, task_id: str) -> None:
    """Ask a pending task to stop; it ends when it has cleaned up after itself."""
    client.scalar("task.cancel", {"taskId": task_id})
    click.echo(f"asked {task_id} to stop")


@tasks.command()
@click.argument("task_id", metavar="ID")
@connection
def destroy(client: Client, task_id: str) -> None:
    """Forget a finished task."""
    client.scalar("task.destroy", {"taskId": task_id})
    click.echo(f"forgot {task_id}")


@tasks.command()
@click.argument("task_id", metavar="ID")
@connection
def show(client: Client, task_id: str) -> None:
    """Show a task with its subtasks."""
    for line in outline(TaskView.read(client.scalar("task.get", {"taskId": task_id}))):
        click.echo(line)


def table(found: list[TaskView]) -> Table:
    shown = Table("id", "task", "status", "started", "duration", box=None, header_style="bold")
    for task in found:
        started = datetime.fromtimestamp(task.start / 1000).astimezone()
        shown.add_row(
            task.id,
            escape(task.title),
            Text(task.status, _STYLES.get(task.status, "")),
            f"{started:%Y-%m-%d %H:%M:%S}",
            task.duration,
        )
    return shown


def outline(task: TaskView, depth: int = 0) -> list[str]:
    """One line a task, children indented below, errors, warnings and what happened beside.

    An error that came from a child stands there only.
    """
    below = {child.data.error.message for child in task.tasks if child.data.error is not None}
    told = task.data.error is not None and task.data.error.message in below
    lines = ["  " * depth + (task.standing if told else task.summary)]
    inner = "  " * (depth + 1)
    lines += [f"{inner}warning: {warning.text}" for warning in task.data.warnings]
    lines += [f"{inner}{line}" for info in task.data.infos for line in info.lines]
    for child in task.tasks:
        lines += outline(child, depth + 1)
    return lines
