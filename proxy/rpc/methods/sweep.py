"""``backup.sweep``: what dead runs left on pools and remotes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio
from msgspec import UNSET, UnsetType

from proxy.jobs import SweepRequest
from proxy.rpc.methods.backup import TASK_OR_LOG
from proxy.rpc.registry import Params, Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.rpc.context import Context

methods = Registry()


class Sweep(Params):
    xapis: dict[str, dict[str, Any]] | UnsetType = UNSET
    remotes: dict[str, dict[str, Any]] | UnsetType = UNSET
    dry_run: bool = False
    stream_logs: bool = False


@methods.method(
    "backup.sweep",
    Sweep,
    description="remove what dead runs of this daemon left on pools and remotes",
    changes=True,
    result=TASK_OR_LOG,
)
async def sweep(context: Context, params: Sweep) -> str | AsyncIterator[bytes]:
    """Without ``streamLogs`` the task's id is the answer, at once."""
    request = SweepRequest(
        xapis={} if params.xapis is UNSET else params.xapis,
        remotes={} if params.remotes is UNSET else params.remotes,
        dry_run=params.dry_run,
    )
    await trio.lowlevel.checkpoint()
    task = context.services.start_sweep(request)
    return context.services.tasks.watch(task) if params.stream_logs else task.id
