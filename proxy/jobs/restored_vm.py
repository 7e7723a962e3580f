"""What every restored VM gets: a name that tells when it is from, and no trace of its jobs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from proxy.repository import date_name
from proxy.xapi import ownership, vm_create

if TYPE_CHECKING:
    from proxy.jobs.requests import RestoreRequest
    from proxy.repository import BackupRecord
    from proxy.xapi import Xapi


class Dress(Protocol):
    """What is done last, when a restored VM is complete under its temporary name.

    When it returns nobody destroys the VM any more: it gives the VM its name, and takes off the
    marks of the run or hands the VM to somebody who will.
    """

    async def __call__(
        self, xapi: Xapi, vm_ref: str, request: RestoreRequest, record: BackupRecord
    ) -> None: ...


async def dress_restored(
    xapi: Xapi, vm_ref: str, request: RestoreRequest, record: BackupRecord
) -> None:
    """Describe, tag and name the VM, and take off what belongs to its former life.

    Its name comes when all else is done: until then name and marks tell a half-made VM.
    """
    original = record.metadata["vm"]
    name = original.get("name_label")
    if not isinstance(name, str):
        name = vm_create.own_name(await xapi.call("VM.get_name_label", vm_ref))
    description = f"Restored on {date_name(time.time() * 1000)}"
    remote_name = request.remote.get("name")
    if remote_name:
        description += f" from {remote_name}"
    former = original.get("name_description")
    if former and isinstance(former, str):
        description += f" - {former}"
    await xapi.call("VM.add_tags", vm_ref, "restored from backup")
    if request.additional_vm_tag:
        await xapi.call("VM.add_tags", vm_ref, request.additional_vm_tag)
    await xapi.call("VM.set_name_description", vm_ref, description)
    await ownership.forget_interventions(xapi, vm_ref)
    date = date_name(record.backup.timestamp)
    await xapi.call("VM.set_name_label", vm_ref, f"{name} ({date})")
    await ownership.reset_keys(xapi, vm_ref)
