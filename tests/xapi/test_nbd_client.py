"""Reading disks over NBD: from servers of others, from the pool, from broken ones."""

from __future__ import annotations

import contextlib
import gc
import random
import socket
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.disks.disk import Blocks, block_pool
from proxy.errors import Corrupt, ProxyError, Unreachable, XapiError
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE, STORED_BLOCK
from proxy.runtime.threads import Work, limiter
from proxy.simulator import SimulatedPool, serve
from proxy.simulator.pool import PASSWORD
from proxy.xapi import Xapi, XapiOptions, connect
from proxy.xapi.nbd_client import NbdDisk, NbdExport, connect_nbd, nbd_candidates, open_nbd
from proxy.xapi.nbd_dial import NbdInfo
from tests.certificates import Identity, make, write
from tests.xapi.conftest import cancel_at, clean
from tests.xapi.nbd_peers import HELLO, Peer, listening, nbdkit, qemu_nbd, reply

MiB = 1024 * 1024
QUICK = (0.0, 0.0, 0.0, 0.0, 0.0)
"""Retry delays that do not wait."""


def info(port: int, name: str = "name", **how: Any) -> NbdInfo:
    return NbdInfo("127.0.0.1", port, name, **how)


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def pattern(size: int) -> bytes:
    """What nbdkit's pattern plugin serves: each 8 bytes are their offset."""
    offsets = array("Q", range(0, size + 7, 8))
    offsets.byteswap()
    return offsets.tobytes()[:size]


async def whole(export: NbdExport, *, depth: int = 4) -> bytes:
    """The disk, its blocks read in random order, several at once."""
    count = -(-export.size // BLOCK_SIZE)
    blocks = [bytearray(b"\xff" * STORED_BLOCK) for _ in range(count)]
    left = list(range(count))
    random.Random(1).shuffle(left)  # the same order every time

    async def work() -> None:
        while left:
            index = left.pop()
            await export.read_block(index, memoryview(blocks[index]))

    async with trio.open_nursery() as nursery:
        for _ in range(depth):
            nursery.start_soon(work)
    assert all(block[:BITMAP_SIZE] == b"\xff" * BITMAP_SIZE for block in blocks)
    content = b"".join(block[BITMAP_SIZE:] for block in blocks)
    assert not any(content[export.size :])
    return content[: export.size]


async def one(export: NbdExport, index: int = 0) -> bytes:
    block = bytearray(STORED_BLOCK)
    await export.read_block(index, memoryview(block))
    return bytes(block[BITMAP_SIZE:])


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.001)


@pytest.fixture(autouse=True)
def no_leaks() -> Any:
    """After each test no socket is open and no thread is at work that was not before."""
    gc.collect()
    before = sockets()
    yield
    assert sockets() == before


def sockets() -> int:
    """Open sockets that are connected or trying to."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one by which we read the directory
            count += str(descriptor.readlink()).startswith("socket:")
    return count


# Servers that others wrote


@pytest.mark.parametrize("size", [5 * MiB + 512, 4 * MiB, 512])
@pytest.mark.parametrize("connections", [1, 3])
async def test_nbdkit(size: int, connections: int) -> None:
    with nbdkit("pattern", str(size)) as port:
        async with connect_nbd([info(port)], connections=connections) as export:
            assert export.size == size
            assert await whole(export) == pattern(size)


async def test_nbdkit_that_offers_less() -> None:
    with nbdkit("--mask-handshake=1", "pattern", "3M") as port:  # no NO_ZEROES
        async with connect_nbd([info(port)]) as export:
            assert await whole(export) == pattern(3 * MiB)


async def test_nbdkit_answers_out_of_order() -> None:
    arguments = ["--filter=delay", "pattern", "16M", "delay-read=5ms", "--threads=8"]
    with nbdkit(*arguments) as port:
        async with connect_nbd([info(port)], connections=1, depth=8) as export:
            assert await whole(export, depth=8) == pattern(16 * MiB)


async def test_qemu_nbd(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(5 * MiB)
    (tmp_path / "image").write_bytes(content)
    name = "/uuid?session_id=OpaqueRef:x"
    with qemu_nbd(tmp_path / "image", name) as port:
        async with connect_nbd([info(port, name)], connections=2) as export:
            assert await whole(export) == content
        with pytest.raises(Unreachable) as caught:
            async with connect_nbd([info(port, "another")]):
                pass
        assert caught.value.code == "NO_NBD_AVAILABLE"


async def test_errors_of_nbdkit() -> None:
    arguments = ["--filter=error", "pattern", "8M", "error-pread=EIO", "error-pread-rate=30%"]
    with nbdkit(*arguments) as port:
        async with connect_nbd([info(port)], connections=2, retry_delays=[0] * 50) as export:
            assert await whole(export) == pattern(8 * MiB)
    with nbdkit(
        "--filter=error", "pattern", "8M", "error-pread=EIO", "error-pread-rate=100%"
    ) as port:
        async with connect_nbd([info(port)], retry_delays=QUICK) as export:
            with pytest.raises(Unreachable, match="at byte 2097152: EIO") as caught:
                await one(export, 1)
            assert caught.value.code == "EIO"


async def test_a_server_that_went_away_is_found_elsewhere() -> None:
    with nbdkit("pattern", "8M") as elsewhere, contextlib.ExitStack() as first:
        port = first.enter_context(nbdkit("pattern", "8M"))

        async def refresh() -> list[NbdInfo]:
            return [info(elsewhere)]

        async with connect_nbd([info(port)], retry_delays=QUICK, refresh=refresh) as export:
            assert await one(export, 0) == pattern(2 * MiB)
            first.close()
            assert await one(export, 3) == pattern(8 * MiB)[6 * MiB :]


# TLS


@pytest.fixture(scope="module")
def authority() -> Identity:
    return make("authority")


@pytest.fixture(scope="module")
def host(authority: Identity) -> Identity:
    return make("host1", issuer=authority)


@pytest.fixture
def pki(authority: Identity, host: Identity, tmp_path: Path) -> str:
    write(host, tmp_path, authority=authority)
    return f"--tls-certificates={tmp_path}"


async def test_tls(pki: str, authority: Identity, host: Identity) -> None:
    with nbdkit("--tls=require", pki, "pattern", "9M") as port:
        for pem, subject in ((host.pem, "?"), (authority.pem, "host1"), (authority.pem, "")):
            candidate = info(port, certificate=pem, subject=subject)
            async with connect_nbd([candidate], connections=2) as export:
                assert await whole(export) == pattern(9 * MiB)


async def test_another_certificate_is_not_accepted(pki: str, authority: Identity) -> None:
    with nbdkit("--tls=require", pki, "pattern", "1M") as port:
        for pem, subject in ((make("host1").pem, "host1"), (authority.pem, "host2"), ("?", "")):
            candidate = info(port, certificate=pem, subject=subject, allow_plain=True)
            with pytest.raises(Unreachable, match="not trusted") as caught:
                async with connect_nbd([candidate]):
                    pass
            assert caught.value.code == "NO_NBD_AVAILABLE"


async def test_a_server_without_tls(host: Identity) -> None:
    with nbdkit("--tls=off", "pattern", "1M") as port:
        with pytest.raises(Unreachable, match="refuses TLS"):
            async with connect_nbd([info(port, certificate=host.pem)]):
                pass
        candidate = info(port, certificate=host.pem, allow_plain=True)
        async with connect_nbd([candidate]) as export:
            assert await whole(export) == pattern(1 * MiB)


# Candidates


async def test_no_candidate() -> None:
    with pytest.raises(Unreachable) as caught:
        async with connect_nbd([]):
            pass
    assert caught.value.code == "NO_NBD_AVAILABLE"
    ports = [unused_port(), unused_port()]
    with pytest.raises(Unreachable) as caught:
        async with connect_nbd([info(port) for port in ports], connections=3):
            pass
    assert caught.value.code == "NO_NBD_AVAILABLE"
    assert [f"127.0.0.1:{port}" in str(caught.value.data) for port in ports] == [True, True]


async def test_connections_are_spread_over_the_hosts() -> None:
    content = random.Random(3).randbytes(4 * MiB)
    async with listening(Peer(content)) as one_host, listening(Peer(content)) as other:
        infos = [
            info(unused_port(), subject="dead"),
            info(one_host.port, subject="a"),
            info(other.port, subject="b"),
        ]
        async with connect_nbd(infos, connections=4) as export:
            await until(lambda: export.connections == 4)
            assert (one_host.connections, other.connections) == (2, 2)
            assert await whole(export) == content


async def test_at_most_sixteen_connections_to_a_host() -> None:
    async with listening(Peer(bytes(MiB))) as peer:
        infos = [info(peer.port, f"name{number}", subject="host") for number in range(3)]
        async with connect_nbd(infos, connections=20) as export:
            await until(lambda: export.connections == 16)
            assert peer.connections == 16


async def test_a_silent_candidate_does_not_hold_up_the_others() -> None:
    async with listening(Peer(bytes(MiB))) as peer:
        [silent] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        infos = [info(silent.socket.getsockname()[1]), info(peer.port)]
        with trio.fail_after(10):
            async with connect_nbd(infos, connections=1, seconds=30) as export:
                assert await one(export) == bytes(2 * MiB)
        with pytest.raises(Unreachable) as caught:
            async with connect_nbd(infos[:1], seconds=0.05):
                pass
        assert caught.value.code == "NO_NBD_AVAILABLE"
        await silent.aclose()


async def test_a_disk_that_is_too_small_is_another() -> None:
    async with (
        listening(Peer(bytes(2 * MiB))) as small,
        listening(Peer(bytes(4 * MiB))) as right,
        listening(Peer(b"x" * 6 * MiB)) as large,
    ):
        infos = [info(small.port), info(right.port)]
        async with connect_nbd(infos, size=3 * MiB, connections=1) as export:
            assert export.size == 3 * MiB
            assert right.connections == 1
        with pytest.raises(Unreachable, match="serves 2097152 bytes of a disk of 3145728"):
            async with connect_nbd(infos[:1], size=3 * MiB):
                pass
        async with connect_nbd([info(large.port)], size=3 * MiB) as export:
            assert await one(export, 1) == b"x" * MiB + bytes(MiB)
            for index in (2, -1):
                with pytest.raises(IndexError):
                    await one(export, index)


# Servers that break


@pytest.mark.parametrize(
    "tells", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"NBDMAGIC" + bytes(10), HELLO[:5]]
)
async def test_what_is_no_nbd_server(tells: bytes) -> None:
    async with listening(Peer(bytes(MiB), tells=tells)) as peer:
        with pytest.raises(Unreachable) as caught:
            async with connect_nbd([info(peer.port)], seconds=0.2):
                pass
    assert caught.value.code == "NO_NBD_AVAILABLE"


async def test_what_breaks_is_done_again() -> None:
    """The first three connections end inside a block; nobody but the server notices."""
    content = random.Random(4).randbytes(12 * MiB)
    peer = Peer(content)

    async def breaks(stream: trio.SocketStream, handle: int, offset: int, length: int) -> None:
        if peer.opened <= 3:
            await stream.send_all(reply(handle) + content[offset : offset + MiB + 17])
            raise EOFError
        await peer.answer(stream, handle, offset, length)

    peer.on_request = breaks
    async with listening(peer):
        async with connect_nbd([info(peer.port)], connections=1, retry_delays=QUICK) as export:
            assert await whole(export) == content
    assert peer.opened == 4


async def test_a_connection_that_breaks_leaves_its_work_to_the_other() -> None:
    content = random.Random(5).randbytes(16 * MiB)
    good, bad = Peer(content), Peer(content)

    async def breaks(stream: trio.SocketStream, *_: int) -> None:
        await stream.send_all(b"\0")
        raise EOFError

    bad.on_request = breaks
    async with listening(good), listening(bad):
        infos = [info(bad.port, subject="bad"), info(good.port, subject="good")]
        async with connect_nbd(infos, connections=2, retry_delays=QUICK) as export:
            await until(lambda: export.connections == 2)
            assert await whole(export) == content


async def test_a_block_that_cannot_be_read_fails_alone() -> None:
    content = random.Random(6).randbytes(8 * MiB)
    peer = Peer(content)

    async def refuses(stream: trio.SocketStream, handle: int, offset: int, length: int) -> None:
        if offset == 2 * MiB:
            await stream.send_all(reply(handle, 5))
        else:
            await peer.answer(stream, handle, offset, length)

    peer.on_request = refuses
    async with listening(peer):
        async with connect_nbd([info(peer.port)], retry_delays=QUICK) as export:
            with pytest.raises(Unreachable) as caught:
                await one(export, 1)
            assert caught.value.code == "EIO"
            assert [await one(export, index) for index in (0, 2, 3)] == [
                content[index * BLOCK_SIZE :][:BLOCK_SIZE] for index in (0, 2, 3)
            ]
    tries = peer.requests.count((2 * MiB, 2 * MiB))
    assert tries == 1 + len(QUICK)


@pytest.mark.parametrize(
    "garbage", [bytes(16), reply(999), b"\x66\x8e\x33\xef" + bytes(12)], ids=["0", "handle", "new"]
)
async def test_hostile_replies(garbage: bytes) -> None:
    peer = Peer(bytes(4 * MiB))

    async def lies(stream: trio.SocketStream, *_: int) -> None:
        await stream.send_all(garbage)

    peer.on_request = lies
    async with listening(peer):
        async with connect_nbd([info(peer.port)], connections=1, retry_delays=QUICK) as export:
            with pytest.raises(Corrupt):
                await one(export)
    assert peer.opened <= 2 + len(QUICK)


async def test_silence_ends_a_connection() -> None:
    content = random.Random(7).randbytes(2 * MiB)
    peer = Peer(content)

    async def silent(stream: trio.SocketStream, handle: int, offset: int, length: int) -> None:
        if peer.opened == 1:
            await stream.send_all(reply(handle) + content[: 64 * 1024])
            await stuck(stream)
        await peer.answer(stream, handle, offset, length)

    peer.on_request = silent
    async with listening(peer):
        async with connect_nbd(
            [info(peer.port)], connections=1, seconds=0.2, retry_delays=QUICK
        ) as export:
            await trio.sleep(0.3)  # nothing is due: no silence
            assert peer.opened == 1
            assert await one(export) == content
    assert peer.opened == 2


async def test_when_nothing_is_left_all_reads_fail() -> None:
    peer = Peer(bytes(8 * MiB))
    async with connect_nbd_to(peer) as (export, stop):
        failures: list[ProxyError] = []

        async def fails(index: int) -> None:
            try:
                await one(export, index)
            except ProxyError as error:
                failures.append(error)

        peer.on_request = stuck
        async with trio.open_nursery() as nursery:
            for index in range(4):
                nursery.start_soon(fails, index)
            await until(lambda: bool(peer.requests))
            stop()
        assert {failure.code for failure in failures} == {"NO_NBD_AVAILABLE"}
        assert len(failures) == 4
        with pytest.raises(Unreachable):
            await one(export)


async def stuck(stream: trio.SocketStream, *_: int) -> None:
    """Never answer; end when the client does."""
    while await stream.receive_some():
        pass
    raise EOFError


@asynccontextmanager
async def connect_nbd_to(peer: Peer) -> AsyncIterator[tuple[NbdExport, Callable[[], None]]]:
    """One connection to ``peer``, and how to make it vanish."""
    scope = trio.CancelScope()
    ready = trio.Event()

    async def serve_peer() -> None:
        with scope:
            async with listening(peer):
                ready.set()
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_peer)
        await ready.wait()
        async with connect_nbd([info(peer.port)], connections=1, retry_delays=QUICK) as export:
            yield export, scope.cancel
        scope.cancel()


# Cancel


@pytest.mark.parametrize("stage", ["connect", "hello", "export", "read", "data"])
async def test_cancel_closes_everything_at_once(stage: str) -> None:
    peer = Peer(bytes(4 * MiB), tells=HELLO[:3] if stage == "hello" else b"")
    seen = trio.Event()

    async def data(stream: trio.SocketStream, handle: int, offset: int, length: int) -> None:
        if stage == "data":
            await stream.send_all(reply(handle) + bytes(300_000))
        seen.set()
        await stuck(stream)

    peer.on_request = data

    async def read(port: int) -> None:
        async with connect_nbd([info(port)], connections=2) as export:
            seen.set() if stage == "export" else None
            async with trio.open_nursery() as nursery:
                for index in (0, 1, 0, 1):
                    nursery.start_soon(one, export, index)

    async with listening(peer):
        [deaf] = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1)
        port = deaf.socket.getsockname()[1] if stage == "connect" else peer.port
        if stage in ("connect", "hello"):
            seen.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, port)
            with trio.fail_after(10):
                await seen.wait()
                await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        await until(lambda: peer.connections == 0)
        await deaf.aclose()


async def test_a_cancelled_read_leaves_its_buffer_and_the_connection_alone() -> None:
    content = random.Random(8).randbytes(4 * MiB)
    peer = Peer(content)
    go_on = trio.Event()

    async def slow(stream: trio.SocketStream, handle: int, offset: int, length: int) -> None:
        data = reply(handle) + content[offset : offset + length]
        await stream.send_all(data[: MiB // 2])
        await go_on.wait()
        await stream.send_all(data[MiB // 2 :])

    peer.on_request = slow
    async with listening(peer):
        async with connect_nbd([info(peer.port)], connections=1) as export:
            block = bytearray(STORED_BLOCK)
            with trio.move_on_after(0.1) as scope:
                await export.read_block(0, memoryview(block))
            assert scope.cancelled_caught
            block[:] = b"!" * len(block)  # somebody else has the buffer now
            go_on.set()
            assert await one(export, 1) == content[2 * MiB :]
            assert block == b"!" * len(block)
    assert peer.opened == 1


async def test_leaving_fails_the_reads_under_way() -> None:
    peer = Peer(bytes(4 * MiB))
    peer.on_request = stuck
    async with listening(peer), trio.open_nursery() as nursery:

        async def fails(export: NbdExport) -> None:
            with pytest.raises(Unreachable, match="closed"):
                await one(export)

        async with connect_nbd([info(peer.port)], connections=1) as export:
            for _ in range(9):
                nursery.start_soon(fails, export)
            await until(lambda: bool(peer.requests))
        with pytest.raises(Unreachable, match="closed"):
            await one(export)


async def test_an_error_of_the_caller_comes_out_as_it_is() -> None:
    with nbdkit("pattern", "1M") as port:
        with pytest.raises(ZeroDivisionError):
            async with connect_nbd([info(port)]):
                raise ZeroDivisionError


async def test_no_thread_stays_behind() -> None:
    peer = Peer(bytes(4 * MiB))

    async def trickles(stream: trio.SocketStream, handle: int, *_: int) -> None:
        await stream.send_all(reply(handle))
        while True:
            await stream.send_all(b"x" * 999)
            await trio.sleep(0.001)

    peer.on_request = trickles
    async with listening(peer):
        with trio.move_on_after(0.1):
            async with connect_nbd([info(peer.port)]) as export:
                await one(export)
        assert limiter(Work.NETWORK).borrowed_tokens == 0


# As a disk


async def test_a_disk_of_changed_blocks() -> None:
    with nbdkit("pattern", "15M") as port:
        async with connect_nbd([info(port)]) as export:
            disk = NbdDisk(export, Blocks.of([1, 3, 7], 8), is_differencing=True)
            assert disk.virtual_size == 15 * MiB
            assert disk.is_differencing
            assert list(disk.order) == [1, 3, 7]
            found: dict[int, bytes] = {}
            pool = block_pool(2)
            async with disk.read(pool) as reader:
                while (block := await reader.next()) is not None:
                    found[block.index] = bytes(block.data)
                    block.buffer.release()
            assert pool.in_use == 0
    content = pattern(15 * MiB) + bytes(MiB)
    assert found == {index: content[index * BLOCK_SIZE :][:BLOCK_SIZE] for index in (1, 3, 7)}


# The pool


@pytest.fixture
async def vdi(pool: SimulatedPool) -> str:
    """A disk of a snapshot, on a pool that serves NBD with TLS."""
    pool.enable_nbd()
    snapshot = pool.do("VM.snapshot", pool.vm("vm1"), "s")
    pool.mark()
    return str(pool.vms.disks(snapshot)[0])


def bytes_of(pool: SimulatedPool, vdi: str) -> bytes:
    return b"".join(pool.disk_bytes(pool.store.get("VDI", vdi)["uuid"]))


@pytest.mark.parametrize("purpose", ["nbd", "insecure_nbd"])
async def test_a_disk_of_the_pool(pool: SimulatedPool, xapi: Xapi, vdi: str, purpose: Any) -> None:
    pool.enable_nbd(purpose)
    async with open_nbd(xapi, vdi, connections=3) as export:
        assert await whole(export) == bytes_of(pool, vdi)
        await until(lambda: len(pool.leftovers()["dom0_vbds"]) == 3)
    await clean(pool)


async def test_a_pool_without_nbd(pool: SimulatedPool, xapi: Xapi, vdi: str) -> None:
    pool.store.update("network", pool.network, purpose=[])
    with pytest.raises(Unreachable) as caught:
        await nbd_candidates(xapi, vdi)
    assert caught.value.code == "NO_NBD_AVAILABLE"
    with pytest.raises(XapiError):
        await nbd_candidates(xapi, "OpaqueRef:gone")


async def test_plain_is_allowed_where_the_pool_says_so(
    pool: SimulatedPool, xapi: Xapi, vdi: str
) -> None:
    [tls] = await nbd_candidates(xapi, vdi)
    assert not tls.allow_plain
    assert tls.certificate.startswith("-----BEGIN CERTIFICATE-----")
    assert xapi.session.ref in tls.name
    assert xapi.session.ref not in repr(tls)
    pool.enable_nbd("insecure_nbd")
    [plain] = await nbd_candidates(xapi, vdi)
    assert plain.allow_plain
    pool.store.create("network", name_label="other", purpose=["nbd"])
    [both] = await nbd_candidates(xapi, vdi)
    assert not both.allow_plain


RECORD = {"address": "fd00::1", "port": 10809, "exportname": "/a"}


def test_the_record_of_a_candidate() -> None:
    assert NbdInfo.from_record(RECORD) == NbdInfo("fd00::1", 10809, "/a")
    told = {**RECORD, "port": "10809", "cert": "PEM", "subject": "host1"}  # as XML-RPC has it
    read = NbdInfo.from_record(told, allow_plain=True)
    assert read == NbdInfo("fd00::1", 10809, "/a", "PEM", "host1", allow_plain=True)
    assert read.host == "host1"


@pytest.mark.parametrize(
    "change",
    [
        {"port": "?"},
        {"port": 0},
        {"port": 65536},
        {"port": None},
        {"address": "a" * 64},
        {"exportname": "x" * 4097},
        {"exportname": "\ud800"},
    ],
)
def test_a_record_that_is_no_candidate(change: dict[str, Any]) -> None:
    with pytest.raises(Unreachable) as caught:
        NbdInfo.from_record({**RECORD, **change})
    assert caught.value.code == "EPROTO"
    with pytest.raises(Unreachable):
        NbdInfo.from_record({})


async def test_only_the_backup_network(nursery: trio.Nursery) -> None:
    pool = SimulatedPool.small()
    await nursery.start(partial(serve, pool, slave_host="127.0.0.2"))
    pool.enable_nbd()
    vdi = pool.vms.disks(pool.do("VM.snapshot", pool.vm("vm1"), "s"))[0]
    async with connect(XapiOptions(pool.url, "root", PASSWORD)) as xapi:

        async def addresses() -> set[str]:
            return {info.address for info in await nbd_candidates(xapi, vdi)}

        assert await addresses() == {"127.0.0.1", "127.0.0.2"}
        network = pool.store.create("network", name_label="backup")
        uuid = pool.store.get("network", network)["uuid"]
        pool.store.update("pool", pool.ref, other_config={"xo:backupNetwork": uuid})
        with pytest.raises(Unreachable, match="backup network") as caught:
            await addresses()
        assert caught.value.code == "NO_NBD_AVAILABLE"
        pool.store.create("PIF", network=network, host=pool.slave, IP="127.0.0.2")
        assert await addresses() == {"127.0.0.2"}
        pool.store.update("pool", pool.ref, other_config={"xo:backupNetwork": "gone"})
        with pytest.raises(Unreachable, match="backup network"):
            await addresses()


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ("NBD", {"cut": "reset", "after_bytes": 3 * MiB}),
        ("NBD", {"cut": "end", "after_bytes": 100}),
        ("NBD", {"drop": "before"}),
        ("NBD.export", {"error": ("EPERM",)}),
        ("NBD.export", {"size": MiB}),
        ("NBD.read", {"error": ("EIO",)}),
        ("NBD.read", {"drop": "before", "nth": 2}),
    ],
)
async def test_faults_of_the_pool(
    pool: SimulatedPool, xapi: Xapi, vdi: str, point: str, fault: dict[str, Any]
) -> None:
    """One fault costs one connection at most, never the disk."""
    programmed = pool.fail(point, **fault)
    async with open_nbd(xapi, vdi, connections=2) as export:
        assert await whole(export) == bytes_of(pool, vdi)
    assert programmed.hits == 1
    await clean(pool)


async def test_a_pool_that_refuses_tls(pool: SimulatedPool, xapi: Xapi, vdi: str) -> None:
    pool.fail("NBD.starttls", error=("EPOLICY",), times=None)
    with pytest.raises(Unreachable, match="refuses TLS") as caught:
        async with open_nbd(xapi, vdi):
            pass
    assert caught.value.code == "NO_NBD_AVAILABLE"
    await clean(pool)


async def test_a_session_that_ended_is_no_end(pool: SimulatedPool, xapi: Xapi, vdi: str) -> None:
    async with open_nbd(xapi, vdi, connections=1) as export:
        await one(export)
        pool.sessions.expire_all()
        pool.fail("NBD.read", drop="before")
        assert await one(export, 1) == bytes_of(pool, vdi)[2 * MiB :]
    assert pool.sessions.logins == 2


@pytest.mark.parametrize(
    ("point", "stage"),
    [
        ("NBD", "before"),
        ("NBD.starttls", "before"),
        ("NBD.export", "before"),
        ("NBD.export", "after"),
        ("NBD.read", "before"),
        ("NBD.read", "after"),
    ],
)
async def test_cancel_at_every_stage(
    pool: SimulatedPool, xapi: Xapi, vdi: str, point: str, stage: Any
) -> None:
    gate = pool.pause_at(point, stage=stage)

    async def read() -> None:
        async with open_nbd(xapi, vdi, connections=1) as export:
            await whole(export)

    await cancel_at(gate, read)
    await clean(pool)
    await until(lambda: not pool.nbd.open.total())
