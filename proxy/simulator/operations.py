"""The named calls that do more than read and write fields: parameters in, effect, value out."""

from __future__ import annotations

import base64
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.errors import XapiError
from proxy.simulator import generic
from proxy.simulator.disks import BLOCK
from proxy.simulator.events import inject
from proxy.simulator.records import SCHEMA, is_null

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.simulator.pool import SimulatedPool

_CBT_GRAIN = 64 * 1024
_BLOCK_BYTES = BLOCK // _CBT_GRAIN // 8
"""Bytes of the bitmap of changes for one block."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A call: how many parameters it takes, and which VM operation it is, if one."""

    function: Callable[..., Any]
    least: int
    most: int
    vm_operation: str | None = None
    with_session: bool = False
    """Its effect depends on the caller's session, which it gets before its parameters."""

    def check_count(self, method: str, params: list[Any]) -> None:
        if not self.least <= len(params) <= self.most:
            wanted = str(self.least if len(params) < self.least else self.most)
            raise XapiError("MESSAGE_PARAMETER_COUNT_MISMATCH", [method, wanted, str(len(params))])


OPERATIONS: dict[str, Operation] = {}


def _operation(
    name: str, vm_operation: str | None = None, *, with_session: bool = False
) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        given = 2 if with_session else 1
        parameters = list(inspect.signature(function).parameters.values())[given:]
        required = [each for each in parameters if each.default is inspect.Parameter.empty]
        OPERATIONS[name] = Operation(
            function, len(required), len(parameters), vm_operation, with_session
        )
        return function

    return register


def method_names() -> list[str]:
    """Everything that ``system.listMethods`` tells."""
    names = set(OPERATIONS)
    names.update(
        f"Async.{name}"
        for name, operation in OPERATIONS.items()
        if name.split(".")[0] in SCHEMA and not operation.with_session
    )
    for kind in SCHEMA:
        names.update(generic.method_names(kind))
    return sorted(names | {"event.from", "session.login_with_password", "session.logout"})


# VM


@_operation("VM.snapshot", "snapshot")
def _snapshot(pool: SimulatedPool, vm: str, name: str, ignore_vdis: Any = ()) -> str:
    return pool.vms.snapshot(vm, name, list(ignore_vdis))


@_operation("VM.checkpoint", "checkpoint")
def _checkpoint(pool: SimulatedPool, vm: str, name: str) -> str:
    return pool.vms.snapshot(vm, name, memory=True)


@_operation("VM.clone", "clone")
def _clone(pool: SimulatedPool, vm: str, name: str) -> str:
    return pool.vms.clone(vm, name)


@_operation("VM.copy", "copy")
def _copy(pool: SimulatedPool, vm: str, name: str, sr: str) -> str:
    return pool.vms.clone(vm, name, None if is_null(sr) else sr)


@_operation("VM.start", "start")
def _start(pool: SimulatedPool, vm: str, paused: Any = False, force: Any = False) -> None:
    del force
    pool.vms.start(vm, paused=bool(paused))


@_operation("VM.clean_shutdown", "clean_shutdown")
def _clean_shutdown(pool: SimulatedPool, vm: str) -> None:
    pool.vms.halt(vm)


@_operation("VM.hard_shutdown", "hard_shutdown")
def _hard_shutdown(pool: SimulatedPool, vm: str) -> None:
    pool.vms.halt(vm)


@_operation("VM.suspend", "suspend")
def _suspend(pool: SimulatedPool, vm: str) -> None:
    pool.vms.suspend(vm)


@_operation("VM.resume", "resume")
def _resume(pool: SimulatedPool, vm: str, paused: Any = False, force: Any = False) -> None:
    del paused, force
    pool.vms.resume(vm)


@_operation("VM.destroy", "destroy")
def _vm_destroy(pool: SimulatedPool, vm: str) -> None:
    pool.vms.destroy(vm)


@_operation("VM.create")
def _vm_create(pool: SimulatedPool, record: dict[str, Any]) -> str:
    return pool.vms.create(record)


@_operation("VM.update_allowed_operations")
def _update_allowed(pool: SimulatedPool, vm: str) -> None:
    pool.vms.refresh(vm)


@_operation("VM.get_allowed_VBD_devices")
def _vbd_devices(pool: SimulatedPool, vm: str) -> list[str]:
    return pool.devices.free(vm, "VBD")


@_operation("VM.get_allowed_VIF_devices")
def _vif_devices(pool: SimulatedPool, vm: str) -> list[str]:
    return pool.devices.free(vm, "VIF")


@_operation("VM.set_memory_limits")
def _memory(pool: SimulatedPool, vm: str, low: Any, high: Any, least: Any, most: Any) -> None:
    pool.vms.set_memory(vm, int(low), int(high), int(least), int(most))


@_operation("VM.set_VCPUs_max")
def _processors(pool: SimulatedPool, vm: str, number: Any) -> None:
    pool.vms.set_processors(vm, most=int(number))


@_operation("VM.set_VCPUs_at_startup")
def _processors_at_startup(pool: SimulatedPool, vm: str, number: Any) -> None:
    pool.vms.set_processors(vm, at_startup=int(number))


@_operation("VM.set_bios_strings")
def _bios_strings(pool: SimulatedPool, vm: str, strings: dict[str, str]) -> None:
    pool.vms.set_bios_strings(vm, strings)


@_operation("VM.set_is_a_template")
def _set_template(pool: SimulatedPool, vm: str, value: Any) -> None:
    pool.store.update("VM", vm, is_a_template=value)
    pool.vms.refresh(vm)


# VDI


@_operation("VDI.snapshot")
def _vdi_snapshot(pool: SimulatedPool, vdi: str, options: Any = None) -> str:
    return pool.disks.snapshot(vdi, options)


@_operation("VDI.clone")
def _vdi_clone(pool: SimulatedPool, vdi: str, options: Any = None) -> str:
    del options
    return pool.disks.clone(vdi)


@_operation("VDI.copy")
def _vdi_copy(pool: SimulatedPool, vdi: str, sr: str) -> str:
    return pool.disks.clone(vdi, sr)


@_operation("VDI.create")
def _vdi_create(pool: SimulatedPool, record: dict[str, Any]) -> str:
    return pool.disks.create_empty(record)


@_operation("VDI.resize")
def _vdi_resize(pool: SimulatedPool, vdi: str, size: Any) -> None:
    pool.disks.resize(vdi, int(size))


@_operation("VDI.destroy")
def _vdi_destroy(pool: SimulatedPool, vdi: str) -> None:
    pool.disks.destroy(vdi)


@_operation("VDI.data_destroy")
def _vdi_data_destroy(pool: SimulatedPool, vdi: str) -> None:
    pool.disks.data_destroy(vdi)


@_operation("VDI.enable_cbt")
def _enable_cbt(pool: SimulatedPool, vdi: str) -> None:
    pool.disks.set_cbt(vdi, enabled=True)


@_operation("VDI.disable_cbt")
def _disable_cbt(pool: SimulatedPool, vdi: str) -> None:
    pool.disks.set_cbt(vdi, enabled=False)


@_operation("VDI.list_changed_blocks")
def _changed_blocks(pool: SimulatedPool, base: str, vdi: str) -> str:
    """Base64 of a bitmap: a bit per 64 KiB, the first in the highest bit."""
    bitmap = bytearray(-(-pool.disks.content(vdi).size // (8 * _CBT_GRAIN)))
    for block in pool.disks.changed_blocks(base, vdi):
        for at in range(block * _BLOCK_BYTES, min((block + 1) * _BLOCK_BYTES, len(bitmap))):
            bitmap[at] = 0xFF
    return base64.b64encode(bitmap).decode()


@_operation("VDI.get_nbd_info", with_session=True)
def _nbd_info(pool: SimulatedPool, session: str, vdi: str) -> list[Any]:
    return pool.nbd.info(session, vdi)


# Drives, networks, devices


@_operation("VBD.create")
def _vbd_create(pool: SimulatedPool, record: dict[str, Any]) -> str:
    return pool.devices.create_vbd(record)


@_operation("VBD.plug")
def _vbd_plug(pool: SimulatedPool, vbd: str) -> None:
    pool.devices.plug_vbd(vbd)


@_operation("VBD.unplug")
def _vbd_unplug(pool: SimulatedPool, vbd: str) -> None:
    pool.devices.unplug_vbd(vbd)


@_operation("VBD.unplug_force")
def _vbd_unplug_force(pool: SimulatedPool, vbd: str) -> None:
    pool.devices.unplug_vbd(vbd)


@_operation("VBD.destroy")
def _vbd_destroy(pool: SimulatedPool, vbd: str) -> None:
    pool.devices.destroy("VBD", vbd)


@_operation("VIF.create")
def _vif_create(pool: SimulatedPool, record: dict[str, Any]) -> str:
    return pool.devices.create_vif(record)


@_operation("VIF.plug")
def _vif_plug(pool: SimulatedPool, vif: str) -> None:
    pool.devices.plug_vif(vif)


@_operation("VIF.unplug")
def _vif_unplug(pool: SimulatedPool, vif: str) -> None:
    pool.devices.plug_vif(vif, attached=False)


@_operation("VIF.destroy")
def _vif_destroy(pool: SimulatedPool, vif: str) -> None:
    pool.devices.destroy("VIF", vif)


@_operation("VTPM.create")
def _vtpm_create(pool: SimulatedPool, vm: str, is_unique: Any = False) -> str:
    return pool.devices.create_vtpm(vm, is_unique=bool(is_unique))


@_operation("VTPM.destroy")
def _vtpm_destroy(pool: SimulatedPool, vtpm: str) -> None:
    pool.devices.destroy_vtpm(vtpm)


@_operation("VTPM.get_contents")
def _vtpm_contents(pool: SimulatedPool, vtpm: str) -> str:
    pool.store.get("VTPM", vtpm)
    return pool.vtpm_contents.get(vtpm, "")


@_operation("VTPM.set_contents")
def _vtpm_set_contents(pool: SimulatedPool, vtpm: str, contents: str) -> None:
    pool.store.get("VTPM", vtpm)
    pool.vtpm_contents[vtpm] = contents


@_operation("VUSB.create")
def _vusb_create(pool: SimulatedPool, vm: str, group: str, config: dict[str, str]) -> str:
    return pool.devices.create_vusb(vm, group, config)


# Tasks, events, hosts


@_operation("task.create")
def _task_create(pool: SimulatedPool, label: str, description: str) -> str:
    return pool.tasks.create(label, description)


@_operation("task.cancel")
def _task_cancel(pool: SimulatedPool, task: str) -> None:
    pool.tasks.cancel(task)


@_operation("task.destroy")
def _task_destroy(pool: SimulatedPool, task: str) -> None:
    pool.tasks.destroy(task)


@_operation("event.inject")
def _inject(pool: SimulatedPool, kind: str, ref: str) -> str:
    return inject(pool.store, kind, ref)


@_operation("host.get_servertime")
def _servertime(pool: SimulatedPool, host: str) -> str:
    pool.store.get("host", host)
    return pool.now()


@_operation("session.get_this_host")
def _this_host(pool: SimulatedPool, _session: str) -> str:
    return pool.master


@_operation("system.isAlive")
def _alive(_pool: SimulatedPool) -> bool:
    return True
