"""How encrypted files are written: in which pieces, where, beside what, in whose memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing

from proxy.disks.vhd_directory import BlockFiles
from proxy.errors import Unreachable
from proxy.formats.encrypted import MOST_OVERHEAD, Algorithm, FileCipher
from proxy.formats.vhd import STORED_BLOCK
from proxy.formats.vhd_directory import Compression
from proxy.remotes import encrypting
from proxy.remotes.encrypting import INLINE, UNIT, Sealer, sealed_by
from proxy.remotes.encryption import Encrypted, sealer_of
from proxy.remotes.faults import Fail, Faults, Gate
from proxy.remotes.metrics import Metrics
from proxy.remotes.wrapper import Operation, Wrapper, may_write_later
from proxy.runtime.threads import Work, in_thread
from tests.remotes.conftest import KEY, opened, tree

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from proxy.remotes import Remote
    from tests.remotes.server import Server

CIPHERS = [FileCipher(algorithm, KEY) for algorithm in Algorithm]
MIB = 1024 * 1024


@pytest.fixture(params=CIPHERS, ids=lambda cipher: cipher.algorithm)
def cipher(request: pytest.FixtureRequest) -> FileCipher:
    found: FileCipher = request.param
    return found


class Sizes(Wrapper):
    """Notes how much the storage gets at once."""

    def __init__(self, inner: Remote) -> None:
        super().__init__(inner)
        self.written: list[int] = []

    async def around(self, operation: Operation, run: Callable[[], Awaitable[Any]]) -> Any:
        if operation.verb == "create.write":
            self.written.append(operation.size)
        return await run()


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each piece of work that went to a thread of the processor."""
    found: list[int] = []
    real = in_thread

    async def noting(work: Work, function: Callable[..., Any], *args: Any) -> Any:
        assert work is Work.CPU
        sizes = [len(each) for each in args if isinstance(each, (bytes, memoryview))]
        found.append(sizes[0] if sizes else sum(map(len, args[1])))
        return await real(work, function, *args)

    monkeypatch.setattr(encrypting, "in_thread", noting)
    return found


# -- sizes of the pieces


@pytest.mark.parametrize("size", [0, 1, INLINE])
async def test_small_work_stays_where_it_is(
    local: Remote, cipher: FileCipher, hops: list[int], size: int
) -> None:
    """A thread would cost more than the cipher."""
    remote = Encrypted(local, cipher)
    await remote.write_file("a", bytes(size))
    async with remote.create("b") as file:
        for _ in range(8):
            await file.write(bytes(size))
        await file.commit()
    async with remote.batch() as batch:
        await batch.write("c", bytes(size))
    if size < INLINE:  # stored, it is longer
        assert await remote.read_file("a") == bytes(size)
        assert await remote.read_files(["a"]) == (bytes(size),)
    async with remote.open_read("b") as file:
        await file.read_into(memoryview(bytearray(size)))
    if cipher.algorithm.is_authenticated:
        assert hops == []


@pytest.mark.parametrize("size", [INLINE + 1, UNIT, UNIT + 1, 3 * UNIT + 5])
async def test_large_work_is_done_in_threads_in_units(
    local: Remote, cipher: FileCipher, hops: list[int], size: int
) -> None:
    remote = Encrypted(local, cipher)
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    async with remote.create("f") as file:
        await file.write(content)
        await file.commit()
    assert sum(hops) + INLINE >= size
    assert all(INLINE < hop <= UNIT for hop in hops)
    assert len(hops) <= size // UNIT + 1
    hops.clear()
    async with remote.open_read("f") as reader:
        found = b""
        buffer = memoryview(bytearray(UNIT))
        while count := await reader.read_into(buffer):
            found += buffer[:count]
    assert found == content
    assert all(INLINE < hop <= UNIT + 16 for hop in hops)


@pytest.mark.parametrize("piece", [1000, 64 * 1024, 300_000, UNIT, 5 * MIB])
async def test_the_storage_gets_large_pieces(
    local: Remote, cipher: FileCipher, root: Path, piece: int
) -> None:
    sizes = Sizes(local)
    content = bytes(range(251)) * (6 * MIB // 251)
    async with Encrypted(sizes, cipher).create("f") as file:
        for start in range(0, len(content), piece):
            await file.write(content[start : start + piece])
        await file.commit()
    assert cipher.decrypt((root / "f").read_bytes()) == content
    assert all(256 * 1024 <= size <= UNIT + 2 * MOST_OVERHEAD for size in sizes.written[:-1])


# -- beside each other


async def test_one_piece_is_encrypted_while_another_is_written(
    local: Remote, cipher: FileCipher, root: Path
) -> None:
    """And never a third one: memory is two pieces."""
    faults = Faults(local)
    gate = faults.add("create.write", Gate())
    content = bytes(range(256)) * (4 * UNIT // 256)
    written: list[int] = []
    async with Encrypted(faults, cipher).create("f") as file, trio.open_nursery() as nursery:

        async def write() -> None:
            for start in range(0, len(content), UNIT):
                await file.write(memoryview(content)[start : start + UNIT])
                written.append(start)
            await file.commit()

        nursery.start_soon(write)
        await gate.reached.wait()
        with trio.fail_after(10):
            while len(written) < 2:
                await trio.sleep(0.001)
        await trio.sleep(0.05)
        assert len(written) == 2
        gate.release.set()
    assert cipher.decrypt((root / "f").read_bytes()) == content


async def test_the_callers_memory_is_its_own_again(
    local: Remote, cipher: FileCipher, root: Path
) -> None:
    faults = Faults(local)
    gate = faults.add("create.write", Gate())
    buffer = memoryview(bytearray(b"a" * MIB))
    async with Encrypted(faults, cipher).create("f") as file:
        await file.write(buffer)
        await gate.reached.wait()
        buffer[:] = b"b" * MIB
        gate.release.set()
        await file.commit()
    assert cipher.decrypt((root / "f").read_bytes()) == b"a" * MIB


async def test_a_cancel_while_it_waits_for_the_storage(
    local: Remote, cipher: FileCipher, root: Path
) -> None:
    faults = Faults(local)
    gate = faults.add("create.write", Gate())
    with trio.CancelScope() as scope:
        async with Encrypted(faults, cipher).create("f") as file, trio.open_nursery() as nursery:

            async def strike() -> None:
                await gate.reached.wait()
                scope.cancel()

            nursery.start_soon(strike)
            for _ in range(9):
                await file.write(bytes(UNIT))
    assert scope.cancelled_caught
    assert tree(root) == []


# -- sealed beforehand


def test_what_is_sealed_is_a_whole_file(cipher: FileCipher) -> None:
    sealer = Sealer(cipher, 100)
    pieces = (b"one ", memoryview(b"two "), b"", b"three")
    first = sealer.seal(pieces)
    second = sealer.seal(pieces)
    assert first != second, "no IV twice"
    assert cipher.decrypt(first) == cipher.decrypt(second) == b"one two three"
    assert sealed_by(first) is sealed_by(first[3:]) is cipher
    assert first.readonly
    assert sealed_by(b"one") is sealed_by(memoryview(b"one")) is None


def test_memory_is_used_again_once_it_was_given_back(cipher: FileCipher) -> None:
    sealer = Sealer(cipher, 100)
    first = sealer.seal((bytes(100),))
    second = sealer.seal((bytes(10),))
    assert first.obj is not second.obj
    before = bytes(first)
    sealer.give_back(second)
    third = sealer.seal((b"c",))
    assert third.obj is second.obj
    assert first == before
    larger = sealer.seal((bytes(1000),))
    assert cipher.decrypt(larger) == bytes(1000)
    sealer.give_back(larger)  # an exception is not kept
    assert sealer.seal((b"d",)).obj is not larger.obj


async def test_memory_is_used_again_only_where_what_failed_has_ended(
    local: Remote, server: Server, cipher: FileCipher
) -> None:
    """A write to a mount that hangs is let go of and tried again; when the server comes back, the
    first one may go on, and over the second one: it must find the same bytes."""
    async with opened(server.url, options=server.options) as mounted:
        for storage, again in ((local, True), (mounted, False)):
            remote = Metrics(Encrypted(storage, cipher))
            assert may_write_later(remote) is not again
            sealer = sealer_of(remote, 100)
            assert sealer is not None
            first = sealer.seal((b"a",))
            sealer.give_back(first)
            assert (sealer.seal((b"b",)).obj is first.obj) is again
    assert may_write_later(Wrapper(cast("Remote", Unknown())))


class Unknown:
    url = ""
    is_encrypted = is_immutable = use_vhd_directory = False


class Keeps(Wrapper):
    """What a batch was given."""

    def __init__(self, inner: Remote, *, may_write_later: bool) -> None:
        super().__init__(inner)
        vars(inner)["may_write_later"] = may_write_later
        self.given: list[object] = []

    async def around(self, operation: Operation, run: Callable[[], Awaitable[Any]]) -> Any:
        if operation.verb == "batch.write":
            self.given.append(operation.data)
        return await run()


@pytest.mark.parametrize("later", [False, True])
async def test_a_block_that_may_be_written_later_is_no_memory_of_others(
    local: Remote, *, later: bool
) -> None:
    """Its buffer goes back to the transfer as soon as one of the tries has succeeded."""
    keeps = Keeps(local, may_write_later=later)
    block = memoryview(bytearray(STORED_BLOCK))
    async with keeps.batch() as batch:
        await BlockFiles(keeps, batch, Compression.NONE).write("d", 0, block)
    [given] = keeps.given
    assert (given is block) is not later
    assert bytes(cast("bytes", given)) == bytes(block)


async def test_a_batch_takes_what_is_sealed_as_it_is(
    local: Remote, cipher: FileCipher, root: Path
) -> None:
    remote = Metrics(Faults(Encrypted(local, cipher)))
    assert sealer_of(local, 10) is None
    sealer = sealer_of(remote, 10)
    assert sealer is not None
    sealed = sealer.seal((b"con", b"tent"))
    async with remote.batch() as batch:
        await batch.write("sealed", sealed)
        await batch.write("plain", b"content")
        with pytest.raises(AssertionError):
            await batch.write("a/x.checksum", sealed)
    assert (root / "sealed").read_bytes() == sealed
    assert await remote.read_files(["sealed", "plain"]) == (b"content", b"content")
    other = Encrypted(local, FileCipher(cipher.algorithm, KEY[::-1]))
    async with other.batch() as batch:
        with pytest.raises(AssertionError):
            await batch.write("sealed", sealed)


async def test_nothing_that_may_still_be_written_is_overwritten(
    local: Remote, cipher: FileCipher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a write that failed or was cancelled, nobody knows whether it goes on."""
    given_back: list[memoryview] = []
    monkeypatch.setattr(Sealer, "give_back", lambda _, sealed: given_back.append(sealed))
    faults = Faults(Encrypted(local, cipher))
    block = memoryview(bytearray(STORED_BLOCK))
    async with faults.batch() as batch:
        files = BlockFiles(faults, batch, Compression.NONE)
        await files.write("d", 0, block)
        assert len(given_back) == 1
        faults.add("batch.write", Fail(Unreachable("gone")))
        with pytest.raises(Unreachable):
            await files.write("d", 1, block)
        gate = faults.add("batch.write", Gate())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(files.write, "d", 2, block)
            await gate.reached.wait()
            nursery.cancel_scope.cancel()
    assert len(given_back) == 1
