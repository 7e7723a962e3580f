"""Undo steps of a run: they run to their end, bounded, and a failing one is told."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import structlog

from proxy.runtime.deadlines import undo_within
from proxy.tasks.records import describe_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.tasks import Task

_log = structlog.get_logger("jobs")


@contextlib.asynccontextmanager
async def undo_step(task: Task, name: str, seconds: float) -> AsyncIterator[None]:
    """The block undoes something: shielded from cancel, at most ``seconds`` long.

    Its failure becomes a warning of ``task`` naming the step and does not replace the error
    that made the undo necessary.
    """
    try:
        with undo_within(name, seconds):
            yield
    except Exception as error:  # noqa: BLE001  told below; the run's own error goes on
        described = describe_error(error)
        described.pop("stack", None)
        task.warning(f"could not {name}", {"error": described})
        _log.error("an undo step failed", step=name, task=task.id, error=str(error))
