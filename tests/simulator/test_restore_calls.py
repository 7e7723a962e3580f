"""The calls of a delta backup and its restore, by the official Python client: XML-RPC."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
import XenAPI  # type: ignore[import-untyped]

from proxy.simulator import SimulatedPool, serve
from proxy.simulator.disks import BLOCK
from proxy.simulator.operations import method_names

RECORDED = """
    Async.VDI.data_destroy Async.VDI.destroy Async.VDI.enable_cbt Async.VDI.list_changed_blocks
    Async.VM.destroy Async.VM.snapshot PIF.get_all_records SR.get_all_records SR.get_by_uuid
    SR.get_record VBD.create VBD.get_all_records VBD.get_record VDI.add_to_other_config VDI.create
    VDI.get_VBDs VDI.get_all_records VDI.get_cbt_enabled VDI.get_name_label VDI.get_nbd_info
    VDI.get_record VDI.get_sm_config VDI.get_snapshot_of VDI.get_uuid VDI.get_virtual_size
    VDI.remove_from_other_config VDI.set_name_label VIF.create VIF.get_all_records VM.add_tags
    VM.add_to_blocked_operations VM.add_to_other_config VM.create VM.destroy VM.get_VBDs
    VM.get_VTPMs VM.get_all_records VM.get_by_uuid VM.get_power_state VM.get_record VM.get_uuid
    VM.remove_from_blocked_operations VM.remove_from_other_config VM.set_is_a_template
    VM.set_name_description VM.set_name_label VM.update_allowed_operations
    VM_guest_metrics.get_all_records event.inject host.get_all_records network.get_all_records
    pool.add_to_other_config pool.get_all_records pool.remove_from_other_config
    session.login_with_password session.logout task.create task.destroy task.get_all_records
    task.get_uuid task.set_progress task.set_status
""".split()  # noqa: SIM905 - a list of sixty lines says no more
"""What Xen Orchestra called for delta backups with and without NBD, and for their restore."""

UPDATED = """
    HVM_boot_params HVM_boot_policy HVM_shadow_multiplier NVRAM PCI_bus PV_args PV_bootloader
    PV_bootloader_args PV_kernel PV_legacy_args PV_ramdisk VCPUs_at_startup VCPUs_max VCPUs_params
    actions_after_crash actions_after_reboot actions_after_shutdown affinity appliance domain_type
    ha_always_run ha_restart_priority hardware_platform_version has_vendor_device name_description
    name_label order other_config platform recommendations shutdown_delay start_delay suspend_SR
    tags user_version xenstore_data
""".split()  # noqa: SIM905 - as above
"""Fields that a replica gets from its source."""


def test_every_recorded_call_is_known() -> None:
    assert set(RECORDED) <= set(method_names())


@pytest.fixture
async def pool(nursery: trio.Nursery) -> SimulatedPool:
    made = SimulatedPool.small(disk_size=2 * BLOCK)
    await nursery.start(partial(serve, made))
    return made


async def in_client(pool: SimulatedPool, work: Callable[[Any], None]) -> None:
    def run() -> None:
        session = XenAPI.Session(pool.url)
        session.xenapi.login_with_password("root", "simulated", "1.0", "test")
        try:
            work(session.xenapi)
        finally:
            session.xenapi.session.logout()
            session("close")()

    await trio.to_thread.run_sync(run)


def fails(function: Callable[..., Any], *params: Any) -> list[str]:
    with pytest.raises(XenAPI.Failure) as caught:
        function(*params)
    return list(caught.value.details)


def finished(api: Any, task: str) -> dict[str, Any]:
    while api.task.get_status(task) == "pending":
        pass
    record = dict(api.task.get_record(task))
    api.task.destroy(task)
    return record


def made(record: dict[str, Any]) -> str:
    assert record["status"] == "success", record["error_info"]
    return str(record["result"]).removeprefix("<value>").removesuffix("</value>")


async def test_a_delta_restore(pool: SimulatedPool) -> None:
    def work(api: Any) -> None:
        [source] = api.VM.get_by_name_label("vm1")
        backup = api.VM.get_record(source)
        vm = api.VM.create(
            {
                **backup,
                "name_label": "[Importing…] vm1",
                "blocked_operations": {"start": "Importing…"},
                "bios_strings": {"bios-vendor": "x"},
                "affinity": "OpaqueRef:NULL",
                "power_state": "Running",
                "suspend_VDI": "OpaqueRef:NULL",
                "is_a_snapshot": True,
            }
        )
        record = api.VM.get_record(vm)
        assert record["blocked_operations"] == {}, "they are set one by one afterwards"
        assert record["bios_strings"] == {}
        assert record["power_state"] == "Halted"
        assert record["VBDs"] == record["VIFs"] == []
        assert not record["is_a_snapshot"]
        assert record["uuid"] != backup["uuid"]
        for field in ("memory_static_max", "VCPUs_max", "platform", "other_config", "NVRAM"):
            assert record[field] == backup[field]
        for operation in ("start", "start_on"):
            api.VM.add_to_blocked_operations(vm, operation, "Importing…")
        api.VM.set_bios_strings(vm, {"system-manufacturer": "Dell"})
        strings = api.VM.get_bios_strings(vm)
        assert (strings["bios-vendor"], strings["system-manufacturer"]) == ("Xen", "Dell")

        sr = api.SR.get_by_uuid(api.SR.get_uuid(pool.srs[1]))
        vdi = api.VDI.create(
            {
                "SR": sr,
                "virtual_size": str(2 * BLOCK),
                "type": "user",
                "name_label": "[Importing] vm1_0",
                "sm_config": {"image-format": "vhd"},
                "other_config": {"xo:import:task": "t"},
                "is_a_snapshot": True,
                "uuid": "mine",
                "managed": False,
                "tags": ["a"],
            }
        )
        disk = api.VDI.get_record(vdi)
        assert (disk["managed"], disk["is_a_snapshot"], disk["tags"]) == (True, False, ["a"])
        assert disk["uuid"] != "mine"
        assert disk["sm_config"] == {"image-format": "vhd"}
        assert api.VM.get_allowed_VBD_devices(vm)[:2] == ["0", "1"]
        vbd = api.VBD.create({"VM": vm, "VDI": vdi, "userdevice": "0", "bootable": True})
        assert api.VM.get_allowed_VBD_devices(vm)[0] == "1"
        cd = api.VBD.create(
            {"VM": vm, "type": "CD", "mode": "RO", "empty": True, "userdevice": "autodetect"}
        )
        assert api.VBD.get_userdevice(cd) == "1"
        assert not api.VBD.get_currently_attached(vbd)

        assert api.VM.get_allowed_VIF_devices(vm)[0] == "0"
        vif = api.VIF.create({"VM": vm, "network": pool.network, "device": "0", "MAC": ""})
        assert api.VIF.get_MAC_autogenerated(vif)
        assert api.VM.get_allowed_VIF_devices(vm)[0] == "1"

        vtpm = api.VTPM.create(vm, False)
        api.VTPM.set_contents(vtpm, "c2VjcmV0")
        assert api.VM.get_VTPMs(vm) == [vtpm]
        assert api.VTPM.get_contents(vtpm) == "c2VjcmV0"
        assert sorted(trio.from_thread.run_sync(pool.leftovers)) == [
            "blocked_operations",
            "importing",
            "vms",
        ]
        assert fails(api.VM.start, vm, False, False) == ["OPERATION_BLOCKED", vm, "Importing…"]
        for operation in ("start", "start_on"):
            api.VM.remove_from_blocked_operations(vm, operation)
        api.VM.set_name_label(vm, "vm1")
        api.VDI.set_name_label(vdi, "vm1_0")
        api.VDI.remove_from_other_config(vdi, "xo:import:task")
        assert set(trio.from_thread.run_sync(pool.leftovers)) == {"vms"}
        api.VM.start(vm, False, False)
        assert api.VM.get_power_state(vm) == "Running"

    await in_client(pool, work)


async def test_fields_of_a_replica_can_be_set(pool: SimulatedPool) -> None:
    def work(api: Any) -> None:
        [vm] = api.VM.get_by_name_label("vm1")
        api.VM.hard_shutdown(vm)
        before = api.VM.get_record(vm)
        for field in UPDATED:
            getattr(api.VM, f"set_{field}")(vm, before[field])
        assert api.VM.get_record(vm) == before
        half = str(512 << 20)
        api.VM.set_memory_limits(vm, half, half, half, half)
        assert api.VM.get_memory_dynamic_max(vm) == half
        assert fails(api.VM.set_memory_limits, vm, "2", "1", "1", "1") == [
            "MEMORY_CONSTRAINT_VIOLATION_ORDER"
        ]
        for field in ("power_state", "snapshot_of", "version", "is_a_snapshot", "uuid", "VBDs"):
            assert fails(getattr(api.VM, f"set_{field}"), vm, "x") == [
                "MESSAGE_METHOD_UNKNOWN",
                f"VM.set_{field}",
            ]
        api.VM.start(vm, False, False)
        assert fails(api.VM.set_memory_limits, vm, half, half, half, half) == [
            "VM_BAD_POWER_STATE",
            *(vm, "halted", "running"),
        ]

    await in_client(pool, work)


async def test_disks(pool: SimulatedPool) -> None:
    def work(api: Any) -> None:
        [vm] = api.VM.get_by_name_label("vm1")
        [live] = [api.VBD.get_VDI(v) for v in api.VM.get_VBDs(vm) if api.VBD.get_type(v) == "Disk"]
        api.VDI.enable_cbt(live)
        size = int(api.VDI.get_virtual_size(live))
        snapshot = made(finished(api, api.Async.VM.snapshot(vm, "s", [])))
        frozen = api.VBD.get_VDI(api.VM.get_VBDs(snapshot)[0])
        record = api.VDI.get_record(frozen)
        assert record["is_a_snapshot"]
        assert record["cbt_enabled"], "a snapshot is tracked as its disk is"
        assert record["snapshot_of"] == live
        assert record["snapshot_time"] != "19700101T00:00:00Z"
        assert api.VDI.get_snapshots(live) == [frozen]
        parent = api.VDI.get_by_uuid(record["sm_config"]["vhd-parent"])
        for call in (api.VDI.destroy, api.VDI.snapshot, api.VDI.clone):
            assert fails(call, parent) == ["VDI_NOT_MANAGED", parent]

        clone = made(finished(api, api.Async.VDI.clone(frozen)))
        copied = api.VDI.get_record(clone)
        assert (copied["is_a_snapshot"], copied["cbt_enabled"]) == (False, False)
        made(finished(api, api.Async.VDI.resize(clone, str(size + BLOCK))))
        assert api.VDI.get_virtual_size(clone) == str(size + BLOCK)
        task = finished(api, api.Async.VDI.resize(clone, str(size)))
        assert task["error_info"][0] == "SR_BACKEND_FAILURE_79"
        assert fails(api.VDI.resize, live, str(size * 2)) == ["VDI_IN_USE", live, "resize"]

        assert fails(api.VDI.create, {"SR": "OpaqueRef:x", "virtual_size": "1"}) == [
            "HANDLE_INVALID",
            *("SR", "OpaqueRef:x"),
        ]
        huge = {"SR": pool.srs[0], "virtual_size": str(3 << 40)}
        assert fails(api.VDI.create, huge)[0] == "SR_BACKEND_FAILURE_79"
        large = api.VDI.create({**huge, "sm_config": {"image-format": "qcow2"}})
        assert api.VDI.get_sm_config(api.VDI.snapshot(large))["image-format"] == "qcow2"
        tracked = {"SR": pool.srs[0], "virtual_size": "512", "type": "cbt_metadata"}
        assert fails(api.VDI.create, tracked) == ["VDI_INCOMPATIBLE_TYPE", "", "cbt_metadata"]

        api.VM.destroy(snapshot)
        made(finished(api, api.Async.VDI.data_destroy(frozen)))
        assert fails(api.VDI.clone, frozen) == ["VDI_INCOMPATIBLE_TYPE", frozen, "cbt_metadata"]
        assert fails(api.VBD.create, {"VM": vm, "VDI": frozen, "userdevice": "5"}) == [
            "VDI_INCOMPATIBLE_TYPE",
            *(frozen, "cbt_metadata"),
        ]
        assert trio.from_thread.run_sync(pool.leftovers)["cbt_metadata"] == ["vm1_0"]
        made(finished(api, api.Async.VDI.destroy(frozen)))
        assert fails(api.VDI.get_VBDs, frozen) == ["HANDLE_INVALID", "VDI", frozen]

    await in_client(pool, work)


async def test_drives_and_networks(pool: SimulatedPool) -> None:
    def work(api: Any) -> None:
        [vm] = api.VM.get_by_name_label("vm1")
        uuid = api.VM.get_uuid(vm)
        empty = {"SR": pool.srs[0], "virtual_size": str(BLOCK)}
        vdi = api.VDI.create(empty)
        drive = {"VM": vm, "VDI": vdi, "userdevice": "7"}
        for taken in ("0", "xvda", "hda", "15"):
            assert fails(api.VBD.create, {**drive, "userdevice": taken}) == [
                "DEVICE_ALREADY_EXISTS",
                taken,
            ]
        assert fails(api.VBD.create, {**drive, "userdevice": "x"}) == ["INVALID_DEVICE", "x"]
        assert fails(api.VBD.create, {**drive, "empty": True}) == [
            "VBD_NOT_REMOVABLE_MEDIA",
            "in constructor",
        ]
        assert fails(api.VBD.create, {**drive, "type": "CD"}) == ["VBD_CDS_MUST_BE_READONLY"]
        fixed = api.VDI.create({**empty, "read_only": True})
        assert fails(api.VBD.create, {**drive, "VDI": fixed}) == ["VDI_READONLY", fixed]
        vbd = api.VBD.create(drive)
        made(finished(api, api.Async.VBD.plug(vbd)))
        assert api.VBD.get_device(vbd) == "xvdh"
        assert fails(api.VBD.plug, vbd) == ["DEVICE_ALREADY_ATTACHED", vbd]
        assert fails(api.VBD.destroy, vbd) == [
            "OPERATION_NOT_ALLOWED",
            f"VBD '{api.VBD.get_uuid(vbd)}' still attached to '{uuid}'",
        ]
        second = api.VBD.create({**drive, "userdevice": "8"})
        assert fails(api.VBD.plug, second) == ["VDI_IN_USE", vdi]
        api.VBD.set_unpluggable(vbd, False)
        assert fails(api.VBD.unplug_force, vbd) == ["VBD_NOT_UNPLUGGABLE", vbd]
        api.VBD.set_unpluggable(vbd, True)
        api.VBD.unplug_force(vbd)
        assert fails(api.VBD.unplug, vbd) == ["DEVICE_ALREADY_DETACHED", vbd]
        api.VBD.destroy(vbd)
        api.VBD.destroy(second)

        nic = {"VM": vm, "network": pool.network, "device": "1"}
        assert fails(api.VIF.create, {**nic, "device": "0"}) == ["DEVICE_ALREADY_EXISTS", "0"]
        assert fails(api.VIF.create, {**nic, "device": "eth"}) == ["INVALID_DEVICE", "eth"]
        assert fails(api.VIF.create, {**nic, "MAC": "1:2"}) == ["MAC_INVALID", "1:2"]
        vif = api.VIF.create({**nic, "MAC": "02:00:00:00:00:01"})
        api.VIF.plug(vif)
        assert fails(api.VIF.destroy, vif)[0] == "OPERATION_NOT_ALLOWED"
        api.VIF.unplug(vif)
        made(finished(api, api.Async.VIF.destroy(vif)))

        assert fails(api.VTPM.create, vm, False) == ["VM_BAD_POWER_STATE", vm, "halted", "running"]
        api.VM.hard_shutdown(vm)
        vtpm = api.VTPM.create(vm, False)
        assert fails(api.VTPM.create, vm, False) == ["VTPM_MAX_AMOUNT_REACHED", "1"]
        api.VTPM.destroy(vtpm)
        assert fails(api.VTPM.get_contents, vtpm) == ["HANDLE_INVALID", "VTPM", vtpm]
        api.pool.set_name_label(pool.ref, "p")
        trio.from_thread.run_sync(partial(pool.store.update, "pool", pool.ref, restrictions={}))
        assert fails(api.VTPM.create, vm, False) == ["FEATURE_RESTRICTED", "restrict_vtpm"]

        assert fails(api.VM.set_bios_strings, vm, {"hp-rombios": "x"}) == [
            "INVALID_VALUE",
            *("hp-rombios", "Unknown key"),
        ]
        api.VM.set_bios_strings(vm, {})
        assert fails(api.VM.set_bios_strings, vm, {}) == ["VM_BIOS_STRINGS_ALREADY_SET"]

    await in_client(pool, work)


async def test_memory(pool: SimulatedPool) -> None:
    """A checkpoint, and the suspended VM that a restore makes of it."""

    def work(api: Any) -> None:
        [vm] = api.VM.get_by_name_label("vm1")
        checkpoint = made(finished(api, api.Async.VM.checkpoint(vm, "c")))
        assert api.VM.get_power_state(vm) == "Running"
        record = api.VM.get_record(checkpoint)
        assert record["power_state"] == "Suspended"
        image = record["suspend_VDI"]
        assert api.VDI.get_type(image) == "suspend"
        assert record["last_booted_record"]
        assert set(trio.from_thread.run_sync(pool.leftovers)) == {"snapshots"}

        size = api.VDI.get_virtual_size(image)
        restored = api.VDI.create({"SR": pool.srs[0], "virtual_size": size, "type": "suspend"})
        wanted = {**record, "suspend_VDI": restored, "is_a_template": False}
        for missing in ({"suspend_VDI": "OpaqueRef:NULL"}, {"last_booted_record": ""}):
            code, _, *states = fails(api.VM.create, {**wanted, **missing})
            assert [code, *states] == ["VM_BAD_POWER_STATE", "halted", "suspended"]
        new = api.VM.create(wanted)
        assert api.VM.get_power_state(new) == "Suspended"
        assert api.VM.get_suspend_VDI(new) == restored
        api.VDI.destroy(restored)
        assert api.VM.get_suspend_VDI(new) == "OpaqueRef:NULL"
        api.VM.destroy(new)

        api.VM.suspend(vm)
        second = api.VM.checkpoint(vm, "of a suspended one")
        frozen = api.VM.get_suspend_VDI(second)
        assert api.VDI.get_snapshot_of(frozen) == api.VM.get_suspend_VDI(vm)
        for each in (checkpoint, second):
            disks = [api.VBD.get_VDI(v) for v in api.VM.get_VBDs(each)]
            api.VM.hard_shutdown(each)
            api.VM.destroy(each)
            for vdi in disks:
                if vdi != "OpaqueRef:NULL":
                    api.VDI.destroy(vdi)
        assert fails(api.VDI.get_uuid, image) == ["HANDLE_INVALID", "VDI", image]
        api.VM.resume(vm, False, False)
        assert trio.from_thread.run_sync(pool.leftovers) == {}

    await in_client(pool, work)


async def test_tasks_of_a_client(pool: SimulatedPool) -> None:
    def work(api: Any) -> None:
        task = api.task.create("[XO] upload", "")
        api.task.set_progress(task, 0.25)
        assert api.task.get_progress(task) == 0.25
        assert api.task.get_by_uuid(api.task.get_uuid(task)) == task
        api.task.set_status(task, "success")
        assert api.task.get_status(task) == "success"
        api.task.destroy(task)
        assert fails(api.task.set_progress, task, 1.0) == ["HANDLE_INVALID", "task", task]

    await in_client(pool, work)
