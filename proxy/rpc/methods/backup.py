"""``backup.*``: runs, restores, and what the remotes hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import structlog
import trio
from msgspec import UNSET, Meta, UnsetType

from proxy.errors import ProxyError, Refused
from proxy.jobs.requests import BackupRequest, RestoreRequest
from proxy.jobs.verify_run import VerifyRequest
from proxy.repository import (
    delete_backups,
    format_listing,
    list_all,
    list_vm_backups,
    vm_directory,
)
from proxy.repository.immutability import with_protection
from proxy.rpc.registry import Params, Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.repository import Backup
    from proxy.rpc.context import Context

methods = Registry()

_log = structlog.get_logger("backup")

_LOCK_WAIT = 30.0
"""Seconds that a deletion waits for a run on the same VM: XO gives a call up after 60."""

TASK_OR_LOG: dict[str, Any] = {
    "oneOf": [
        {"type": "string", "description": "the root task's id"},
        {"type": "object", "description": "with streamLogs: log records", "x-stream": "ndjson"},
    ]
}


class DeleteOne(Params):
    filename: str
    remote: dict[str, Any]


class DeleteMany(Params):
    filenames: list[str]
    remote: dict[str, Any]


@methods.method(
    "backup.deleteVmBackup",
    DeleteOne,
    description="delete VM backup",
    changes=True,
    result={"type": "boolean"},
)
async def delete_one(context: Context, params: DeleteOne) -> None:
    await _delete(context, params.remote, [params.filename])


@methods.method(
    "backup.deleteVmBackups",
    DeleteMany,
    description="delete VM backups",
    changes=True,
    result={"type": "boolean"},
)
async def delete_many(context: Context, params: DeleteMany) -> None:
    await _delete(context, params.remote, params.filenames)


async def _delete(context: Context, spec: Mapping[str, Any], filenames: list[str]) -> None:
    async with context.services.remote(spec, create=False) as remote:
        await delete_backups(remote, filenames, wait=_LOCK_WAIT)


class Import(Params, kw_only=True):
    backup_id: str
    remote: dict[str, Any]
    settings: dict[str, Any] | UnsetType = UNSET
    sr_uuid: str
    stream_logs: bool = False
    xapi: dict[str, Any]


@methods.method(
    "backup.importVmBackup",
    Import,
    description="create a new VM from a backup",
    changes=True,
    result=TASK_OR_LOG,
)
async def import_vm_backup(context: Context, params: Import) -> str | AsyncIterator[bytes]:
    """Restore.  Without ``streamLogs`` the task's id is the answer, at once."""
    settings: dict[str, Any] = {} if params.settings is UNSET else dict(params.settings)
    tag = settings.pop("additionalVmTag", None)
    srs = settings.pop("mapVdisSrs", None)
    if srs is not None and not _is_map_of_srs(srs):
        raise Refused("mapVdisSrs must give an SR's uuid or null for each disk", code="EINVAL")
    request = RestoreRequest(
        backup_id=params.backup_id,
        remote=params.remote,
        sr_uuid=params.sr_uuid,
        xapi=params.xapi,
        new_mac_addresses=settings.pop("newMacAddresses", False) is True,
        additional_vm_tag=tag if isinstance(tag, str) else None,
        map_vdis_srs=srs or {},
        use_differential_restore=settings.pop("useDifferentialRestore", False) is True,
        ignored=tuple(sorted(key for key, value in settings.items() if value)),
    )
    task = await context.services.start_restore(request)
    return context.services.tasks.watch(task) if params.stream_logs else task.id


def _is_map_of_srs(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    srs = cast("dict[str, Any]", value).values()
    return all(sr is None or isinstance(sr, str) for sr in srs)


class ListVmBackups(Params):
    remotes: dict[str, dict[str, Any]]
    vm_id: str | UnsetType = UNSET


@methods.method(
    "backup.listVmBackups",
    ListVmBackups,
    description="list VM backups",
    result={
        "type": "object",
        "description": "remote id → VM uuid → backups, oldest first; a remote that fails is absent",
    },
)
async def list_backups(
    context: Context, params: ListVmBackups
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    if params.vm_id is not UNSET:
        vm_directory(params.vm_id)  # a wrong id is the caller's mistake and no remote's trouble
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}

    async def one(remote_id: str, spec: Mapping[str, Any]) -> None:
        try:
            async with context.services.remote(spec, create=False) as remote:
                by_vm: dict[str, list[Backup]]
                if params.vm_id is UNSET:
                    by_vm = await list_all(remote)
                else:
                    by_vm = {params.vm_id: await list_vm_backups(remote, params.vm_id)}
                by_vm = await with_protection(remote, by_vm)
        except ProxyError as error:
            # XO shows what it gets: one dead remote must not hide the others' backups.
            _log.warning("a remote could not be listed", remote=remote_id, error=error.message)
            return
        found[remote_id] = {
            vm: [format_listing(backup, remote_id) for backup in backups]
            for vm, backups in by_vm.items()
        }

    async with trio.open_nursery() as nursery:
        for remote_id, spec in params.remotes.items():
            nursery.start_soon(one, remote_id, spec)
    return {remote_id: found[remote_id] for remote_id in params.remotes if remote_id in found}


class NoParams(Params):
    pass


@methods.method(
    "backup.listRunningJobs",
    NoParams,
    description="returns a list of running jobs",
    result={"type": "string", "x-stream": "ndjson"},
)
def list_running_jobs(context: Context, _: NoParams) -> list[str]:
    return context.services.running_jobs()


class RunJob(Params):
    job: dict[str, Any]
    remotes: dict[str, Any]
    schedule: dict[str, Any]
    xapis: dict[str, Any] | UnsetType = UNSET
    job_data: dict[str, Any] | UnsetType = UNSET
    record_to_xapi: dict[str, Any] | UnsetType = UNSET
    stream_logs: bool = False


@methods.method(
    "backup.run", RunJob, description="run a backup job", changes=True, result=TASK_OR_LOG
)
async def run_job(context: Context, params: RunJob) -> str | AsyncIterator[bytes]:
    """Begin a run.  Without ``streamLogs`` the task's id is the answer, at once."""
    request = BackupRequest(
        job=params.job,
        schedule=params.schedule,
        remotes=params.remotes,
        xapis={} if params.xapis is UNSET else params.xapis,
        record_to_xapi={} if params.record_to_xapi is UNSET else params.record_to_xapi,
        job_data={} if params.job_data is UNSET else params.job_data,
    )
    await trio.lowlevel.checkpoint()
    task = context.services.start_backup(request)
    return context.services.tasks.watch(task) if params.stream_logs else task.id


class Verify(Params):
    remote: dict[str, Any]
    vm_id: str | UnsetType = UNSET
    filename: str | UnsetType = UNSET
    level: Literal["structure", "read"] = "structure"
    sample: Annotated[float, Meta(gt=0, le=1)] | UnsetType = UNSET


@methods.method(
    "backup.verify",
    Verify,
    description="look at backups: can they be restored?",
    result={
        "type": "object",
        "description": "start, then a report of each disk and backup, then summary",
        "properties": {"type": {"enum": ["start", "disk", "backup", "summary"]}},
        "required": ["type"],
        "x-stream": "ndjson",
    },
)
async def verify_backups(context: Context, params: Verify) -> AsyncIterator[dict[str, Any]]:
    """Changes nothing: a client that leaves ends it."""
    request = VerifyRequest(
        remote=params.remote,
        vm_uuid=None if params.vm_id is UNSET else params.vm_id,
        filename=None if params.filename is UNSET else params.filename,
        level=params.level,
        sample=None if params.sample is UNSET else params.sample,
    )
    return (await context.services.start_verify(request)).records()
