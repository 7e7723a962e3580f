"""Disks over HTTP, read and written by ``qemu-img`` and by a reader of VHD that is only here."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.simulator import SimulatedPool
from proxy.simulator.disks import BLOCK, UNIT, DiskContent, Stamped
from proxy.simulator.vhd_images import VhdReceiver
from tests.simulator.conftest import ODD_SIZE, Client, content, one_odd_disk


@pytest.fixture
async def pool(nursery: trio.Nursery) -> SimulatedPool:
    return await one_odd_disk(nursery)


async def empty(client: Client, pool: SimulatedPool, size: int = ODD_SIZE) -> str:
    return str(await client.call("VDI.create", {"SR": pool.srs[1], "virtual_size": size}))


# A reader of VHD that shares nothing with the simulator


def number(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "big")


def summed(data: bytes, at: int) -> bool:
    stored = data[at : at + 4]
    return number(stored, 0, 4) == ~(sum(data) - sum(stored)) & 0xFFFFFFFF


def places(stream: bytes) -> dict[int, int]:
    """Where each block of a stream stands."""
    table = number(stream, 512 + 16, 8)
    entries = [number(stream, table + 4 * each, 4) for each in range(number(stream, 512 + 28, 4))]
    return {block: 512 * at for block, at in enumerate(entries) if at != 0xFFFFFFFF}


def applied(stream: bytes, under: bytes) -> bytes:
    """A disk after the stream's blocks were written over it."""
    footer, header = stream[:512], stream[512:1536]
    assert footer.startswith(b"conectix")
    assert header.startswith(b"cxsparse")
    assert summed(footer, 64)
    assert summed(header, 36)
    assert stream[-512:] == footer
    size = number(footer, 48, 8)
    disk = bytearray(under.ljust(size, b"\0"))
    end = len(stream) - 512
    for block, at in sorted(places(stream).items(), key=lambda pair: -pair[1]):
        assert at + 512 + BLOCK == end, "the blocks follow each other up to the footer"
        assert stream[at : at + 512] == b"\xff" * 512
        disk[block * BLOCK : (block + 1) * BLOCK] = stream[at + 512 : end]
        end = at
    assert not any(disk[size:])
    return bytes(disk[:size])


def qemu(*words: str | Path) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, words)],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def qemu_reads(stream: bytes, folder: Path) -> bytes:
    (folder / "a.vhd").write_bytes(stream)
    source = f"driver=vpc,force_size_calc=current_size,file.filename={folder / 'a.vhd'}"
    qemu("convert", "--image-opts", source, "-O", "raw", folder / "a.raw")
    return (folder / "a.raw").read_bytes()


def qemu_writes(disk: bytes, folder: Path, options: str) -> bytes:
    (folder / "b.raw").write_bytes(disk)
    qemu("convert", "-f", "raw", "-O", "vpc", "-o", options, folder / "b.raw", folder / "b.vhd")
    return (folder / "b.vhd").read_bytes()


# Out


async def test_a_full_vhd(client: Client, pool: SimulatedPool, vdi: str, tmp_path: Path) -> None:
    disk = content(pool, vdi)
    stream, task = await client.export_disk(vdi, format="vhd")
    assert (task["status"], task["result"], task["progress"]) == ("success", "", 1)
    assert applied(stream, b"") == disk
    assert qemu_reads(stream, tmp_path) == disk
    assert number(stream, 60, 4) == 3
    uuid = await client.call("VDI.get_uuid", vdi)
    assert UUID(bytes=stream[68:84]) not in (UUID(uuid), UUID(int=0))
    again, _ = await client.export_disk(uuid, format="VHD")
    assert stream[68:84] != again[68:84], "each export has an id of its own"
    held = [block for block in range(6) if any(disk[block * BLOCK : (block + 1) * BLOCK])]
    assert sorted(places(stream)) == held
    assert 0 < len(held) < 6


@pytest.mark.parametrize("size", [512, UNIT, BLOCK, 64 * BLOCK, 300 * BLOCK, 33 << 30, 130 << 30])
def test_headers_of_all_sizes(size: int, tmp_path: Path) -> None:
    """What qemu accepts as a disk of that size, also beyond what a geometry can tell."""
    from proxy.simulator.images import FORMATS, Sending

    pieces, length = FORMATS["vhd"].send(Sending(content=DiskContent(size), uuid=UUID(int=5)))
    stream = b"".join(pieces)
    assert len(stream) == length
    assert number(stream, 48, 8) == size
    (tmp_path / "a.vhd").write_bytes(stream)
    source = f"driver=vpc,force_size_calc=current_size,file.filename={tmp_path / 'a.vhd'}"
    told = json.loads(qemu("info", "--output=json", "--image-opts", source))
    assert told["virtual-size"] == size


async def test_a_differencing_vhd(client: Client, pool: SimulatedPool, vdi: str) -> None:
    vm = pool.vm("vm1")
    [uuid] = pool.disk_uuids(vm)
    base = pool.vms.disks(await client.call("VM.snapshot", vm, "base"))[0]
    old = content(pool, base)
    pool.mutate(uuid, [1, 5])
    pool.write(uuid, 2 * BLOCK, bytes(BLOCK))
    new = pool.vms.disks(await client.call("VM.snapshot", vm, "new"))[0]
    stream, task = await client.export_disk(new, format="vhd", base=base)
    assert task["status"] == "success"
    assert number(stream, 60, 4) == 4
    assert list(places(stream)) == [1, 2, 5], "zeros over data travel too"
    assert applied(stream, old) == content(pool, new)
    name = stream[576:1088].decode("utf-16-be").rstrip("\0")
    base_uuid = await client.call("VDI.get_uuid", base)
    assert name.endswith(f"/{base_uuid}.vhd")
    assert stream[1088:1092] == b"MacX"
    assert UUID(bytes=stream[552:568]) not in (UUID(base_uuid), UUID(int=0))
    by_uuid, _ = await client.export_disk(new, format="vhd", base=base_uuid)
    assert by_uuid[552:568] == stream[552:568], "the file under the base keeps its id"
    none, _ = await client.export_disk(base, format="vhd", base=base)
    assert places(none) == {}
    raw, _ = await client.export_disk(new, format="raw", base=base)
    assert raw == b"".join(
        content(pool, new)[at : at + BLOCK]
        if at // BLOCK in (1, 2, 5)
        else bytes(min(BLOCK, ODD_SIZE - at))
        for at in range(0, ODD_SIZE, BLOCK)
    )


async def test_a_disk_that_grew(client: Client, pool: SimulatedPool, vdi: str) -> None:
    vm = pool.vm("vm1")
    base = pool.vms.disks(await client.call("VM.snapshot", vm, "base"))[0]
    pool.grow(pool.disk_uuids(vm)[0], ODD_SIZE + 10 * BLOCK)
    pool.mutate(pool.disk_uuids(vm)[0], [12])
    stream, _ = await client.export_disk(vdi, format="vhd", base=base)
    assert list(places(stream)) == [12]
    assert applied(stream, content(pool, base)) == content(pool, vdi)


async def test_an_export_is_of_the_moment_it_began(
    client: Client, pool: SimulatedPool, vdi: str
) -> None:
    before = content(pool, vdi)
    gate = pool.pause_at("/export_raw_vdi", at_bytes=1000)
    async with trio.open_nursery() as nursery:
        bodies: list[bytes] = []

        async def export() -> None:
            bodies.append((await client.export_disk(vdi, format="vhd"))[0])

        nursery.start_soon(export)
        await gate.reached()
        assert len(pool.leftovers()["dom0_vbds"]) == 1
        pool.mutate(pool.disk_uuids(pool.vm("vm1"))[0], 1.0)
        gate.release()
    assert applied(bodies[0], b"") == before
    assert content(pool, vdi) != before


async def test_what_is_refused_before_an_export(
    client: Client, pool: SimulatedPool, vdi: str
) -> None:
    async def refused(status: int, **params: str) -> dict[str, Any]:
        task = await client.new_task()
        url = client.data_url("/export_raw_vdi/", task_id=task, **params)
        assert (await client.http.get(url)).status_code == status
        return dict(pool.store.get("task", task))

    assert (await refused(500))["status"] == "pending"
    assert (await refused(500, vdi="unknown"))["status"] == "pending"
    task = await refused(404, vdi=vdi, format="zip")
    assert task["error_info"] == ["INTERNAL_ERROR", "Unknown format zip"]


@pytest.mark.parametrize("what", ["size", "base", "cbt base", "cbt", "in use"])
async def test_what_fails_an_export_after_its_200(
    client: Client, pool: SimulatedPool, vdi: str, what: str
) -> None:
    """The error stands in the body, where the first bytes of the stream should be."""
    vm = pool.vm("vm1")
    params = {"format": "vhd"}
    if what == "size":
        vdi = pool.disks.create(DiskContent((2040 << 30) + 512), SR=pool.default_sr)
        expected = ["VDI_TOO_LARGE", vdi, str(2040 << 30)]
    elif what == "base":
        params["base"] = "0000"
        expected = ["UUID_INVALID", "VDI", "0000"]
    elif what == "in use":
        pool.do("VM.start", vm, False, False)
        expected = ["VDI_IN_USE", vdi]
    else:
        pool.do("VDI.enable_cbt", vdi)
        snapshot = pool.do("VM.snapshot", vm, "s")
        [frozen] = pool.vms.disks(snapshot)
        pool.do("VM.destroy", snapshot)
        pool.do("VDI.data_destroy", frozen)
        expected = ["VDI_INCOMPATIBLE_TYPE", frozen, "cbt_metadata"]
        if what == "cbt":
            vdi = frozen
        else:
            params["base"] = frozen
    body, task = await client.export_disk(vdi, **params)
    assert body.startswith(b"HTTP/1.1 500 Internal Error\r\n")
    assert (task["status"], task["error_info"]) == ("failure", expected)
    assert "dom0_vbds" not in pool.leftovers()


async def test_faults_of_an_export(client: Client, pool: SimulatedPool, vdi: str) -> None:
    whole, _ = await client.export_disk(vdi, format="vhd")
    pool.fail("/export_raw_vdi", damage="no footer")
    body, task = await client.export_disk(vdi, format="vhd")
    assert (len(body), task["status"]) == (len(whole) - 512, "success")
    assert len(body) == max(places(body).values()) + 512 + BLOCK
    pool.fail("/export_raw_vdi", damage="partial bitmap")
    body, task = await client.export_disk(vdi, format="vhd")
    first = min(places(body).values())
    assert body[first : first + 512] == b"\xff" * 511 + b"\xfe"
    assert body[first + 512 : -512] == whole[first + 512 : -512]
    pool.fail("/export_raw_vdi", cut="http500", after_bytes=0)
    body, task = await client.export_disk(vdi, format="vhd")
    assert body.startswith(b"HTTP/1.1 500")
    assert task["error_info"][0] == "VDI_IO_ERROR"
    pool.fail("/export_raw_vdi", cut="end", after_bytes=len(whole) - 600, task="success")
    body, task = await client.export_disk(vdi, format="vhd")
    assert (len(body), task["status"]) == (len(whole) - 600, "success")
    pool.fail("/export_raw_vdi", error=("VDI_IO_ERROR", "late"))
    body, task = await client.export_disk(vdi, format="vhd")
    assert (len(body), task["error_info"]) == (len(whole), ["VDI_IO_ERROR", "late"])
    assert "dom0_vbds" not in pool.leftovers()


# In


@pytest.mark.parametrize("options", ["subformat=dynamic,force_size=on", "subformat=dynamic"])
async def test_what_qemu_wrote_is_imported(
    client: Client, pool: SimulatedPool, vdi: str, tmp_path: Path, options: str
) -> None:
    disk = content(pool, vdi)
    body = qemu_writes(disk, tmp_path, options)
    size = number(body, 48, 8)
    assert (size == ODD_SIZE) == ("force_size" in options), "qemu rounds up to whole cylinders"
    target = await empty(client, pool, size)
    answer, task = await client.import_disk(target, body, format="vhd")
    assert answer.status_code == 200
    assert (task["status"], task["result"]) == ("success", f"<value>{target}</value>")
    assert content(pool, target) == disk.ljust(size, b"\0")


async def test_what_came_out_goes_in_without_memory(
    client: Client, pool: SimulatedPool, vdi: str
) -> None:
    stream, _ = await client.export_disk(vdi, format="vhd")
    target = await empty(client, pool)
    await client.import_disk(target, stream, format="vhd")
    assert pool.disks.contents[target].changed_units(pool.disks.contents[vdi]) == []
    units = pool.disks.contents[target]
    kinds = {type(units.stored(number)) for number in range(ODD_SIZE // UNIT)}
    assert kinds == {Stamped, type(None)}
    assert await client.call("VDI.get_physical_utilisation", target) > 0


async def test_blocks_come_in_any_order(client: Client, pool: SimulatedPool, vdi: str) -> None:
    stream, _ = await client.export_disk(vdi, format="vhd")
    at = places(stream)
    shuffled = list(at)[1:] + list(at)[:1]
    start = min(at.values())
    made = bytearray(stream[:start])
    for block in shuffled:
        table = number(stream, 512 + 16, 8) + 4 * block
        # a hole before each block: it must be skipped
        made += b"?" * 512
        made[table : table + 4] = (len(made) // 512).to_bytes(4, "big")
        made += stream[at[block] : at[block] + 512 + BLOCK]
    made += stream[-512:]
    target = await empty(client, pool)
    _, task = await client.import_disk(target, bytes(made), format="vhd")
    assert task["status"] == "success"
    assert content(pool, target) == content(pool, vdi)


async def test_a_differencing_import_writes_over_what_is_there(
    client: Client, pool: SimulatedPool, vdi: str
) -> None:
    vm = pool.vm("vm1")
    base = pool.vms.disks(await client.call("VM.snapshot", vm, "base"))[0]
    pool.mutate(pool.disk_uuids(vm)[0], [0, 4])
    delta, _ = await client.export_disk(vdi, format="vhd", base=base)
    clone = await client.call("VDI.clone", base)
    _, task = await client.import_disk(clone, delta, format="vhd")
    assert task["status"] == "success"
    assert content(pool, clone) == content(pool, vdi)
    assert content(pool, base) != content(pool, vdi)


async def test_only_the_sectors_of_the_bitmap_are_written(
    client: Client, pool: SimulatedPool, vdi: str
) -> None:
    stream, _ = await client.export_disk(vdi, format="vhd")
    block, at = min(places(stream).items(), key=lambda pair: pair[1])
    bitmap = bytearray(b"\xff" * 512)
    bitmap[0], bitmap[300], bitmap[511] = 0x7F, 0x3C, 0
    body = stream[:at] + bytes(bitmap) + stream[at + 512 :]
    target = await empty(client, pool)
    _, task = await client.import_disk(target, body, format="vhd")
    assert task["status"] == "success"
    expected = bytearray(content(pool, vdi))
    gone = [0, *(300 * 8 + bit for bit in (0, 1, 6, 7)), *range(511 * 8, 512 * 8)]
    for sector in gone:
        start = block * BLOCK + sector * 512
        expected[start : start + 512] = bytes(512)
    assert content(pool, target) == bytes(expected)


@pytest.mark.parametrize("at", [0, 100, 512, 1000, 1536, 2048, 2100, 3000, BLOCK, -2000, -512, -1])
async def test_a_cut_import_fails_and_is_a_leftover(
    client: Client, pool: SimulatedPool, vdi: str, at: int
) -> None:
    stream, _ = await client.export_disk(vdi, format="vhd")
    target = await empty(client, pool)
    pool.mark()
    answer, task = await client.import_disk(target, stream[:at], format="vhd")
    assert answer.status_code == 200
    assert b"HTTP/1.1 500" in answer.content
    assert task["error_info"] == ["VDI_IO_ERROR", "Device I/O errors"]
    await client.call("task.destroy", pool.store.by_uuid("task", task["uuid"]))
    assert pool.leftovers().keys() == ({"unfinished"} if stream[:at] else set())
    await client.import_disk(target, stream, format="vhd")
    assert "unfinished" not in pool.leftovers()


async def test_the_announced_length_counts(client: Client, pool: SimulatedPool, vdi: str) -> None:
    """A pebibyte is announced when the length is unknown: the data are there, the task fails."""
    stream, _ = await client.export_disk(vdi, format="vhd")
    target = await empty(client, pool)
    task = await client.new_task()
    url = client.data_url("/import_raw_vdi/", vdi=target, task_id=task, format="vhd")
    raw = await trio.open_tcp_stream("127.0.0.1", httpx.URL(client.url).port or 0)
    async with raw:
        head = b"PUT %s HTTP/1.1\r\nhost: x\r\ncontent-length: 1125899906842624\r\n\r\n"
        await raw.send_all(head % url.raw_path + stream)
        await raw.send_eof()
        assert (await client.settled(task))["error_info"][0] == "VDI_IO_ERROR"
    assert content(pool, target) == content(pool, vdi)


@pytest.mark.parametrize("what", ["larger", "a block too many", "beyond the end", "overlap"])
async def test_a_stream_that_does_not_fit(
    client: Client, pool: SimulatedPool, vdi: str, what: str
) -> None:
    disk = bytearray(content(pool, vdi))
    disk[-1:] = b"x"
    pool.write(pool.disk_uuids(pool.vm("vm1"))[0], 0, bytes(disk))
    size = {"larger": ODD_SIZE - BLOCK, "beyond the end": ODD_SIZE - 512}.get(what, ODD_SIZE)
    body, _ = await client.export_disk(vdi, format="vhd")
    if what == "overlap":
        made = bytearray(body)
        table = number(body, 512 + 16, 8)
        [first, second] = list(places(body))[:2]
        made[table + 4 * second : table + 4 * second + 4] = (
            number(body, table + 4 * first, 4) + 1
        ).to_bytes(4, "big")
        body = bytes(made)
    elif what == "a block too many":
        # a small footer over a large table
        grown = pool.disks.contents[vdi].copy()
        grown.resize(ODD_SIZE + BLOCK)
        grown.mutate([6], 1)
        other = pool.disks.create(grown, SR=pool.default_sr)
        large, _ = await client.export_disk(other, format="vhd")
        body = body[:512] + large[512:-512] + body[:512]
    target = await empty(client, pool, size)
    _, task = await client.import_disk(target, body, format="vhd")
    assert task["error_info"] == ["VDI_IO_ERROR", "Device I/O errors"]


async def test_what_is_refused_before_an_import(
    client: Client, pool: SimulatedPool, vdi: str
) -> None:
    async def refused(
        status: int, body: Any = b"x", headers: dict[str, str] | None = None, **params: str
    ) -> list[str]:
        task = await client.new_task()
        url = client.data_url("/import_raw_vdi/", task_id=task, **params)
        answer = await client.http.put(url, content=body, headers=headers)
        assert answer.status_code == status
        return list(pool.store.get("task", task)["error_info"])

    async def chunks() -> Any:
        yield b"x"

    assert await refused(400) == ["VDI_MISSING"]
    assert await refused(500, vdi="unknown") == []
    assert await refused(404, vdi=vdi, format="zip") == ["INTERNAL_ERROR", "Unknown format zip"]
    assert await refused(404, chunks(), vdi=vdi, format="vhd") == [
        "INTERNAL_ERROR",
        "Cannot handle encoding: chunked",
    ]
    assert (await refused(404, vdi=vdi, format="vhd", chunked="true"))[0] == "INTERNAL_ERROR"
    assert (await refused(400, sr_id=pool.default_sr, format="vhd"))[0] == "INTERNAL_ERROR"
    assert "unfinished" not in pool.leftovers()


async def test_raw_images(client: Client, pool: SimulatedPool, vdi: str) -> None:
    disk = content(pool, vdi)
    target = await empty(client, pool)
    _, task = await client.import_disk(target, disk)
    assert task["status"] == "success"
    assert content(pool, target) == disk
    task_ref = await client.new_task()
    url = client.data_url("/import_raw_vdi/", sr_id=pool.srs[1], task_id=task_ref)
    await client.http.put(url, content=disk)
    made = (await client.settled(task_ref))["result"].removeprefix("<value>").split("<")[0]
    assert content(pool, made) == disk
    assert await client.call("VDI.get_name_label", made) == "Imported VDI"
    _, task = await client.import_disk(target, disk + bytes(512))
    assert task["error_info"][0] == "VDI_IO_ERROR"


async def test_a_disk_in_use_is_not_written(client: Client, pool: SimulatedPool, vdi: str) -> None:
    await client.call("VM.start", pool.vm("vm1"), False, False)
    disk = content(pool, vdi)
    answer, task = await client.import_disk(vdi, bytes(ODD_SIZE))
    assert task["error_info"] == ["VDI_IN_USE", vdi]
    assert b"VDI_IN_USE" in answer.content
    assert content(pool, vdi) == disk


async def test_the_probe_of_a_disk_leaves_nothing(client: Client, pool: SimulatedPool) -> None:
    target = await empty(client, pool)
    pool.mark()
    url = client.data_url("/import_raw_vdi/", vdi=target, format="vhd")
    assert (await client.http.put(url, content=b"")).status_code == 200
    assert pool.leftovers() == {}


async def test_an_import_that_fails_after_its_data(
    client: Client, pool: SimulatedPool, vdi: str
) -> None:
    stream, _ = await client.export_disk(vdi, format="vhd")
    target = await empty(client, pool)
    pool.fail("/import_raw_vdi", error=("SR_BACKEND_FAILURE_44", "", "full", ""))
    answer, task = await client.import_disk(target, stream, format="vhd")
    assert answer.content == b""
    assert task["error_info"][0] == "SR_BACKEND_FAILURE_44"
    assert pool.leftovers()["unfinished"] == [pool.store.get("VDI", target)["uuid"]]


async def test_a_cancelled_import(client: Client, pool: SimulatedPool, vdi: str) -> None:
    stream, _ = await client.export_disk(vdi, format="vhd")
    target = await empty(client, pool)
    gate = pool.pause_at("/import_raw_vdi", at_bytes=BLOCK)
    task = await client.new_task()
    url = client.data_url("/import_raw_vdi/", vdi=target, task_id=task, format="vhd")
    async with trio.open_nursery() as nursery:

        async def put() -> None:
            with contextlib.suppress(httpx.TransportError):
                await client.http.put(url, content=stream)

        nursery.start_soon(put)
        await gate.reached()
        await client.call("task.cancel", task)
        assert (await client.settled(task))["status"] == "cancelled"
    assert "dom0_vbds" not in pool.leftovers()
    assert "unfinished" in pool.leftovers()


# The receiver on its own


def whole_stream() -> bytes:
    from proxy.simulator.images import Sending
    from proxy.simulator.vhd_images import vhd_pieces

    disk = DiskContent(BLOCK + 512, kind="random", seed=3)
    disk.write(BLOCK, bytes(512))
    return b"".join(vhd_pieces(Sending(content=disk, uuid=UUID(int=1)))[0])


STREAM = whole_stream()
FRONT = 2560


@settings(max_examples=50)
@given(
    cuts=st.lists(st.integers(0, len(STREAM)), max_size=6),
    damage=st.lists(st.tuples(st.integers(0, FRONT - 1), st.integers(0, 255)), max_size=3),
    checked=st.booleans(),
)
def test_whatever_comes_is_written_or_refused(
    cuts: list[int], damage: list[tuple[int, int]], checked: bool
) -> None:
    """In whatever pieces; ``checked`` repairs the sums, so that the damage gets further."""
    body = bytearray(STREAM)
    for at, value in damage:
        body[at] = value
    if checked:
        for start, length, at in ((0, 512, 64), (512, 1024, 36)):
            part = body[start : start + length]
            total = ~(sum(part) - sum(part[at : at + 4])) & 0xFFFFFFFF
            body[start + at : start + at + 4] = total.to_bytes(4, "big")
    disk = DiskContent(BLOCK + 512)
    receiver = VhdReceiver(disk, len(body))
    edges = [0, *sorted(cuts), len(body)]
    try:
        for start, end in itertools.pairwise(edges):
            receiver.feed(bytes(body[start:end]))
        receiver.finish()
    except Corrupt:
        assert body != STREAM
        return
    if body == STREAM:
        assert b"".join(disk.chunks()) == applied(STREAM, b"")
