"""Exports and imports: whole, broken in every way, refused, and cancelled at every stage."""

# ruff: noqa: PT012 - the whole transfer is what must fail

from __future__ import annotations

import hashlib
import io
import tarfile
from functools import partial
from typing import Any, Literal
from unittest import mock

import pytest
import trio
import zstandard

from proxy.errors import ProxyError, Unauthorized, Unreachable, XapiError
from proxy.simulator import SimulatedPool, serve
from proxy.simulator.pool import PASSWORD
from proxy.xapi import Upload, Xapi, XapiOptions, client, connect, transfer

from .conftest import FakeHost, Request, cancel_at, clean

MiB = 1024 * 1024


@pytest.fixture
def snapshot(pool: SimulatedPool) -> str:
    ref = str(pool.do("VM.snapshot", pool.vm("vm1"), "s"))
    pool.mark()
    return ref


async def export(xapi: Xapi, ref: str, compression: Literal["none", "native", "zstd"]) -> bytes:
    content = bytearray()
    view = memoryview(bytearray(256 * 1024))
    async with xapi.export_vm(ref, compression=compression) as body:
        while count := await body.read_into(view):
            content += view[:count]
        await body.finish()
        assert body.received == len(content)
    return bytes(content)


async def put(upload: Upload, content: bytes) -> None:
    for start in range(0, len(content), MiB):
        await upload.write(memoryview(content)[start : start + MiB])


def entries(archive: bytes) -> list[str]:
    """The names in an XVA, read by the standard library's tar."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getnames()


async def test_an_export_is_whole(pool: SimulatedPool, xapi: Xapi, snapshot: str) -> None:
    plain = await export(xapi, snapshot, "none")
    names = entries(plain)
    assert names[0] == "ova.xml"
    assert len([name for name in names if name.endswith("/00000000")]) == 2
    packed = await export(xapi, snapshot, "zstd")
    with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
        assert entries(reader.read()) == names
    assert (await export(xapi, snapshot, "native"))[:2] == b"\x1f\x8b"
    await clean(pool)


async def test_an_import_brings_the_disks_back(
    pool: SimulatedPool, xapi: Xapi, snapshot: str
) -> None:
    content = await export(xapi, snapshot, "none")
    sr = pool.store.get("pool", pool.ref)["default_SR"]
    async with xapi.import_vm(sr, length=len(content)) as upload:
        await put(upload, content)
        (vm,) = await upload.finish()
    assert [pool.digest(uuid) for uuid in pool.disk_uuids(vm)] == [
        pool.digest(uuid) for uuid in pool.disk_uuids(snapshot)
    ]
    assert not pool.leftovers().get("tasks")


async def test_over_tls(nursery: trio.Nursery) -> None:
    pool = SimulatedPool.small()
    url = await nursery.start(partial(serve, pool, tls=True))
    ref = str(pool.do("VM.snapshot", pool.vm("vm1"), "s"))
    async with connect(XapiOptions(url, "root", PASSWORD, allow_unauthorized=True)) as xapi:
        content = await export(xapi, ref, "none")
        sr = pool.store.get("pool", pool.ref)["default_SR"]
        async with xapi.import_vm(sr, length=len(content)) as upload:
            await put(upload, content)
            assert await upload.finish()


@pytest.mark.parametrize("reads_on", [False, True], ids=["at its end", "at the connection's"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_an_archive_of_unknown_length_ends(
    nursery: trio.Nursery, compression: Any, tls: bool, reads_on: bool
) -> None:
    pool = SimulatedPool.small()
    pool.reads_on = reads_on
    url = await nursery.start(partial(serve, pool, tls=tls))
    ref = str(pool.do("VM.snapshot", pool.vm("vm1"), "s"))
    async with connect(XapiOptions(url, "root", PASSWORD, allow_unauthorized=True)) as xapi:
        content = await export(xapi, ref, compression)
        sr = pool.store.get("pool", pool.ref)["default_SR"]
        linger = mock.patch("proxy.xapi.transfer.LINGER_SECONDS", 0.1 if reads_on else 5)
        with linger, trio.fail_after(4):
            async with xapi.import_vm(sr, length=None) as upload:
                await put(upload, content)
                (vm,) = await upload.finish()
        assert upload.sent == len(content)
    assert [pool.digest(uuid) for uuid in pool.disk_uuids(vm)] == [
        pool.digest(uuid) for uuid in pool.disk_uuids(ref)
    ]


async def test_an_archive_of_unknown_length_that_is_cut_leaves_nothing(
    pool: SimulatedPool, xapi: Xapi, snapshot: str
) -> None:
    content = await export(xapi, snapshot, "none")
    sr = pool.store.get("pool", pool.ref)["default_SR"]
    with (
        mock.patch("proxy.xapi.transfer.LINGER_SECONDS", 0.1),
        trio.fail_after(4),
        pytest.raises(XapiError) as caught,
    ):
        async with xapi.import_vm(sr, length=None) as upload:
            await put(upload, content[: 2 * MiB])
            await upload.finish()
    assert caught.value.code == "IMPORT_ERROR_PREMATURE_EOF"
    await clean(pool)


# Breaks


@pytest.mark.parametrize("cut", ["reset", "end", "http500"])
@pytest.mark.parametrize("after", [0, 1000, 3 * MiB, None])
async def test_weakness_4_and_5_a_cut_export_never_succeeds(
    pool: SimulatedPool, xapi: Xapi, snapshot: str, cut: str, after: int | None
) -> None:
    """Upstream takes a clean early end, or an error page in the body, for the whole export."""
    pool.fail("/export", cut=cut, after_bytes=after, error=("VDI_IO_ERROR", "Device I/O errors"))
    with pytest.raises(ProxyError) as caught:
        await export(xapi, snapshot, "none")
    assert caught.value.code in ("VDI_IO_ERROR", "ECONNRESET")
    await clean(pool)


async def test_weakness_5_a_failed_task_behind_a_whole_body_is_a_failure(
    pool: SimulatedPool, xapi: Xapi, snapshot: str
) -> None:
    pool.fail("/export", error=("INTERNAL_ERROR", "late"))
    with pytest.raises(XapiError) as caught:
        await export(xapi, snapshot, "none")
    assert caught.value.code == "INTERNAL_ERROR"
    await clean(pool)


async def test_an_export_whose_task_never_ends_is_no_success(
    pool: SimulatedPool, xapi: Xapi, snapshot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "END_SECONDS", 0.1)
    monkeypatch.setattr(client, "SETTLE_SECONDS", 0.1)
    pool.fail("/export", cut="end", task="pending")
    with pytest.raises(Unreachable) as caught:
        with trio.fail_after(5):
            await export(xapi, snapshot, "none")
    assert caught.value.data["deadline"] == "VM export: end of the task"


async def test_a_silent_export_is_given_up(nursery: trio.Nursery) -> None:
    pool = SimulatedPool.small()
    url = await nursery.start(partial(serve, pool))
    ref = str(pool.do("VM.snapshot", pool.vm("vm1"), "s"))
    pool.mark()
    pool.fail("/export", cut="stall", after_bytes=MiB)
    async with connect(XapiOptions(url, "root", PASSWORD, inactivity_timeout=0.2)) as xapi:
        with pytest.raises(Unreachable) as caught, trio.fail_after(5):
            await export(xapi, ref, "none")
        assert caught.value.code == "ETIMEDOUT"
        await clean(pool)


async def test_the_first_byte_has_its_own_deadline(
    pool: SimulatedPool, xapi: Xapi, snapshot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "FIRST_BYTE_SECONDS", 0.2)
    pool.pause_at("/export")
    with pytest.raises(Unreachable) as caught, trio.fail_after(5):
        await export(xapi, snapshot, "none")
    assert caught.value.data["deadline"] == "VM export: first byte"
    await clean(pool)


async def test_a_refused_export_tells_the_hosts_reason(pool: SimulatedPool, xapi: Xapi) -> None:
    with pytest.raises(XapiError) as caught:
        await export(xapi, pool.vm("vm1"), "none")
    assert caught.value.code == "VM_BAD_POWER_STATE"
    await clean(pool)


async def test_an_import_that_fails_late_is_a_failure(
    pool: SimulatedPool, xapi: Xapi, snapshot: str
) -> None:
    content = await export(xapi, snapshot, "none")
    pool.fail("/import", error=("SR_FULL", "1", "2"))
    sr = pool.store.get("pool", pool.ref)["default_SR"]
    with pytest.raises(XapiError) as caught:
        async with xapi.import_vm(sr, length=len(content)) as upload:
            await put(upload, content)
            await upload.finish()
    assert caught.value.code == "SR_FULL"
    await clean(pool)


async def test_a_cut_import_tells_the_hosts_reason(
    pool: SimulatedPool, xapi: Xapi, snapshot: str
) -> None:
    content = await export(xapi, snapshot, "none")
    pool.fail("/import", cut="reset", after_bytes=2 * MiB, error=("SR_FULL", "1", "2"))
    sr = pool.store.get("pool", pool.ref)["default_SR"]
    with pytest.raises(XapiError) as caught:
        async with xapi.import_vm(sr, length=len(content)) as upload:
            await put(upload, content)
            await upload.finish()
    assert caught.value.code == "SR_FULL"
    await clean(pool)


async def test_more_or_less_than_announced_is_a_mistake_of_the_caller(
    pool: SimulatedPool, xapi: Xapi
) -> None:
    sr = pool.store.get("pool", pool.ref)["default_SR"]
    with pytest.raises(ValueError, match="more than"):
        async with xapi.import_vm(sr, length=3) as upload:
            await upload.write(memoryview(b"four"))
    with pytest.raises(ValueError, match="2 of 3"):
        async with xapi.import_vm(sr, length=3) as upload:
            await upload.write(memoryview(b"12"))
            await upload.finish()
    await clean(pool)


async def test_no_such_sr(pool: SimulatedPool, xapi: Xapi) -> None:
    with pytest.raises(XapiError) as caught:
        async with xapi.import_vm("OpaqueRef:none", length=3):
            pytest.fail("must be refused")
    assert caught.value.code == "HANDLE_INVALID"
    await clean(pool)


# Sessions and redirects


async def test_weakness_1_a_401_is_answered_by_a_new_login(
    pool: SimulatedPool, xapi: Xapi, snapshot: str
) -> None:
    """Upstream fails the transfer when its session has expired."""
    pool.fail("/export", status=401)
    assert entries(await export(xapi, snapshot, "none"))
    await clean(pool)


async def test_a_401_again_is_unauthorized(pool: SimulatedPool, xapi: Xapi, snapshot: str) -> None:
    pool.fail("/export", status=401, times=None)
    with trio.fail_after(5), pytest.raises(Unauthorized) as caught:
        await export(xapi, snapshot, "none")
    assert xapi.session.ref not in str(caught.value)
    await clean(pool)


async def test_a_redirect_within_the_pool_is_followed(nursery: trio.Nursery) -> None:
    pool = SimulatedPool.small()
    url = await nursery.start(partial(serve, pool, slave_host="127.0.0.2"))
    ref = str(pool.do("VM.snapshot", pool.vm("vm1"), "s"))
    fault = pool.fail("/export", redirect=url.replace("127.0.0.1", "127.0.0.2"))
    async with connect(XapiOptions(url, "root", PASSWORD)) as xapi:
        plain = await export(xapi, ref, "none")
        assert fault.hits == 1
        # An upload meets its redirect before the first byte of its body is sent.
        again = pool.fail("/import", redirect=url.replace("127.0.0.1", "127.0.0.2"))
        sr = pool.store.get("pool", pool.ref)["default_SR"]
        async with xapi.import_vm(sr, length=len(plain)) as upload:
            await put(upload, plain)
            assert await upload.finish()
        assert again.hits == 1


async def test_a_redirect_to_a_stranger_does_not_get_the_session(
    pool: SimulatedPool, xapi: Xapi, snapshot: str
) -> None:
    pool.fail("/export", redirect="http://127.0.0.99:1")
    with pytest.raises(Unreachable) as caught:
        await export(xapi, snapshot, "none")
    assert "stranger" in caught.value.message
    await clean(pool)


async def test_endless_redirects_end(pool: SimulatedPool, xapi: Xapi, snapshot: str) -> None:
    pool.fail("/export", redirect=pool.url, times=None)
    with trio.fail_after(15), pytest.raises(ProxyError):
        await export(xapi, snapshot, "none")
    await clean(pool)


# Framings that a proxy on the way may use


def framed(framing: str, content: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\n"
    if framing == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(content) + content
    if framing == "chunked":
        half = len(content) // 2
        parts = [content[:half], content[half:]]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + body
    if framing == "continue":
        return b"HTTP/1.1 100 Continue\r\n\r\n" + head + b"\r\n" + content
    return b"HTTP/1.0 200 OK\r\n\r\n" + content


@pytest.mark.parametrize("framing", ["length", "chunked", "close", "continue"])
@pytest.mark.parametrize("whole", [True, False])
async def test_framings(host: FakeHost, options: XapiOptions, framing: str, whole: bool) -> None:
    content = hashlib.sha256(b"x").digest() * 40_000
    message = framed(framing, content)

    async def answer(request: Request) -> None:
        await request.stream.send_all(message if whole else message[: len(message) // 2])
        host.settle("success" if whole else "failure", error=("VDI_IO_ERROR", "x"))

    host.transfer = answer
    host.results["VM.get_name_label"] = "vm1"
    async with connect(options) as xapi:
        if whole:
            assert await export(xapi, "OpaqueRef:vm", "none") == content
        else:
            with pytest.raises(ProxyError):
                await export(xapi, "OpaqueRef:vm", "none")
    assert host.tasks == {}


async def test_a_server_that_answers_nonsense(host: FakeHost, options: XapiOptions) -> None:
    async def answer(request: Request) -> None:
        await request.stream.send_all(b"SSH-2.0-OpenSSH\r\n\r\n")
        host.settle("failure", error=("VDI_IO_ERROR", "x"))

    host.transfer = answer
    host.results["VM.get_name_label"] = "vm1"
    async with connect(options) as xapi:
        with pytest.raises(ProxyError):
            await export(xapi, "OpaqueRef:vm", "none")
    assert host.tasks == {}


async def test_an_upload_to_a_host_that_answers_late(
    host: FakeHost, options: XapiOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "EARLY_SECONDS", 0.05)
    seen = bytearray()

    async def answer(request: Request) -> None:
        assert request.headers["content-length"] == "100000"
        assert "transfer-encoding" not in request.headers
        seen.extend(request.early)
        while len(seen) < 100_000:
            seen.extend(await request.stream.receive_some(65536))
        await request.stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        refs = "<value><array><data><value>OpaqueRef:new</value></data></array></value>"
        host.settle("success", refs)

    host.transfer = answer
    async with connect(options) as xapi:
        async with xapi.import_vm("OpaqueRef:sr", length=100_000) as upload:
            await upload.write(memoryview(bytes(100_000)))
            assert await upload.finish() == ["OpaqueRef:new"]
    assert len(seen) == 100_000
    assert [request.method for request in host.requests] == ["PUT"]  # no probe


# Cancel, at every stage


@pytest.mark.parametrize(
    "where", ["answer", "first byte", "middle", "end", "task end", "task.destroy"]
)
async def test_a_cancelled_export_leaves_nothing(
    pool: SimulatedPool, xapi: Xapi, snapshot: str, where: str
) -> None:
    match where:
        case "answer":
            gate = pool.pause_at("/export")
        case "first byte":
            gate = pool.pause_at("/export", at_bytes=0)
        case "middle":
            gate = pool.pause_at("/export", at_bytes=3 * MiB)
        case "end":
            gate = pool.pause_at("/export", at_bytes=1 << 40)
        case "task end":
            gate = pool.pause_at("/export", stage="after")
        case _:
            gate = pool.pause_at("task.destroy")
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(export, xapi, snapshot, "none")
                    await gate.reached()
                    nursery.cancel_scope.cancel()
                    gate.release()
            await clean(pool)
            return
    started = trio.current_time()
    await cancel_at(gate, partial(export, xapi, snapshot, "none"))
    assert trio.current_time() - started < 4
    await clean(pool)


@pytest.mark.parametrize("method", ["VM.get_name_label", "task.create"])
async def test_a_cancel_before_the_export_starts(
    pool: SimulatedPool, xapi: Xapi, snapshot: str, method: str
) -> None:
    gate = pool.pause_at(method)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(export, xapi, snapshot, "none")
            await gate.reached()
            nursery.cancel_scope.cancel()
            gate.release()
    await clean(pool)
    assert pool.transfer_log == []


async def test_data_stops_as_soon_as_an_export_is_left(
    pool: SimulatedPool, xapi: Xapi, snapshot: str
) -> None:
    view = memoryview(bytearray(MiB))
    pool.fail("/export", rate=2 * MiB)
    with trio.fail_after(5):
        async with xapi.export_vm(snapshot, compression="none") as body:
            await body.read_into(view)
        (done,) = pool.transfer_log
        sent = done.sent
    assert sent < 4 * MiB
    await clean(pool)


@pytest.mark.parametrize("where", ["answer", "start", "middle", "end", "after"])
@pytest.mark.parametrize("ignore_cancel", [False, True])
async def test_a_cancelled_import_leaves_nothing(
    pool: SimulatedPool, xapi: Xapi, snapshot: str, where: str, ignore_cancel: bool
) -> None:
    content = await export(xapi, snapshot, "none")
    sr = pool.store.get("pool", pool.ref)["default_SR"]
    if ignore_cancel:
        pool.fail("/import", ignore_cancel=True)
    match where:
        case "answer":
            gate = pool.pause_at("/import")
        case "after":
            gate = pool.pause_at("/import", stage="after")
        case _:
            at = {"start": 0, "middle": 2 * MiB, "end": len(content)}[where]
            gate = pool.pause_at("/import", at_bytes=at)

    async def run() -> None:
        async with xapi.import_vm(sr, length=len(content)) as upload:
            await put(upload, content)
            await upload.finish()

    await cancel_at(gate, run)
    await clean(pool)


async def test_an_import_that_succeeds_all_the_same_is_undone(
    pool: SimulatedPool, xapi: Xapi, snapshot: str
) -> None:
    """All bytes were sent and the host finished, but nobody called ``finish``."""
    content = await export(xapi, snapshot, "none")
    sr = pool.store.get("pool", pool.ref)["default_SR"]
    with pytest.raises(LookupError):
        async with xapi.import_vm(sr, length=len(content)) as upload:
            await put(upload, content)
            with trio.fail_after(5):
                while pool.transfer_log[-1].ended != "complete":
                    await trio.sleep(0.01)
            raise LookupError
    await clean(pool)


async def test_what_was_finished_stays(pool: SimulatedPool, xapi: Xapi, snapshot: str) -> None:
    content = await export(xapi, snapshot, "none")
    sr = pool.store.get("pool", pool.ref)["default_SR"]
    refs: list[Any] = []
    with pytest.raises(LookupError):
        async with xapi.import_vm(sr, length=len(content)) as upload:
            await put(upload, content)
            refs += await upload.finish()
            raise LookupError
    assert pool.store.find("VM", refs[0]) is not None


async def test_no_secret_in_any_message(
    pool: SimulatedPool, xapi: Xapi, snapshot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "EXPLAIN_SECONDS", 0.1)
    for fault in ({"status": 500}, {"status": 403}, {"cut": "reset", "after_bytes": 100}):
        pool.fail("/export", **fault)
        with pytest.raises(ProxyError) as caught:
            await export(xapi, snapshot, "none")
        assert xapi.session.ref not in repr((caught.value, caught.value.data))
        assert PASSWORD not in repr((caught.value, caught.value.data))
        await clean(pool)
