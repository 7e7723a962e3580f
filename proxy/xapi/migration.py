"""Keeping a VM where it is while it is backed up."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from proxy.errors import ProxyError, XapiError
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble
from proxy.xapi import ownership

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.xapi.client import Xapi
    from proxy.xapi.ownership import Owner


REASON: Final = "VM migration is blocked during backup"
OPERATIONS: Final = ("pool_migrate", "migrate_send")
UNDO_SECONDS: Final = 60.0
_LONGEST_RUN_SECONDS: Final = 30 * 86400.0


@asynccontextmanager
async def block_migration(xapi: Xapi, vm_ref: str) -> AsyncIterator[None]:
    """Block ``pool_migrate`` and ``migrate_send`` on a VM for the time of the block.

    What somebody else has blocked already keeps their reason and stays.  The run that acts
    (:func:`ownership.acting_for`) is marked on the VM first, so that a crash can be told; the
    block is lifted when no other run that may be alive is marked there.  An entry with our reason
    and without a mark is what a crash left, and goes too.  The undo is shielded and bounded; its
    failure is logged, never raised.
    """
    owner = ownership.present_owner()
    vm = await xapi.record("VM", vm_ref)
    try:
        if owner is not None:
            mark = f"{owner.installation}/{vm['uuid']}"
            await xapi.update_map(
                "VM", vm_ref, "other_config", {ownership.BLOCKED + owner.run: mark}
            )
        await _block(xapi, vm_ref, vm)
        yield
    finally:
        try:
            with undo_within("migration: unblock", UNDO_SECONDS):
                await unblock_migration(xapi, vm_ref, owner)
        except ProxyError as error:
            if not (isinstance(error, XapiError) and error.code == "HANDLE_INVALID"):
                tell_trouble("could not unblock migration", error, vm=vm_ref)


async def forget_block(xapi: Xapi, vm_ref: str) -> None:
    """Take our block off a VM that was made of an archive: an export without a snapshot has it."""
    vm = await xapi.record("VM", vm_ref)
    present: dict[str, str] = vm.get("blocked_operations") or {}
    ours: dict[str, str | None] = {op: None for op in OPERATIONS if present.get(op) == REASON}
    await xapi.update_map("VM", vm_ref, "blocked_operations", ours)


async def _block(xapi: Xapi, vm_ref: str, vm: dict[str, Any]) -> None:
    present: dict[str, str] = vm.get("blocked_operations") or {}
    for operation in OPERATIONS:
        if operation in present:
            continue
        try:
            await xapi.call("VM.add_to_blocked_operations", vm_ref, operation, REASON)
        except XapiError as error:
            if error.code != "MAP_DUPLICATE_KEY":  # somebody blocks it at this moment: so be it
                raise


async def unblock_migration(xapi: Xapi, vm_ref: str, owner: Owner | None) -> bool:
    """Take back what :func:`block_migration` did for ``owner``; whether migration is free of us.

    While other runs are marked on the VM only the mark of this one goes.  The mark goes last:
    a crash in between leaves what can be told.
    """
    vm = await xapi.record("VM", vm_ref)
    free = not _others(vm, owner)
    if free:
        present: dict[str, str] = vm.get("blocked_operations") or {}
        ours = [operation for operation in OPERATIONS if present.get(operation) == REASON]
        await xapi.update_map("VM", vm_ref, "blocked_operations", dict.fromkeys(ours))
    if owner is not None:
        await xapi.update_map("VM", vm_ref, "other_config", {ownership.BLOCKED + owner.run: None})
    if not free:
        return False
    # Another run may have come meanwhile, and found the operations blocked.
    vm = await xapi.record("VM", vm_ref)
    if _others(vm, owner):
        await _block(xapi, vm_ref, vm)
        return False
    # Hosts do not always derive the allowed operations again by themselves.
    await xapi.call("VM.update_allowed_operations", vm_ref)
    return True


def _others(vm: dict[str, Any], owner: Owner | None) -> list[Owner]:
    return [
        other
        for other in ownership.blocked_by(vm)
        if other != owner and ownership.may_live(other) and not _is_over(other.run)
    ]


def _is_over(run: str) -> bool:
    """Whether no run can be that old, be its installation gone for good.

    The id of a run begins with its start in milliseconds, in base 36.
    """
    try:
        started = int(run.partition("-")[0], 36) / 1000
    except ValueError:
        return True
    return time.time() - started > _LONGEST_RUN_SECONDS


__all__ = ["OPERATIONS", "REASON", "block_migration", "forget_block", "unblock_migration"]
