"""Disks over NBD, read by libnbd's and QEMU's programs; faults and the pool's state."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import trio

from proxy.simulator import SimulatedPool, SimulatorOptions, run_standalone
from proxy.simulator.certificate import certificate_pem
from tests.simulator.conftest import Client, Failure

MiB = 1024 * 1024


async def run(*command: str) -> CompletedProcess[bytes]:
    with trio.fail_after(30):
        return await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False
        )


async def uri(client: Client, vdi: str, **options: str) -> str:
    [info] = await client.call("VDI.get_nbd_info", vdi)
    scheme = "nbds" if options else "nbd"
    query = "&".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())
    return f"{scheme}://{info['address']}:{info['port']}/{quote(info['exportname'])}?{query}"


def disk(pool: SimulatedPool) -> tuple[str, str]:
    """Reference and UUID of a disk of a new snapshot."""
    vdi = pool.vms.disks(pool.do("VM.snapshot", pool.vm("vm1"), "s"))[0]
    pool.mark()
    return vdi, str(pool.store.get("VDI", vdi)["uuid"])


async def until_clean(pool: SimulatedPool) -> None:
    with trio.fail_after(2):
        while pool.leftovers():
            await trio.sleep(0.01)


@pytest.fixture(params=["insecure_nbd", "nbd"])
def security(request: Any, pool: SimulatedPool, tmp_path: Path) -> dict[str, str]:
    """Options of the URI for a pool that serves without or with TLS."""
    pool.enable_nbd(request.param)
    if request.param == "insecure_nbd":
        return {}
    (tmp_path / "ca-cert.pem").write_text(certificate_pem())
    return {"tls_certificates": str(tmp_path)}


async def test_libnbd_reads_the_disk(
    client: Client, pool: SimulatedPool, security: dict[str, str], tmp_path: Path
) -> None:
    pool.write(pool.disk_uuids(pool.vm("vm1"))[0], 2 * MiB, bytes(MiB))
    vdi, uuid = disk(pool)
    address = await uri(client, vdi, **security)
    told = await run("nbdinfo", "--json", address)
    assert told.returncode == 0, told.stderr
    report = json.loads(told.stdout)
    assert report["TLS"] == bool(security)
    [export] = report["exports"]
    assert export["export-size"] == 3 * MiB
    assert export["is_read_only"]
    copied = await run("nbdcopy", address, str(tmp_path / "copy"))
    assert copied.returncode == 0, copied.stderr
    assert hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest() == pool.digest(uuid)
    await until_clean(pool)


async def test_qemu_reads_the_disk(client: Client, pool: SimulatedPool, tmp_path: Path) -> None:
    pool.enable_nbd("insecure_nbd")
    vdi, uuid = disk(pool)
    address = (await uri(client, vdi)).removesuffix("?")
    copied = await run("qemu-img", "convert", "-O", "raw", address, str(tmp_path / "copy"))
    assert copied.returncode == 0, copied.stderr
    assert hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest() == pool.digest(uuid)
    await until_clean(pool)


async def test_who_may_not_read(client: Client, pool: SimulatedPool) -> None:
    vdi, uuid = disk(pool)
    assert await client.call("VDI.get_nbd_info", vdi) == []
    pool.enable_nbd("insecure_nbd")
    address = await uri(client, vdi)
    other = address.replace(uuid, "00000000-0000-0000-0000-000000000000")
    assert (await run("nbdinfo", other)).returncode == 1
    running = await uri(client, pool.vms.disks(pool.vm("vm1"))[0])
    assert (await run("nbdinfo", running)).returncode == 1
    assert (await run("nbdinfo", address)).returncode == 0
    pool.sessions.expire_all()
    assert (await run("nbdinfo", address)).returncode == 1
    pool.enable_nbd("nbd")  # the client does not start TLS
    assert (await run("nbdinfo", address)).returncode == 1
    pool.store.update("network", pool.network, purpose=[])
    assert (await run("nbdinfo", address)).returncode == 1
    await until_clean(pool)


async def test_no_disk_of_a_running_vm_is_served(client: Client, pool: SimulatedPool) -> None:
    pool.enable_nbd("insecure_nbd")
    address = await uri(client, pool.vms.disks(pool.vm("vm1"))[0])
    assert (await run("nbdinfo", address)).returncode == 1
    await until_clean(pool)


async def test_no_disk_without_data_is_served(client: Client, pool: SimulatedPool) -> None:
    pool.enable_nbd("insecure_nbd")
    live = pool.vms.disks(pool.vm("vm1"))[0]
    await client.call("VDI.enable_cbt", live)
    snapshot, _ = disk(pool)
    address = await uri(client, snapshot)
    for vbd in await client.call("VDI.get_VBDs", snapshot):
        await client.call("VM.destroy", await client.call("VBD.get_VM", vbd))
    await client.call("VDI.data_destroy", snapshot)
    with pytest.raises(Failure) as caught:
        await client.call("VDI.get_nbd_info", snapshot)
    assert caught.value.code == "VDI_INCOMPATIBLE_TYPE"
    assert (await run("nbdinfo", address)).returncode == 1


async def test_the_disk_is_attached_while_it_is_read(client: Client, pool: SimulatedPool) -> None:
    pool.enable_nbd("insecure_nbd")
    vdi, _ = disk(pool)
    address = await uri(client, vdi)
    gate = pool.pause_at("NBD.read")
    pool.dom0_lag = 0.05
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "nbdcopy", address, "null:")
        await gate.reached()
        assert list(pool.leftovers(connections=True)) == [
            "dom0_vbds",
            "transfers",
            "sessions",
            "connections",
        ]
        gate.release()
    assert "dom0_vbds" in pool.leftovers()
    await until_clean(pool)


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ("NBD", {"drop": "before"}),
        ("NBD", {"cut": "reset", "after_bytes": MiB}),
        ("NBD", {"cut": "end", "after_bytes": 20}),
        ("NBD.export", {"error": ("EPERM",)}),
        ("NBD.export", {"drop": "before"}),
        ("NBD.read", {"error": ("EIO",), "nth": 3}),
        ("NBD.read", {"drop": "before", "nth": 2}),
    ],
)
async def test_what_goes_wrong(
    client: Client, pool: SimulatedPool, point: str, fault: dict[str, Any]
) -> None:
    pool.enable_nbd("insecure_nbd")
    vdi, _ = disk(pool)
    address = await uri(client, vdi)
    programmed = pool.fail(point, **fault)
    failed = await run("nbdcopy", address, "null:")
    assert failed.returncode != 0
    assert programmed.hits == 1
    if point == "NBD.read" and "error" in fault:
        assert b"Input/output error" in failed.stderr
    assert (await run("nbdcopy", address, "null:")).returncode == 0
    await until_clean(pool)


async def test_a_size_that_is_not_the_disks(client: Client, pool: SimulatedPool) -> None:
    pool.enable_nbd("insecure_nbd")
    vdi, _ = disk(pool)
    pool.fail("NBD.export", size=8 * MiB)
    told = await run("nbdinfo", "--size", await uri(client, vdi))
    assert int(told.stdout) == 8 * MiB


async def test_at_most_sixteen_connections(client: Client, pool: SimulatedPool) -> None:
    pool.enable_nbd("insecure_nbd")
    vdi, _ = disk(pool)
    [info] = await client.call("VDI.get_nbd_info", vdi)
    streams = [await trio.open_tcp_stream(info["address"], info["port"]) for _ in range(16)]
    for stream in streams:
        assert (await stream.receive_some(100)).startswith(b"NBDMAGIC")
    one_more = await trio.open_tcp_stream(info["address"], info["port"])
    assert await one_more.receive_some(100) == b""
    for stream in [*streams, one_more]:
        await stream.aclose()
    await until_clean(pool)


async def test_the_program_serves_nbd() -> None:
    options = SimulatorOptions(nbd="insecure_nbd", running=False, disk_size=MiB)
    async with trio.open_nursery() as nursery:
        told = await nursery.start(run_standalone, options)
        async with httpx.AsyncClient(timeout=10) as http:
            client = Client(told["url"], http)
            await client.login()
            vdi = await client.call("VDI.get_by_uuid", told["vms"][0]["vdis"][0])
            size = await run("nbdinfo", "--size", await uri(client, vdi))
        nursery.cancel_scope.cancel()
    assert int(size.stdout) == MiB
