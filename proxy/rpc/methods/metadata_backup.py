"""``backup.*`` of metadata backups: pools' databases and Xen Orchestra's configuration.

They are made by ``backup.run``, with a job of type ``metadataBackup``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import structlog
import trio
from msgspec import UNSET, UnsetType

from proxy.errors import ProxyError
from proxy.jobs import MetadataRestoreRequest
from proxy.repository import delete_metadata_backup, list_config_backups, list_pool_backups
from proxy.rpc.registry import Params, Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from proxy.remotes.interface import Remote
    from proxy.rpc.context import Context

methods = Registry()

T = TypeVar("T")

_log = structlog.get_logger("backup")

_LOCK_WAIT = 30.0
"""Seconds that a deletion waits for a run: XO gives a call up after 60."""


class Delete(Params):
    backup_id: str
    remote: dict[str, Any]


@methods.method(
    "backup.deleteMetadataBackup",
    Delete,
    description="delete Metadata backup",
    changes=True,
    result={"type": "boolean"},
)
async def delete(context: Context, params: Delete) -> None:
    async with context.services.remote(params.remote, create=False) as remote:
        await delete_metadata_backup(remote, params.backup_id, wait=_LOCK_WAIT)


class ListBackups(Params):
    remotes: dict[str, dict[str, Any]]


@methods.method(
    "backup.listPoolMetadataBackups",
    ListBackups,
    description="list pool metadata backups",
    result={
        "type": "object",
        "description": "remote id → pool uuid → backups, oldest first; a remote that fails is"
        " absent",
    },
)
async def list_pools(
    context: Context, params: ListBackups
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return await _of_each(context, params.remotes, list_pool_backups)


@methods.method(
    "backup.listXoMetadataBackups",
    ListBackups,
    description="list XO metadata backups",
    result={
        "type": "object",
        "description": "remote id → backups, oldest first; a remote that fails is absent",
    },
)
async def list_configs(context: Context, params: ListBackups) -> dict[str, list[dict[str, Any]]]:
    return await _of_each(context, params.remotes, list_config_backups)


async def _of_each(
    context: Context,
    remotes: Mapping[str, Mapping[str, Any]],
    read: Callable[[Remote], Awaitable[T]],
) -> dict[str, T]:
    found: dict[str, T] = {}

    async def one(remote_id: str, spec: Mapping[str, Any]) -> None:
        try:
            async with context.services.remote(spec, create=False) as remote:
                found[remote_id] = await read(remote)
        except ProxyError as error:
            # XO shows what it gets: one dead remote must not hide the others' backups.
            _log.warning("a remote could not be listed", remote=remote_id, error=error.message)

    async with trio.open_nursery() as nursery:
        for remote_id, spec in remotes.items():
            nursery.start_soon(one, remote_id, spec)
    return {remote_id: found[remote_id] for remote_id in remotes if remote_id in found}


class Restore(Params, kw_only=True):
    backup_id: str
    remote: dict[str, Any]
    xapi: dict[str, Any] | UnsetType = UNSET
    dry_run: bool = False


@methods.method(
    "backup.restoreMetadataBackup",
    Restore,
    description="restore a metadata backup",
    changes=True,
    result={
        "type": "object",
        "description": "log records; the result of the root's end is the host's answer, or the"
        " configuration",
        "x-stream": "ndjson",
    },
)
async def restore(context: Context, params: Restore) -> AsyncIterator[bytes]:
    """Always streams the log, as XO expects.  A client that leaves does not stop the restore."""
    task = await context.services.start_metadata_restore(
        MetadataRestoreRequest(
            backup_id=params.backup_id,
            remote=params.remote,
            xapi=None if params.xapi is UNSET else params.xapi,
            dry_run=params.dry_run,
        )
    )
    return context.services.tasks.watch(task)
