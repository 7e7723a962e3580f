"""Watching a guest come up, and the test that it can run of itself.

The test is a protocol between a backup and a script in the guest, over the guest's part of
xenstore (``VM.xenstore_data``): at its boot the script looks at :data:`STATE`; only when it is
``planned`` it runs, writes ``running`` if it likes, and ``success`` or ``failure`` at its end,
with an explanation under :data:`ERROR`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from proxy.errors import Conflict, ProxyError, XapiError
from proxy.xapi import vms
from proxy.xapi.together import together

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.xapi.client import Xapi

SCRIPT_TAG: Final = "xo-backup-health-check-xenstore"
"""On a VM whose guest has such a script."""
STATE: Final = "vm-data/xo-backup-health-check"
ERROR: Final = f"{STATE}-error"
_ENDED: Final = frozenset({"success", "failure"})
_LONGEST_ERROR: Final = 1000
"""Characters: a guest may write anything."""
_REPLACED_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class ScriptResult:
    """What the guest said of itself."""

    succeeded: bool
    message: str


async def remove_interfaces(xapi: Xapi, vm_ref: str) -> None:
    """Take a halted VM off every network, and see that it is; ``Conflict`` when it is not."""
    vm = await xapi.record("VM", vm_ref)
    interfaces = [ref for ref in vm.get("VIFs", []) if vms.is_ref(ref)]
    await together(partial(vms.call_unless_gone, xapi, "VIF.destroy"), interfaces)
    if await xapi.call("VM.get_VIFs", vm_ref):
        raise Conflict(
            f"the VM {vm['uuid']} still has a network interface: it is not started",
            code="EVIF",
            data={"id": vm["uuid"]},
        )


async def plan_script(xapi: Xapi, vm_ref: str) -> None:
    """Tell the guest of a halted VM to test itself at its next boot.

    What else its ``xenstore_data`` holds stays, as the guest may need it; the answer of an
    earlier test, which a copy brings along, does not.
    """
    await xapi.update_map("VM", vm_ref, "xenstore_data", {ERROR: None, STATE: "planned"})


async def running(xapi: Xapi, vm_ref: str) -> None:
    """Return when the host says that the VM runs; no time limit of its own."""
    await xapi.await_record("VM", vm_ref, lambda vm: vm["power_state"] == "Running")


async def tools_seen(xapi: Xapi, vm_ref: str) -> None:
    """Return when the guest's tools have reported to the host; no time limit.

    Call it for a VM that runs: a host forgets what an earlier life reported when it starts one.
    Raises ``Conflict`` when the VM stops.
    """
    failures: list[ProxyError] = []

    async def unless_stopped() -> None:
        try:
            vm = await xapi.await_record("VM", vm_ref, lambda vm: not _runs(vm))
            failures.append(_stopped(vm))
        except ProxyError as error:
            failures.append(error)
        nursery.cancel_scope.cancel("the VM stopped")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(unless_stopped)
        try:
            await _tools_seen(xapi, vm_ref)
        except ProxyError as error:
            failures.append(error)
        nursery.cancel_scope.cancel("seen")
    if failures:
        raise failures[0]


async def _tools_seen(xapi: Xapi, vm_ref: str) -> None:
    while True:
        vm = await xapi.await_record("VM", vm_ref, lambda vm: vms.is_ref(vm.get("guest_metrics")))
        try:
            await xapi.await_record(
                "VM_guest_metrics",
                str(vm["guest_metrics"]),
                lambda metrics: bool(metrics.get("PV_drivers_detected")),
            )
        except XapiError as error:
            # A host makes a new record when it finds one that is older than the boot.
            if error.code != "HANDLE_INVALID":
                raise
            await trio.sleep(_REPLACED_SECONDS)
        else:
            return


async def script_result(xapi: Xapi, vm_ref: str) -> ScriptResult:
    """What the guest's test said at its end; no time limit.

    Raises ``Conflict`` when the VM stops before.
    """
    vm = await xapi.await_record(
        "VM", vm_ref, lambda vm: script_state(vm) in _ENDED or not _runs(vm)
    )
    state = script_state(vm)
    if state not in _ENDED:
        raise _stopped(vm)
    data: Mapping[str, str] = vm.get("xenstore_data") or {}
    return ScriptResult(state == "success", str(data.get(ERROR, ""))[:_LONGEST_ERROR])


def script_state(vm: Mapping[str, Any]) -> str:
    """How far the guest's test is, by the VM's record; empty when it was never planned."""
    data: Mapping[str, str] = vm.get("xenstore_data") or {}
    return str(data.get(STATE, ""))


def _runs(vm: Mapping[str, Any]) -> bool:
    return vm.get("power_state") == "Running"


def _stopped(vm: Mapping[str, Any]) -> Conflict:
    state = str(vm.get("power_state")).lower()
    return Conflict(
        f"the VM {vm['uuid']} is {state} before its guest was up",
        code="VM_STOPPED",
        data={"id": vm["uuid"], "powerState": state},
    )
