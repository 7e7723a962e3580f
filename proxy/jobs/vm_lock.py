"""Holding a VM's directory on a remote in a run, which tells when it has to wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.repository import lock_vm

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from proxy.errors import Busy
    from proxy.remotes import Lock, Remote
    from proxy.tasks import Task


def hold_vm(
    remote: Remote, vm_uuid: str, *, task: Task, remote_id: str, owner: str, wait: float
) -> AbstractAsyncContextManager[Lock]:
    """:func:`proxy.repository.lock_vm` for the run ``owner``; ``task`` hears for whom it waits."""

    def tell(busy: Busy) -> None:
        """Else a run that waits looks like one that hangs."""
        task.info(
            "waiting for whoever holds the VM's backups",
            {"remote": remote_id, "reason": busy.message, **busy.data},
        )

    return lock_vm(remote, vm_uuid, owner=owner, wait=wait, waiting=tell)
