"""Live progress of the daemon's transfers, from ``event.from``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from proxy.cli.views import TaskView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.progress import Task as Bar
    from rich.progress import TaskID

    from proxy.cli.client import Client
    from proxy.cli.views import Transferred

WAIT = 30
"""Seconds that the daemon holds a question for events open."""


class _Moved(ProgressColumn):
    """Bytes, rate, time left and what holds the transfer back, as the daemon says them."""

    def render(self, task: Bar) -> Text:
        moved: Transferred | None = task.fields.get("moved")
        if moved is None:
            return Text("")
        if moved.total is None:
            parts = [decimal(moved.done)]
        else:  # behind the percentage
            parts = [f"of {'~' if moved.estimated else ''}{decimal(moved.total)}"]
        if moved.rate is not None:
            parts.append(f"{decimal(moved.rate)}/s")
        if moved.eta is not None and not task.finished:
            parts.append(f"{moved.eta} s left")
        if moved.bottleneck and not task.finished:
            parts.append(f"limited by {moved.bottleneck}")
        return Text("  ".join(parts))


def transfers(task: TaskView, above: str = "") -> Iterator[tuple[TaskView, str]]:
    """Every task below and including ``task`` that moves bytes, with a title."""
    label = task.data.name_label or task.data.job_name or above
    if task.data.transfer is not None:
        yield task, " ".join(part for part in (label, task.data.name) if part)
    for child in task.tasks:
        yield from transfers(child, label)


class Bars:
    """One bar a transfer; on something that is no terminal, one line when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}
        # The bar takes what the words leave: a narrow terminal shortens it and wraps nothing.
        self.progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.percentage:>3.0f} %", table_column=Column(no_wrap=True)),
            _Moved(table_column=Column(no_wrap=True)),
            expand=True,
            console=console,
            disable=not console.is_terminal,
        )

    def update(self, root: TaskView) -> None:
        for task, label in transfers(root):
            self._bar(task, label)
        self._say(root)

    def _bar(self, task: TaskView, label: str) -> None:
        if task.id not in self._bars:
            self._bars[task.id] = self.progress.add_task(escape(label), total=100)
        self.progress.update(
            self._bars[task.id], completed=task.data.progress, moved=task.data.transfer
        )

    def _say(self, root: TaskView) -> None:
        """A line when a run begins or ends."""
        if self._said.get(root.id) != root.status:
            self._said[root.id] = root.status
            line = f"{root.id}  {root.summary}"
            self.progress.console.print(line, highlight=False, markup=False)


def follow_tasks(
    client: Client, console: Console, *, until: Callable[[TaskView], bool] | None = None
) -> None:
    """Show runs and their transfers from now on, until ``until`` says so of a root task.

    Runs that had ended before are not shown.
    """
    bars = Bars(console)
    token = ""
    began = False
    with bars.progress:
        while True:
            page = client.scalar("event.from", {"token": token, "timeout": WAIT})
            token = page["token"]
            for event in page["events"]:
                task = TaskView.read(event["snapshot"])
                if event["operation"] == "del" or (not began and task.status != "pending"):
                    continue
                bars.update(task)
                if until is not None and until(task):
                    return
            began = True
