"""``task.*``: every run of this proxy, its subtasks, and the way to stop one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from proxy.rpc.registry import Params, Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.rpc.context import Context

methods = Registry()

TASK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "start": {"type": "integer", "description": "ms since the epoch"},
        "end": {"type": "integer", "description": "ms since the epoch"},
        "status": {
            "enum": ["canceled", "failure", "interrupted", "pending", "skipped", "success"],
        },
        "data": {},
        "tasks": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["id", "start", "status", "data"],
}


class TaskId(Params):
    task_id: str


class Filter(Params):
    limit: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    status: (
        Literal["canceled", "failure", "interrupted", "pending", "skipped", "success"] | UnsetType
    ) = UNSET
    job_id: str | UnsetType = UNSET
    since: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    """Start time in ms since the epoch."""


@methods.method(
    "task.cancel",
    TaskId,
    description="asks a pending task to stop; it ends when it has cleaned up after itself",
    changes=True,
    result={"type": "boolean"},
)
async def cancel(context: Context, params: TaskId) -> None:
    await context.services.tasks.cancel(params.task_id)


@methods.method(
    "task.destroy",
    TaskId,
    description="forgets a finished task",
    changes=True,
    result={"type": "boolean"},
)
async def destroy(context: Context, params: TaskId) -> None:
    await context.services.tasks.destroy(params.task_id)


@methods.method("task.get", TaskId, description="returns a task", result=TASK)
async def get(context: Context, params: TaskId) -> msgspec.Raw:
    return await context.services.tasks.get(params.task_id)


@methods.method(
    "task.getAll",
    Filter,
    description="returns tasks, newest first",
    result={**TASK, "x-stream": "ndjson"},
)
async def get_all(context: Context, params: Filter) -> AsyncIterator[msgspec.Raw]:
    return context.services.tasks.list(
        limit=_given(params.limit),
        status=_given(params.status),
        job_id=_given(params.job_id),
        since=_given(params.since),
    )


def _given(value: Any) -> Any:
    return None if value is UNSET else value
