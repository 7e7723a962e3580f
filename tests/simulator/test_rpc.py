"""The pool's calls, seen through JSON-RPC and through the official Python client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import XenAPI  # type: ignore[import-untyped]

from proxy.simulator import SimulatedPool
from tests.simulator.conftest import Client, Failure


async def fails(client: Client, method: str, *params: Any) -> list[str]:
    with pytest.raises(Failure) as caught:
        await client.call(method, *params)
    return [caught.value.code, *caught.value.params]


async def test_both_versions_of_json_rpc(client: Client) -> None:
    session = client.session
    assert await client.raw("pool.get_all", session, version=None) == {
        "result": await client.call("pool.get_all"),
        "error": None,
        "id": 0,
    }
    answer = await client.raw("VM.get_record", session, "OpaqueRef:x", version=None)
    assert answer == {"result": None, "error": ["HANDLE_INVALID", "VM", "OpaqueRef:x"], "id": 0}
    answer = await client.raw("VM.get_record", session, "OpaqueRef:x")
    assert answer["error"] == {
        "code": 1,
        "message": "HANDLE_INVALID",
        "data": ["VM", "OpaqueRef:x"],
    }


async def test_a_malformed_body_is_answered_by_a_page(client: Client) -> None:
    for path, body in (("/jsonrpc", b"{"), ("/jsonrpc", b"[]"), ("/xmlrpc", b"<x/>")):
        answer = await client.http.post(client.url + path, content=body)
        assert answer.status_code == 500
        assert "HTTP 500 internal server error" in answer.text


async def test_errors_have_exact_codes_and_parameters(client: Client, pool: SimulatedPool) -> None:
    vm = pool.vm("vm1")
    assert await fails(client, "VM.get_by_uuid", "nope") == ["UUID_INVALID", "VM", "nope"]
    assert await fails(client, "VM.nonsense") == ["MESSAGE_METHOD_UNKNOWN", "VM.nonsense"]
    assert await fails(client, "VM.get_uuid") == [
        "MESSAGE_PARAMETER_COUNT_MISMATCH",
        *("VM.get_uuid", "1", "0"),
    ]
    await client.call("VM.add_to_other_config", vm, "k", "v")
    assert await fails(client, "VM.add_to_other_config", vm, "k", "w") == [
        "MAP_DUPLICATE_KEY",
        *("VM", "other_config", vm, "k"),
    ]
    await client.call("VM.remove_from_other_config", vm, "absent")
    assert await fails(client, "VM.start", vm, False, False) == [
        "VM_BAD_POWER_STATE",
        *(vm, "halted", "running"),
    ]
    vdi = (await client.call("VDI.get_all"))[0]
    assert await fails(client, "VDI.destroy", vdi) == ["VDI_IN_USE", vdi, "destroy"]
    answer = await client.raw("VM.get_all", "OpaqueRef:gone")
    assert (answer["error"]["message"], answer["error"]["data"]) == (
        "SESSION_INVALID",
        ["OpaqueRef:gone"],
    )
    answer = await client.raw("session.login_with_password", "root", "wrong")
    assert answer["error"]["message"] == "SESSION_AUTHENTICATION_FAILED"


async def test_blocked_operations_are_respected(client: Client, pool: SimulatedPool) -> None:
    vm = pool.vm("vm2")
    await client.call("VM.add_to_blocked_operations", vm, "start", "because")
    assert await fails(client, "VM.start", vm, False, False) == ["OPERATION_BLOCKED", vm, "because"]
    assert pool.leftovers()["blocked_operations"] == ["vm2: start"]


async def test_underscored_names_and_sets(client: Client, pool: SimulatedPool) -> None:
    task = await client.call("task_create", "label", "")
    await client.call("task_set_status", task, "success")
    assert await client.call("task.get_status", task) == "success"
    vm = pool.vm("vm1")
    await client.call("VM.add_tags", vm, "a")
    await client.call("VM.add_tags", vm, "a")
    assert await client.call("VM_get_tags", vm) == ["a"]
    await client.call("VM.remove_tags", vm, "a")
    assert await client.call("VM_guest_metrics_get_all_records") == await client.call(
        "VM_guest_metrics.get_all_records"
    )


async def test_filters(client: Client) -> None:
    def names(records: dict[str, Any]) -> list[str]:
        return sorted(record["name_label"] for record in records.values())

    where = 'field "power_state"="Running" and not (field "is_control_domain"="true")'
    assert names(await client.call("VM.get_all_records_where", where)) == ["vm1"]
    both = 'field "name_label"="vm1" or field "name_label"="vm2"'
    assert names(await client.call("VM.get_all_records_where", both)) == ["vm1", "vm2"]
    assert (await fails(client, "VM.get_all_records_where", 'field "x"'))[0] == "INTERNAL_ERROR"


RECORDED_VM = Path(__file__).parents[1] / "fixtures" / "recorded-full-backup.tar.xz"


def test_a_vm_has_every_field_of_a_recorded_one_with_its_type() -> None:
    import tarfile

    with tarfile.open(RECORDED_VM) as tar:
        member = next(each for each in tar if each.name.endswith("Z.json"))
        file = tar.extractfile(member)
        assert file is not None
        recorded = json.load(file)["vm"]
    pool = SimulatedPool.small()
    ours = pool.store.get("VM", pool.vm("vm1"))
    assert set(recorded) <= set(ours)
    for name, value in recorded.items():
        # JavaScript wrote the float 1.0 as 1
        kind = float if name == "HVM_shadow_multiplier" else type(value)
        assert type(ours[name]) is kind, name


async def test_back_references_follow(client: Client, pool: SimulatedPool) -> None:
    vm = pool.vm("vm2")
    vdi = await client.call("VDI.create", {"SR": pool.srs[1], "virtual_size": "1048576"})
    vbd = await client.call("VBD.create", {"VM": vm, "VDI": vdi, "userdevice": "7"})
    assert vbd in await client.call("VM.get_VBDs", vm)
    assert await client.call("VDI.get_VBDs", vdi) == [vbd]
    assert vdi in await client.call("SR.get_VDIs", pool.srs[1])
    await client.call("VDI.destroy", vdi)
    assert vbd not in await client.call("VM.get_VBDs", vm)
    assert vdi not in await client.call("SR.get_VDIs", pool.srs[1])
    assert await fails(client, "VBD.get_record", vbd) == ["HANDLE_INVALID", "VBD", vbd]


async def test_events_coalesce_and_count(client: Client, pool: SimulatedPool) -> None:
    vm = pool.vm("vm1")
    token = await client.call("event.inject", "pool", pool.ref)
    gone = await client.call("task.create", "short", "")
    await client.call("task.destroy", gone)
    await client.call("VM.set_name_label", vm, "a")
    await client.call("VM.set_name_label", vm, "b")
    kept = await client.call("task.create", "stays", "")
    answer = await client.call("event.from", ["VM", "task"], token, 5.1)
    told = [(event["operation"], event["class"], event["ref"]) for event in answer["events"]]
    assert told == [("add", "task", kept), ("mod", "vm", vm)]
    assert answer["events"][1]["snapshot"]["name_label"] == "b"
    assert answer["valid_ref_counts"]["task"] == 1
    await client.call("task.destroy", kept)
    answer = await client.call("event.from", ["task"], answer["token"], 5.1)
    assert [(e["operation"], e["ref"], "snapshot" in e) for e in answer["events"]] == [
        ("del", kept, False)
    ]
    answer = await client.call("event.from", [f"vm/{vm}"], answer["token"], 0.01)
    assert answer["events"] == []
    assert (await fails(client, "event.from", ["VM"], "bad", 1.1))[0] == (
        "EVENT_FROM_TOKEN_PARSE_FAILURE"
    )
    assert (await fails(client, "event.from", ["what"], "", 1.1))[0] == (
        "EVENT_SUBSCRIPTION_PARSE_FAILURE"
    )
    assert await fails(client, "event.inject", "vm", vm) == ["HANDLE_INVALID", "vm", vm]


async def test_a_lost_session_wakes_its_event_from(client: Client, pool: SimulatedPool) -> None:
    token = (await client.call("event.from", ["VM"], "", 1.1))["token"]
    gate = pool.pause_at("event.from")
    gate.release()
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            assert (await fails(client, "event.from", ["VM"], token, 30.1))[0] == "SESSION_INVALID"

        nursery.start_soon(wait)
        await gate.left()
        pool.sessions.expire_all()


async def test_snapshot_has_hidden_parents_that_go_with_it(
    client: Client, pool: SimulatedPool
) -> None:
    vm = pool.vm("vm1")
    before = pool.store.count("VDI")
    task = await client.settled(await client.call("Async.VM.snapshot", vm, "one"))
    assert task["status"] == "success"
    snapshot = task["result"].removeprefix("<value>").removesuffix("</value>")
    record = await client.call("VM.get_record", snapshot)
    assert record["is_a_snapshot"]
    assert record["is_a_template"]
    assert record["power_state"] == "Halted"
    assert record["snapshot_of"] == vm
    assert await client.call("VM.get_snapshots", vm) == [snapshot]
    source = await client.call("VM.get_record", vm)
    assert record["other_config"] == source["other_config"]
    assert source["parent"] == snapshot
    frozen = pool.vms.disks(snapshot)
    for vdi, original in zip(frozen, pool.vms.disks(vm), strict=True):
        parent = (await client.call("VDI.get_sm_config", vdi))["vhd-parent"]
        assert (await client.call("VDI.get_sm_config", original))["vhd-parent"] == parent
        assert not pool.store.get("VDI", pool.store.by_uuid("VDI", parent))["managed"]
    await client.call("VM.destroy", snapshot)
    assert pool.leftovers()["vdis"] == ["vm1_0", "vm1_1"], "VM.destroy leaves the disks"
    for vdi in frozen:
        await client.call("VDI.destroy", vdi)
    assert pool.store.count("VDI") == before


async def test_a_snapshot_keeps_its_bytes(client: Client, pool: SimulatedPool) -> None:
    vm = pool.vm("vm1")
    [uuid, _] = pool.disk_uuids(vm)
    digest = pool.digest(uuid)
    snapshot = await client.call("VM.snapshot", vm, "one")
    pool.write(uuid, 1_000_000, b"changed" * 20_000)
    assert pool.digest(uuid) != digest
    assert pool.digest(pool.disk_uuids(snapshot)[0]) == digest


async def test_ignored_disks_and_old_servers(client: Client, pool: SimulatedPool) -> None:
    vm = pool.vm("vm1")
    skipped = pool.vms.disks(vm)[1]
    snapshot = await client.call("VM.snapshot", vm, "one", [skipped])
    assert len(pool.disk_uuids(snapshot)) == 1
    pool.is_old = True
    assert (await fails(client, "Async.VM.snapshot", vm, "two", [skipped]))[0] == (
        "MESSAGE_PARAMETER_COUNT_MISMATCH"
    )


async def test_changed_blocks(client: Client, pool: SimulatedPool) -> None:
    import base64

    vm = pool.vm("vm1")
    [uuid, _] = pool.disk_uuids(vm)
    untracked = pool.vms.disks(await client.call("VM.snapshot", vm, "untracked"))[0]
    for disk in pool.vms.disks(vm):
        await client.call("VDI.enable_cbt", disk)
    frozen = await client.call("VM.snapshot", vm, "base")
    base = pool.vms.disks(frozen)[0]
    pool.write(uuid, 2 << 20, b"x")
    new = pool.vms.disks(await client.call("VM.snapshot", vm, "new"))[0]
    bitmap = base64.b64decode(await client.call("VDI.list_changed_blocks", base, new))
    assert bitmap == bytes(4) + b"\xff\xff"

    assert await fails(client, "VDI.data_destroy", base) == ["VDI_IN_USE", base, "data_destroy"]
    await client.call("VM.destroy", frozen)
    await client.call("VDI.data_destroy", base)  # what changed since is known all the same
    assert base64.b64decode(await client.call("VDI.list_changed_blocks", base, new)) == bitmap
    method = "VDI.list_changed_blocks"
    assert (await fails(client, method, untracked, new))[0] == "SR_BACKEND_FAILURE_460"
    assert (await fails(client, method, new, new))[0] == "SR_BACKEND_FAILURE_460"
    assert (await fails(client, method, new, base))[0] == "VDI_INCOMPATIBLE_TYPE"
    pool.disks.attach_to_dom0(new)
    assert (await fails(client, method, base, new))[0] == "VDI_IN_USE"


async def test_tracking_of_changes_is_for_live_user_disks(
    client: Client, pool: SimulatedPool
) -> None:
    [disk, other] = pool.vms.disks(pool.vm("vm1"))
    await client.call("VDI.enable_cbt", disk)
    await client.call("VDI.enable_cbt", disk)
    pool.store.update("VDI", other, on_boot="reset")
    snapshot = pool.vms.disks(await client.call("VM.snapshot", pool.vm("vm1"), "s"))[0]
    suspend = pool.disks.create_suspend(pool.vm("vm1"), "memory")
    expected = {
        snapshot: "OPERATION_NOT_ALLOWED",
        suspend: "VDI_INCOMPATIBLE_TYPE",
        other: "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION",
    }
    for ref, code in expected.items():
        assert (await fails(client, "VDI.enable_cbt", ref))[0] == code
        assert (await fails(client, "VDI.disable_cbt", ref))[0] == code


async def test_a_slave_sends_to_its_master(nursery: trio.Nursery) -> None:
    from functools import partial

    from proxy.simulator import serve

    pool = SimulatedPool.small()
    url = await nursery.start(partial(serve, pool, slave_host="127.0.0.2"))
    async with httpx.AsyncClient() as http:
        slave = Client(url.replace("127.0.0.1", "127.0.0.2"), http)
        answer = await slave.raw("session.login_with_password", "root", "simulated")
        assert answer["error"]["message"] == "HOST_IS_SLAVE"
        assert answer["error"]["data"] == ["127.0.0.1"]


# The official client: blocking, XML-RPC


async def in_client(pool: SimulatedPool, work: Callable[[Any], None]) -> None:
    def run() -> None:
        session = XenAPI.Session(pool.url)
        session.xenapi.login_with_password("root", "simulated", "1.0", "test")
        try:
            work(session)
        finally:
            session.xenapi.session.logout()
            session("close")()

    await trio.to_thread.run_sync(run)
    assert not pool.sessions.open


async def test_the_official_client_works(pool: SimulatedPool) -> None:
    def work(session: Any) -> None:
        assert session.API_version == "2.21"
        vm = session.xenapi.VM.get_by_name_label("vm1")[0]
        record = session.xenapi.VM.get_record(vm)
        assert record["memory_static_max"] == str(1 << 30)
        assert record["is_a_template"] is False
        assert record["HVM_shadow_multiplier"] == 1.0
        session.xenapi.VM.set_order(vm, "5")
        assert session.xenapi.VM.get_order(vm) == "5"
        task = session.xenapi.Async.VM.snapshot(vm, "snap <&>")
        while session.xenapi.task.get_status(task) == "pending":
            pass
        assert session.xenapi.task.get_status(task) == "success"
        snapshot = session.xenapi.task.get_result(task)[len("<value>") : -len("</value>")]
        assert session.xenapi.VM.get_name_label(snapshot) == "snap <&>"
        events = session.xenapi.event_from(["vm"], "", 1.0)
        assert isinstance(events["token"], str)
        assert {event["class"] for event in events["events"]} == {"vm"}
        with pytest.raises(XenAPI.Failure) as caught:
            session.xenapi.VM.get_record("OpaqueRef:x")
        assert caught.value.details == ["HANDLE_INVALID", "VM", "OpaqueRef:x"]

    await in_client(pool, work)


async def test_the_official_client_logs_in_again(pool: SimulatedPool) -> None:
    def work(session: Any) -> None:
        assert session.xenapi.pool.get_all()
        trio.from_thread.run_sync(pool.sessions.expire_all)
        assert session.xenapi.pool.get_all()

    await in_client(pool, work)
    assert pool.sessions.logins == 2
