"""Export and import, and everything that goes wrong with them on demand."""

from __future__ import annotations

import io
import socket
import struct
import tarfile

import httpx
import pytest
import trio

from proxy.errors import Corrupt
from proxy.formats.xva_check import Validator
from proxy.simulator import SimulatedPool
from tests.simulator.conftest import Client


def checked(body: bytes) -> bytes:
    validator = Validator()
    validator.feed(body)
    validator.finish(len(body))
    return body


async def snapshot(client: Client, pool: SimulatedPool) -> tuple[str, str]:
    """A snapshot of vm1 and a task for its export."""
    ref = await client.call("VM.snapshot", pool.vm("vm1"), "snap")
    return ref, await client.call("task.create", "[XO] VM export", "")


@pytest.mark.parametrize("compression", ["false", "true", "gzip", "zstd"])
async def test_an_export_comes_back_as_the_same_disks(
    client: Client, pool: SimulatedPool, compression: str
) -> None:
    vm, task = await snapshot(client, pool)
    body = checked(await client.export(vm, task, use_compression=compression))
    record = await client.settled(task)
    assert (record["status"], record["progress"]) == ("success", 1)
    if compression == "false":
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            assert tar.getnames()[0] == "ova.xml"
    target = await client.call("task.create", "[XO] VM import", "")
    answer = await client.put(body, target, sr_id=pool.srs[1])
    assert answer.status_code == 200
    record = await client.settled(target)
    assert record["status"] == "success", record["error_info"]
    made = record["result"].removeprefix("<value><array><data><value>").split("<")[0]
    assert [pool.digest(uuid) for uuid in pool.disk_uuids(made)] == [
        pool.digest(uuid) for uuid in pool.disk_uuids(vm)
    ]
    new = await client.call("VM.get_record", made)
    assert new["uuid"] != await client.call("VM.get_uuid", vm)
    assert new["power_state"] == "Halted"
    assert new["current_operations"] == {}
    assert not new["is_a_snapshot"]
    assert new["memory_static_max"] == 1 << 30
    for vdi in pool.vms.disks(made):
        assert pool.store.get("VDI", vdi)["SR"] == pool.srs[1]
    assert not pool.transfers


async def test_a_recorded_archive_is_imported(client: Client, pool: SimulatedPool) -> None:
    from tests.simulator.test_rpc import RECORDED_VM

    with tarfile.open(RECORDED_VM) as tar:
        member = next(each for each in tar if each.name.endswith(".xva"))
        file = tar.extractfile(member)
        assert file is not None
        body = file.read()
    task = await client.call("task.create", "import", "")
    await client.put(body, task, restore="true")
    assert (await client.settled(task))["status"] == "success"
    # restore=true keeps what names the VM
    assert pool.store.by_uuid("VM", "c5156de8-7182-4368-a89b-9d2afb0dea91")


async def test_what_an_export_does_to_the_pool(client: Client, pool: SimulatedPool) -> None:
    vm, task = await snapshot(client, pool)
    gate = pool.pause_at("/export", at_bytes=100_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.export, vm, task)
        await gate.reached()
        assert await client.call("VM.get_current_operations", vm) == {task: "export"}
        found = pool.leftovers()
        assert len(found["dom0_vbds"]) == 2
        assert found["transfers"] == ["/export 100000 bytes"]
        vdi = pool.vms.disks(vm)[0]
        refused = await client.raw("VDI.destroy", client.session, vdi)
        assert refused["error"]["message"] == "VDI_IN_USE"
        gate.release()
    assert (await client.settled(task))["status"] == "success"
    await client.call("task.destroy", task)
    assert set(pool.leftovers()) == {"snapshots"}


async def test_a_running_vm_is_not_exported(client: Client, pool: SimulatedPool) -> None:
    task = await client.call("task.create", "x", "")
    url = client.data_url("/export", ref=pool.vm("vm1"), task_id=task)
    assert (await client.http.get(url)).status_code == 500
    assert (await client.settled(task))["error_info"][0] == "VM_BAD_POWER_STATE"


async def test_a_dead_session_is_401_and_leaves_the_task_pending(
    client: Client, pool: SimulatedPool
) -> None:
    task = await client.call("task.create", "x", "")
    pool.sessions.expire_all()
    for method, path in (("GET", "/export/"), ("PUT", "/import/")):
        url = client.data_url(path, ref=pool.vm("vm2"), task_id=task)
        answer = await client.http.request(method, url)
        assert answer.status_code == 401
    assert pool.store.get("task", task)["status"] == "pending"


async def test_redirect_and_refusal(client: Client, pool: SimulatedPool) -> None:
    pool.fail("/export", redirect="http://127.0.0.2:1")
    url = client.data_url("/export/", ref="r", task_id="t")
    answer = await client.http.get(url)
    assert answer.status_code == 302
    assert answer.headers["location"] == f"http://127.0.0.2:1{url.raw_path.decode()}"
    task = await client.call("task.create", "x", "")
    pool.fail("/export", status=503, error=("HOST_BROKEN", "why"))
    assert (await client.http.get(client.data_url("/export/", task_id=task))).status_code == 503
    assert (await client.settled(task))["error_info"] == ["HOST_BROKEN", "why"]


async def exported(client: Client, pool: SimulatedPool) -> tuple[bytes, dict[str, object]]:
    vm, task = await snapshot(client, pool)
    body = await client.export(vm, task)
    return body, await client.settled(task)


@pytest.mark.parametrize("outcome", ["failure", "success"])
async def test_upstream_weakness_4_a_clean_early_end(
    client: Client, pool: SimulatedPool, outcome: str
) -> None:
    pool.fail("/export", cut="end", after_bytes=1_234_567, task=outcome)
    body, task = await exported(client, pool)
    assert len(body) == 1_234_567
    assert task["status"] == outcome
    with pytest.raises(Corrupt, match="truncated"):
        checked(body)


async def test_upstream_weakness_5_a_late_failure(client: Client, pool: SimulatedPool) -> None:
    pool.fail("/export", error=("VDI_IO_ERROR", "late"))
    body, task = await exported(client, pool)
    checked(body)
    assert (task["status"], task["error_info"]) == ("failure", ["VDI_IO_ERROR", "late"])


async def test_upstream_weakness_4_a_second_answer_in_the_body(
    client: Client, pool: SimulatedPool
) -> None:
    pool.fail("/export", cut="http500", after_bytes=2_000_000)
    body, task = await exported(client, pool)
    assert body[2_000_000:].startswith(b"HTTP/1.1 500 Internal Error\r\n")
    assert task["status"] == "failure"
    with pytest.raises(Corrupt, match="stands in the data at byte 2000000"):
        checked(body)


async def test_a_reset_is_a_reset(client: Client, pool: SimulatedPool) -> None:
    pool.fail("/export", cut="reset", after_bytes=500_000)
    vm, task = await snapshot(client, pool)
    with pytest.raises(httpx.ReadError):
        await client.export(vm, task)
    assert (await client.settled(task))["status"] == "failure"
    assert "dom0_vbds" not in pool.leftovers()


@pytest.mark.parametrize("after", [0, 1_000_000])
async def test_a_stall_ends_when_the_client_leaves(
    client: Client, pool: SimulatedPool, after: int
) -> None:
    pool.fail("/export", cut="stall", after_bytes=after)
    vm, task = await snapshot(client, pool)
    with trio.move_on_after(0.2) as scope:
        await client.export(vm, task)
    assert scope.cancelled_caught
    with trio.fail_after(2):
        assert (await client.settled(task))["status"] == "failure"
    assert {"dom0_vbds", "transfers", "current_operations"}.isdisjoint(pool.leftovers())


async def test_a_task_cancel_ends_the_transfer(client: Client, pool: SimulatedPool) -> None:
    gate = pool.pause_at("/export", at_bytes=1_000_000)
    vm, task = await snapshot(client, pool)
    async with trio.open_nursery() as nursery:
        bodies: list[bytes] = []

        async def export() -> None:
            bodies.append(await client.export(vm, task))

        nursery.start_soon(export)
        await gate.reached()
        await client.call("task.cancel", task)
    assert len(bodies[0]) == 1_000_000
    record = await client.settled(task)
    assert (record["status"], record["error_info"]) == ("cancelled", ["TASK_CANCELLED", task])


async def test_a_slow_stream(client: Client, pool: SimulatedPool) -> None:
    pool.fail("/export", rate=20_000_000)
    vm, task = await snapshot(client, pool)
    started = trio.current_time()
    body = await client.export(vm, task)
    assert trio.current_time() - started >= len(body) / 20_000_000 * 0.9


# Import


async def test_the_probe_leaves_nothing(client: Client, pool: SimulatedPool) -> None:
    answer = await client.http.put(client.data_url("/import/", sr_id=pool.srs[0]), content=b"")
    assert answer.status_code == 200
    assert not pool.leftovers()


async def test_chunked_bodies_are_refused(client: Client, pool: SimulatedPool) -> None:
    async def body() -> object:
        yield b"x"

    task = await client.call("task.create", "x", "")
    answer = await client.http.put(
        client.data_url("/import/", task_id=task),
        content=body(),  # type: ignore[arg-type]
    )
    assert answer.status_code == 403
    assert (await client.settled(task))["error_info"] == ["IMPORT_ERROR_CANNOT_HANDLE_CHUNKED"]


async def halted(client: Client, pool: SimulatedPool) -> bytes:
    task = await client.call("task.create", "x", "")
    body = await client.export(pool.vm("vm2"), task)
    await client.call("task.destroy", task)
    return body


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda body: body[:-1024], "IMPORT_ERROR_PREMATURE_EOF"),
        (lambda body: body[: len(body) // 2], "IMPORT_ERROR_PREMATURE_EOF"),
        (lambda body: b"x" * 2048, "IMPORT_ERROR"),
        (
            lambda body: body[:-1_000_000] + b"!!!" + body[-999_997:],
            "IMPORT_ERROR_SOME_CHECKSUMS_FAILED",
        ),
    ],
)
async def test_a_bad_archive_fails_in_the_task_and_leaves_nothing(
    client: Client, pool: SimulatedPool, spoil: object, code: str
) -> None:
    assert callable(spoil)
    body = spoil(await halted(client, pool))
    task = await client.call("task.create", "x", "")
    answer = await client.put(body, task)
    assert answer.status_code == 200, "the answer comes before the data"
    assert (await client.settled(task))["error_info"][0] == code
    await client.call("task.destroy", task)
    assert not pool.leftovers()


async def test_upstream_weakness_5_an_import_that_fails_after_its_200(
    client: Client, pool: SimulatedPool
) -> None:
    body = await halted(client, pool)
    pool.fail("/import", error=("SR_FULL", "1", "2"))
    task = await client.call("task.create", "x", "")
    assert (await client.put(body, task)).status_code == 200
    assert (await client.settled(task))["error_info"] == ["SR_FULL", "1", "2"]
    await client.call("task.destroy", task)
    assert not pool.leftovers()


async def test_an_unknown_length_is_announced_as_a_pebibyte(
    client: Client, pool: SimulatedPool
) -> None:
    """The client waits for the early 200, the pool for the end of the archive."""
    body = await halted(client, pool)
    task = await client.call("task.create", "x", "")
    target = client.data_url("/import/", task_id=task)
    port = httpx.URL(client.url).port
    assert port is not None
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(
            b"PUT %s HTTP/1.1\r\nhost: x\r\ncontent-length: 1125899906842624\r\n\r\n"
            % target.raw_path
        )
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 OK\r\n")
        await stream.send_all(body)
        assert (await client.settled(task))["status"] == "success"


async def test_a_client_that_dies_in_an_import_leaves_nothing(
    client: Client, pool: SimulatedPool
) -> None:
    body = await halted(client, pool)
    task = await client.call("task.create", "x", "")
    target = client.data_url("/import/", task_id=task)
    stream = await trio.open_tcp_stream("127.0.0.1", httpx.URL(client.url).port or 0)
    gate = pool.pause_at("/import", at_bytes=50_000)
    head = b"PUT %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    await stream.send_all(head % (target.raw_path, len(body)) + body[:100_000])
    await gate.reached()
    linger = struct.pack("ii", 1, 0)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    stream.socket.close()
    with trio.fail_after(2):
        await gate.left()
        assert (await client.settled(task))["status"] == "failure"
    await client.call("task.destroy", task)
    assert not pool.leftovers()


async def test_raw_export_of_a_disk(client: Client, pool: SimulatedPool) -> None:
    [uuid] = pool.disk_uuids(pool.vm("vm2"))
    url = client.data_url("/export_raw_vdi/", vdi=uuid, format="raw")
    answer = await client.http.get(url)
    assert answer.content == b"".join(pool.disk_bytes(uuid))


async def test_a_file_as_a_disk(tmp_path: object, nursery: trio.Nursery) -> None:
    import hashlib
    from functools import partial
    from pathlib import Path

    from proxy.simulator import serve

    image = Path(str(tmp_path)) / "disk.img"
    content = b"a" * 700_000 + bytes(3 << 20) + b"b" * 1000
    content += bytes(-len(content) % 512)
    image.write_bytes(content)
    pool = SimulatedPool()
    pool.add_file_vm("vm1", image, running=False)
    await nursery.start(partial(serve, pool))
    [uuid] = pool.disk_uuids(pool.vm("vm1"))
    assert pool.digest(uuid) == hashlib.sha256(content).hexdigest()
    async with httpx.AsyncClient() as http:
        client = Client(pool.url, http)
        await client.login()
        task = await client.call("task.create", "x", "")
        body = checked(await client.export(pool.vm("vm1"), task))
        target = await client.call("task.create", "x", "")
        await client.put(body, target)
        assert (await client.settled(target))["status"] == "success"
    copy = [ref for ref, _ in pool.store.all("VM")][-1]
    assert pool.digest(pool.disk_uuids(copy)[0]) == pool.digest(uuid)


async def test_tls(nursery: trio.Nursery) -> None:
    from functools import partial

    from proxy.simulator import serve

    pool = SimulatedPool.small(running=False)
    await nursery.start(partial(serve, pool, tls=True))
    assert pool.url.startswith("https://")
    async with httpx.AsyncClient(verify=False) as http:
        client = Client(pool.url, http)
        await client.login()
        task = await client.call("task.create", "x", "")
        checked(await client.export(pool.vm("vm1"), task))
