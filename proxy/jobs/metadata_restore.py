"""Restoring a metadata backup: a pool's database onto its hosts, a configuration to its caller."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.errors import Corrupt
from proxy.jobs.restore import send_file
from proxy.repository.metadata_backup_paths import BINARY_DATA, data_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.remotes import Remote
    from proxy.tasks import Task
    from proxy.xapi import Upload, Xapi

_LARGEST_CONFIGURATION = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class MetadataRestoreRequest:
    """``backup.restoreMetadataBackup`` as received; ``remote`` and ``xapi`` hold credentials."""

    backup_id: str
    remote: Mapping[str, Any]
    xapi: Mapping[str, Any] | None = None
    dry_run: bool = False
    """Of a pool: the host looks whether it would take the database, and changes nothing."""


async def restore_pool(task: Task, remote: Remote, path: str, xapi: Xapi, *, dry_run: bool) -> Any:
    """Send the database to the pool's master, which reboots when it took it.

    Answers what the host answered: an empty text as result of a restore, ``{accepted, answer}`` of
    a dry run.  Raises the host's reason when it refuses.  A cancel before the last byte was
    sent restores nothing; after it the host goes on, and a warning tells what it did.
    """
    upload: Upload | None = None
    try:
        async with remote.open_read(f"{path}/{BINARY_DATA}") as file:
            if file.size == 0:
                raise Corrupt(f"the database in {path} is empty", data={"path": path})
            async with xapi.import_pool(length=file.size, dry_run=dry_run) as upload:
                await send_file(task, file, upload)
                answer = str(await upload.finish() or "")
    except BaseException:
        if upload is not None and upload.succeeded and not dry_run:
            task.warning(
                "the host had the whole database already: it has restored it and reboots",
                {"path": path},
            )
        raise
    task.complete_progress()
    return {"accepted": True, "answer": answer} if dry_run else answer


async def read_configuration(
    remote: Remote, path: str, metadata: Mapping[str, Any]
) -> str | dict[str, str]:
    """The configuration as Xen Orchestra imports it: text, or ``{encoding, data}`` for bytes."""
    name = data_name(metadata.get("data"))
    if name is None:
        raise Corrupt(f"the metadata of {path} names no data beside it", data={"path": path})
    content = await remote.read_file(f"{path}/{name}", limit=_LARGEST_CONFIGURATION)
    if not name.endswith(".json"):
        return {"encoding": "base64", "data": base64.b64encode(content).decode()}
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Corrupt(f"the configuration in {path} is no text", data={"path": path}) from error
