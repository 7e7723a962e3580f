"""The VM of a health check: made from a backup or a replica, booted once, always destroyed."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from proxy.errors import Corrupt, ProxyError, Unreachable, XapiError
from proxy.jobs.undo import undo_step
from proxy.runtime.deadlines import undo_within
from proxy.xapi import guest, ownership, vms
from proxy.xapi.together import all_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from proxy.tasks import Task
    from proxy.xapi import Xapi

NAME: Final = "Health Check - "
"""In front of the name of the VM that is tested."""
TAG: Final = "xo:no-bak=Health Check"
"""Xen Orchestra's jobs over all VMs leave a VM with it out."""
_DESTROY_SECONDS: Final = 600.0
_AGAIN_SECONDS: Final = 5.0
_PASSING: Final = frozenset({"OTHER_OPERATION_IN_PROGRESS", "VM_BAD_POWER_STATE"})
"""What a host answers while a start that was given up still goes on."""
_BLOCKED_FOR_USERS: Final = ("start", "start_on")


@dataclass(slots=True)
class TrialVm:
    """What there is of a health check's VM; all of it goes at the end (see :func:`trial_vm`)."""

    xapi: Xapi
    marks: Mapping[str, str]
    """Of the installation and the run."""
    vm_ref: str | None = None
    vdi_refs: list[str] = field(default_factory=list[str])
    """Disks that may not be the VM's yet."""

    async def dress(self, vm_ref: str, name: str) -> None:
        """Take a VM that was just made for the trial: nobody's replica, free to start, ours.

        Until it has its name, which comes last, it is the half-made VM that it was.
        """
        self.vm_ref = vm_ref
        xapi = self.xapi
        await xapi.call("VM.add_tags", vm_ref, TAG)
        vm = await xapi.record("VM", vm_ref)
        if vm.get("ha_always_run"):
            await xapi.call("VM.set_ha_always_run", vm_ref, False)
        if vm.get("ha_restart_priority"):
            await xapi.call("VM.set_ha_restart_priority", vm_ref, "")
        await ownership.forget_interventions(xapi, vm_ref)
        await ownership.mark_trial(xapi, vm_ref, self.marks)
        blocked: Mapping[str, str] = vm.get("blocked_operations") or {}
        freed = {operation: None for operation in _BLOCKED_FOR_USERS if operation in blocked}
        await xapi.update_map("VM", vm_ref, "blocked_operations", freed)
        await xapi.call("VM.set_name_label", vm_ref, f"{NAME}{name}")


@contextlib.asynccontextmanager
async def trial_vm(xapi: Xapi, marks: Mapping[str, str]) -> AsyncIterator[TrialVm]:
    """A trial for the block; what is in it afterwards is destroyed, shielded and bounded.

    After an error or a cancel a destruction that fails is told; else it is raised, since a VM
    that stays is a failed check.  What stays carries the run's marks: once the run has failed
    it is swept at the next contact.
    """
    trial = TrialVm(xapi, marks)
    try:
        yield trial
    except BaseException:
        async with undo_step("destroy the VM of the health check", _DESTROY_SECONDS):
            await _destroy(trial)
        raise
    with undo_within("destroy the VM of the health check", _DESTROY_SECONDS):
        await _destroy(trial)


async def _destroy(trial: TrialVm) -> None:
    """All of it, whatever becomes of a part; raises the first error."""
    errors: list[ProxyError] = []
    if trial.vm_ref is not None:
        errors += await all_of(partial(_destroy_vm, trial.xapi), [trial.vm_ref])
    errors += await all_of(partial(vms.destroy_vdi, trial.xapi), trial.vdi_refs)
    if errors:
        raise errors[0]


async def _destroy_vm(xapi: Xapi, vm_ref: str) -> None:
    while True:
        try:
            await vms.destroy_vm(xapi, vm_ref, bypass_blocked=True)
        except XapiError as error:
            if error.code not in _PASSING:
                raise
        else:
            return
        await trio.sleep(_AGAIN_SECONDS)


async def boot(parent: Task, xapi: Xapi, vm_ref: str, seconds: float) -> None:
    """Start the VM, on no network, and wait until its guest is up: the task ``vmstart``.

    All of it within ``seconds``.  The guest is up when its tools have reported and, on a VM
    with :data:`guest.SCRIPT_TAG`, its own test was a success.  Raises ``Unreachable``
    (``ETIMEDOUT``) naming what it waited for, ``Conflict`` when the VM stops, ``Corrupt`` when
    the guest's test says so, and the host's error when it does not start.
    """
    async with parent.child("vmstart") as task:
        await _on_no_network(task, xapi, vm_ref)
        vm = await xapi.record("VM", vm_ref)
        uuid = str(vm["uuid"])
        with_script = guest.SCRIPT_TAG in vm.get("tags", ())
        if with_script:
            await guest.plan_script(xapi, vm_ref)
        budget = _Budget(uuid, seconds)
        with budget.spent_on(f"VM {uuid} not started after {seconds:g} second", "start"):
            # bounded by the budget
            await xapi.call_async("VM.start", vm_ref, False, False, timeout=math.inf)
        with budget.spent_on(
            f"the host does not say that the VM {uuid} runs after {seconds:g} second", "running"
        ):
            await guest.running(xapi, vm_ref)
        with budget.spent_on(
            f"the VM {uuid} runs, but the Xen tools of its guest did not report within"
            f" {seconds:g} second: check that they are installed, and up to date",
            "tools",
        ):
            await guest.tools_seen(xapi, vm_ref)
        if with_script:
            await _wait_script(task, xapi, vm_ref, budget)


async def _on_no_network(task: Task, xapi: Xapi, vm_ref: str) -> None:
    """A suspended VM would come back on its networks, with the addresses of the one it is of."""
    if (await xapi.record("VM", vm_ref))["power_state"] != "Halted":
        task.info("the memory in the backup is not used: the VM starts from its disks")
        await xapi.update_map("VM", vm_ref, "blocked_operations", {"hard_shutdown": None})
        await xapi.call_async("VM.hard_shutdown", vm_ref)
    await guest.remove_interfaces(xapi, vm_ref)


async def _wait_script(task: Task, xapi: Xapi, vm_ref: str, budget: _Budget) -> None:
    uuid = budget.uuid
    with budget.spent_on(
        f"the health check script of the guest of the VM {uuid} did not end within"
        f" {budget.seconds:g} second",
        "script",
    ):
        result = await guest.script_result(xapi, vm_ref)
    if result.succeeded:
        task.info("Backup health check script successfully executed")
        return
    reason = f" with message {result.message}" if result.message else ""
    raise Corrupt(
        f"Backup health check script failed{reason} for VM {uuid} ",  # the space too is upstream's
        code="EHEALTHSCRIPT",
        data={"id": uuid, "reason": result.message},
    )


class _Budget:
    """The time of all phases together."""

    def __init__(self, uuid: str, seconds: float) -> None:
        self.uuid = uuid
        self.seconds = seconds
        self._ends_at = trio.current_time() + seconds

    @contextlib.contextmanager
    def spent_on(self, message: str, phase: str) -> Iterator[None]:
        """Raise ``message`` when the budget is spent before the block has ended."""
        with trio.CancelScope(deadline=self._ends_at) as scope:
            yield
        if scope.cancelled_caught:
            data: dict[str, Any] = {"id": self.uuid, "phase": phase, "seconds": self.seconds}
            raise Unreachable(message, code="ETIMEDOUT", data=data)
