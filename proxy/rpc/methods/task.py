"""``task.*``: every run of this proxy, its subtasks, and the way to stop one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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


_FILTER = {
    "properties": {
        "status": {
            "type": "string",
            "enum": ["canceled", "failure", "interrupted", "pending", "skipped", "success"],
        },
        "jobId": {"type": "string"},
        "since": {"type": "integer", "description": "start in ms since the epoch"},
    },
    "additionalProperties": False,
}


class GetAll(Params):
    limit: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    filter: Annotated[dict[str, Any], Meta(extra_json_schema=_FILTER)] = {}  # noqa: RUF012  msgspec copies it


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
    GetAll,
    description="returns tasks, newest first",
    result={**TASK, "x-stream": "ndjson"},
)
async def get_all(context: Context, params: GetAll) -> AsyncIterator[msgspec.Raw]:
    return context.services.tasks.list(
        limit=None if params.limit is UNSET else params.limit,
        status=params.filter.get("status"),
        job_id=params.filter.get("jobId"),
        since=params.filter.get("since"),
    )
