"""Opening what a run writes to: what does not open is a failed task, and the run goes on."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from proxy.errors import NotFound, ProxyError
from proxy.jobs.replication.sr_target import SrDestination
from proxy.runtime.deadlines import deadline

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.jobs.requests import BackupRequest
    from proxy.jobs.services import Services
    from proxy.remotes import Remote
    from proxy.tasks import Task


async def open_remotes(
    services: Services,
    request: BackupRequest,
    remote_ids: Sequence[str],
    root: Task,
    stack: contextlib.AsyncExitStack,
    *,
    seconds: float,
) -> dict[str, Remote]:
    """Every one that opens within ``seconds``, by its id; they stay open with ``stack``."""
    opened: dict[str, Remote] = {}
    for remote_id in remote_ids:
        try:
            spec = request.remotes.get(remote_id)
            if spec is None:
                raise NotFound(f"the call names no remote {remote_id}", data={"id": remote_id})
            with deadline(f"opening remote {remote_id}", seconds):
                opened[remote_id] = await stack.enter_async_context(services.remote(spec))
            await services.sweeper.contact_remote(root, opened[remote_id])
        except ProxyError as error:
            await failed(root.child("get remote adapter", id=remote_id, type="remote"), error)
    return opened


async def open_srs(
    services: Services,
    request: BackupRequest,
    sr_ids: Sequence[str],
    root: Task,
    stack: contextlib.AsyncExitStack,
    *,
    seconds: float,
) -> list[SrDestination]:
    """Every SR that can be had within ``seconds``, each with a session on its own pool."""
    opened: list[SrDestination] = []
    for sr_id in sr_ids:
        try:
            spec = request.xapi_of(sr_id)
            with deadline(f"opening SR {sr_id}", seconds):
                xapi = await stack.enter_async_context(services.xapi(spec))
            await services.sweeper.contact(root, xapi)  # takes as long as there is to sweep
            with deadline(f"looking at SR {sr_id}", seconds):
                ref = await xapi.by_uuid("SR", sr_id)
                opened.append(SrDestination(sr_id, xapi, ref, await xapi.record("SR", ref)))
        except ProxyError as error:
            await failed(root.child("get SR record", id=sr_id, type="SR"), error)
    return opened


async def failed(task: AbstractAsyncContextManager[Task], error: Exception) -> None:
    """A task that only says that something could not be begun."""
    with contextlib.suppress(type(error)):
        async with task:
            raise error
