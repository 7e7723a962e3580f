"""Shutting a VM down for its backup, and starting it again whatever happens."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from proxy.jobs.undo import undo_step
from proxy.xapi import ownership, vms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from proxy.jobs.vm_backup import VmBackup
    from proxy.tasks import Task

_START_SECONDS = 600.0
_LATE_HALT_SECONDS = 60.0
"""A guest told to shut down goes on doing so after the host's task was cancelled."""
_POLL_SECONDS = 1.0


@contextlib.asynccontextmanager
async def restarted(
    task: Task, backup: VmBackup, *, needed: bool
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Start the VM again at the end of the block, also after a failure or a cancel.

    Yields a function that starts it earlier.  The VM carries our mark meanwhile, by which
    :func:`start_left_off` recognises it after a crash.  A VM that is not halted is left alone.
    """
    if not needed:
        yield trio.lowlevel.checkpoint
        return
    xapi, vm_ref = backup.xapi, backup.vm_ref
    finished = False

    async def start_now() -> None:
        nonlocal finished
        await vms.start(xapi, vm_ref)
        finished = True

    owner = ownership.Owner(backup.installation, backup.run_id)
    mark = ownership.shut_down_mark(owner, backup.uuid)
    try:
        await xapi.update_map("VM", vm_ref, "other_config", {ownership.SHUT_DOWN: mark})
        yield start_now
    finally:
        async with undo_step("start the VM again", _START_SECONDS):
            if not finished and await _halted_soon(backup):
                await vms.start(xapi, vm_ref)
            await xapi.update_map("VM", vm_ref, "other_config", {ownership.SHUT_DOWN: None})


async def start_left_off(task: Task, backup: VmBackup) -> bool:
    """Start a VM that a run of ours shut down before it was killed; whether it was so.

    Only one that is still halted and carries the mark of a run of this installation that is
    not alive: a VM that somebody else keeps halted stays so, with another's mark on it too.
    """
    owner = ownership.shut_down_by(backup.vm)
    if owner is None or owner.installation != backup.installation:
        return False
    if backup.is_live_run(owner.run):
        return False
    halted = backup.vm.get("power_state") == "Halted"
    if halted:
        task.warning(
            "an interrupted run left the VM shut down: it is started again", {"run": owner.run}
        )
        await vms.start(backup.xapi, backup.vm_ref)
    await backup.xapi.update_map("VM", backup.vm_ref, "other_config", {ownership.SHUT_DOWN: None})
    return halted


async def _halted_soon(backup: VmBackup) -> bool:
    with trio.move_on_after(_LATE_HALT_SECONDS):
        while True:
            record = await backup.xapi.record("VM", backup.vm_ref)
            if record["power_state"] == "Halted":
                return True
            if "clean_shutdown" not in record.get("current_operations", {}).values():
                return False
            await trio.sleep(_POLL_SECONDS)
    return False


async def shut_down(backup: VmBackup) -> None:
    """Ask the guest to shut down and wait until it has."""
    await vms.clean_shutdown(backup.xapi, backup.vm_ref)
