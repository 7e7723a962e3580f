"""Keeping a VM where it is while it is backed up."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from proxy.errors import ProxyError, XapiError
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.xapi.client import Xapi


REASON: Final = "VM migration is blocked during backup"
OPERATIONS: Final = ("pool_migrate", "migrate_send")
UNDO_SECONDS: Final = 60.0


@asynccontextmanager
async def block_migration(xapi: Xapi, vm_ref: str) -> AsyncIterator[None]:
    """Block ``pool_migrate`` and ``migrate_send`` on a VM for the time of the block.

    Afterwards the former reasons are back; a reason equal to ours is what a crash left, and
    is cleared.  An entry that somebody else changed meanwhile is theirs and stays.  The undo
    is shielded and bounded; its failure is logged, never raised.
    """
    vm = await xapi.record("VM", vm_ref)
    present: dict[str, str] = vm.get("blocked_operations") or {}
    former: dict[str, str | None] = {
        operation: None if present.get(operation) == REASON else present.get(operation)
        for operation in OPERATIONS
    }
    try:
        changes = {op: REASON for op in OPERATIONS if present.get(op) != REASON}
        await xapi.update_map("VM", vm_ref, "blocked_operations", changes)
        yield
    finally:
        try:
            with undo_within("migration: unblock", UNDO_SECONDS):
                await _restore(xapi, vm_ref, former)
        except ProxyError as error:
            if not (isinstance(error, XapiError) and error.code == "HANDLE_INVALID"):
                tell_trouble("could not unblock migration", error, vm=vm_ref)


async def forget_block(xapi: Xapi, vm_ref: str) -> None:
    """Take our block off a VM that was made of an archive: an export without a snapshot has it."""
    vm = await xapi.record("VM", vm_ref)
    present: dict[str, str] = vm.get("blocked_operations") or {}
    ours: dict[str, str | None] = {op: None for op in OPERATIONS if present.get(op) == REASON}
    await xapi.update_map("VM", vm_ref, "blocked_operations", ours)


async def _restore(xapi: Xapi, vm_ref: str, former: dict[str, str | None]) -> None:
    vm = await xapi.record("VM", vm_ref)
    present: dict[str, str] = vm.get("blocked_operations") or {}
    # An entry is missing when a cancel came between its removal and its new value.
    ours = {op: old for op, old in former.items() if present.get(op) in (REASON, None)}
    changes = {op: old for op, old in ours.items() if present.get(op) != old}
    await xapi.update_map("VM", vm_ref, "blocked_operations", changes)
    # Hosts do not always derive the allowed operations again by themselves.
    await xapi.call("VM.update_allowed_operations", vm_ref)
