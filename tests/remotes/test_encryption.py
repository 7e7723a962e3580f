"""Encrypted remotes: what is stored, what is read back, and what is never believed."""

from __future__ import annotations

import contextlib
import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.errors import Corrupt, NotFound, ProxyError, Refused, Unreachable
from proxy.formats.encrypted import LONGEST, Algorithm, FileCipher
from proxy.remotes import FileStat, open_remote
from proxy.remotes.encrypting import UNIT
from proxy.remotes.encryption import Encrypted, algorithm_of, is_plain
from proxy.remotes.faults import Fail, Faults, Gate
from proxy.remotes.metrics import Metrics
from proxy.remotes.probe import test_remote as probe
from proxy.remotes.retry import Retry
from tests.remotes.conftest import ENCRYPTIONS, KEY, OPTIONS, opened, tree

if TYPE_CHECKING:
    from proxy.remotes import FileReader, FileWriter, Remote

FIXTURES = Path(__file__).parent.parent / "fixtures" / "encryption"
MANIFEST: dict[str, Any] = json.loads((FIXTURES / "manifest.json").read_text())
AUTHENTICATED = [each for each in Algorithm if each.is_authenticated]
LARGE = bytes(range(251)) * 20_000  # 5 MB: three units


@pytest.fixture
async def faults(local: Remote) -> Faults:
    """The storage below the encryption."""
    return Faults(local)


@pytest.fixture(params=ENCRYPTIONS)
def encrypted(request: pytest.FixtureRequest, faults: Faults) -> Remote:
    return ENCRYPTIONS[request.param](faults)


async def read_all(file: FileReader, size: int = 700_000) -> bytes:
    content = b""
    buffer = memoryview(bytearray(size))
    while count := await file.read_into(buffer):
        content += buffer[:count]
        assert count == size or len(content) == file.size
    return content


async def stream(remote: Remote, path: str, content: bytes, size: int = 700_000) -> None:
    async with remote.create(path) as file:
        for start in range(0, len(content), size):
            await file.write(memoryview(content)[start : start + size])
        await file.commit()


# -- what Xen Orchestra wrote --------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_a_remote_of_xen_orchestra(algorithm: Algorithm, root: Path) -> None:
    shutil.copytree(FIXTURES / algorithm, root)
    before = {path: path.read_bytes() for path in root.iterdir()}
    url = f'file://{root}?encryptionKey="{MANIFEST["keyUtf8"]}"'
    async with opened(url) as remote:
        assert remote.is_encrypted
        assert remote.use_vhd_directory
        assert algorithm_of(Metrics(Faults(remote))) is algorithm
        for name, facts in MANIFEST["remotes"][algorithm]["files"].items():
            if not facts["encrypted"]:
                assert await remote.read_file(name) == facts["text"].encode()
                assert (await remote.stat(name)).size == facts["size"]
            elif "upstreamError" in facts:
                with pytest.raises(Corrupt):
                    await remote.read_file(name)
            else:
                content = await remote.read_file(name)
                assert sha256(content).hexdigest() == facts["plaintextSha256"]
                assert (await remote.stat(name)).size == facts["plaintextSize"]
                async with remote.open_read(name) as file:
                    assert await read_all(file, 1000) == content
    assert {path: path.read_bytes() for path in root.iterdir()} == before


async def test_what_is_written_is_what_xen_orchestra_reads(encrypted: Remote, root: Path) -> None:
    cipher = FileCipher(algorithm_of(encrypted) or Algorithm.AES_256_GCM, KEY)
    await encrypted.write_file("a.json", b"{}")
    await stream(encrypted, "b.xva", LARGE)
    async with encrypted.batch() as batch:
        await batch.write("blocks/0/1", memoryview(LARGE)[:UNIT])
        await batch.commit()
    found = {name: (root / name).read_bytes() for name in ("a.json", "b.xva", "blocks/0/1")}
    assert [cipher.decrypt(stored) for stored in found.values()] == [b"{}", LARGE, LARGE[:UNIT]]
    assert len({stored[:12] for stored in found.values()}) == 3  # no IV twice
    assert list(await encrypted.read_files(["a.json", "b.xva"], limit=len(LARGE))) == [b"{}", LARGE]


# -- what is not encrypted -----------------------------------------------------------------------

PLAIN = [
    "encryption.json",
    "immutability.json",
    "1795485541901.test",
    ".keeper_x1",
    "xo-vm-backups/v/20260101T000000Z.xva.checksum",
]
SECRET = [
    "metadata.json",
    "xo-vm-backups/v/20260101T000000Z.json",
    "xo-vm-backups/v/cache.json.gz",
    "xo-vm-backups/v/vdis/j/d/.20260101T000000Z.xxh3",
    "xo-vm-backups/v/vdis/j/d/20260101T000000Z.alias.vhd",
    "xo-vm-backups/v/vdis/j/d/data/20260101T000000Z.vhd/blocks/0/1",
    "xo-vm-backups/v/encryption.json",
    "xo-vm-backups/v/x.test",
]


async def test_what_xen_orchestra_reads_without_the_key_is_plain(
    encrypted: Remote, root: Path
) -> None:
    for path in PLAIN + SECRET:
        assert is_plain(f"/{path}") is (path in PLAIN)
        await encrypted.write_file(path, b"sesame")
        stored = (root / path).read_bytes()
        assert (stored == b"sesame") is (path in PLAIN)
        assert b"sesame" not in stored or path in PLAIN
        assert await encrypted.read_file(path) == b"sesame"
        assert (await encrypted.stat(path)).size == 6
        (root / path).unlink()
        await stream(encrypted, path, b"sesame")
        assert ((root / path).read_bytes() == b"sesame") is (path in PLAIN)
        async with encrypted.batch() as batch:
            await batch.write(path, b"sesame")
        assert ((root / path).read_bytes() == b"sesame") is (path in PLAIN)
        async with encrypted.open_read(path) as file:
            assert await read_all(file) == b"sesame"


async def test_the_test_of_a_remote_writes_in_clear_as_upstreams(
    encrypted: Remote, faults: Faults, root: Path
) -> None:
    gate = faults.add("read_file", Gate())
    results: list[dict[str, Any]] = []

    async def run() -> None:
        results.append(await probe(contextlib.nullcontext(encrypted)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await gate.reached.wait()
        [name] = tree(root)
        assert (root / name).stat().st_size == 10 * 1024 * 1024
        gate.release.set()
    assert results[0]["success"] is True
    assert tree(root) == []


async def test_locks_are_the_storages(encrypted: Remote, root: Path) -> None:
    await encrypted.mktree("vm")
    async with encrypted.lock("vm", owner="run-1"):
        holder = json.loads((root / ".vm.lock-holder").read_bytes())
        assert holder["owner"] == "run-1"


# -- what is damaged -----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", AUTHENTICATED)
@given(data=st.data())
@settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_a_flipped_bit_anywhere_is_always_noticed(
    algorithm: Algorithm, data: st.DataObject, tmp_path: Path
) -> None:
    size = data.draw(st.sampled_from([0, 1, 100, UNIT - 1, UNIT, UNIT + 1, len(LARGE)]))
    content, piece = LARGE[:size], data.draw(st.sampled_from([1 << 20, UNIT, UNIT + 7]))
    stored = bytearray(FileCipher(algorithm, KEY).encrypt(content))
    bit = data.draw(st.integers(0, 8 * len(stored) - 1))
    stored[bit // 8] ^= 1 << bit % 8
    (tmp_path / "f").write_bytes(stored)

    async def check() -> None:
        inner = await open_remote({"url": f"file://{tmp_path}"}, options=OPTIONS)
        remote = Encrypted(inner, FileCipher(algorithm, KEY))
        with pytest.raises(Corrupt, match="'f'"):
            await remote.read_file("f")
        [found] = await remote.read_files(["f"])
        assert isinstance(found, Corrupt)
        given_away = 0
        async with remote.open_read("f") as file:
            buffer = memoryview(bytearray(piece))
            with pytest.raises(Corrupt) as caught:  # noqa: PT012 (any of the reads)
                while count := await file.read_into(buffer):
                    given_away += count
            with pytest.raises(Corrupt):
                await file.read_into(buffer)
        assert caught.value.data == {"what": "encryption", "path": "f"}
        assert given_away == max(0, size - 1) // piece * piece  # never the last piece
        await inner.aclose()

    trio.run(check)


@pytest.mark.parametrize("size", [0, 11, 27, 40, 100_000])
async def test_a_file_that_was_cut(encrypted: Remote, root: Path, size: int) -> None:
    await encrypted.write_file("f", LARGE[:200_000])
    stored = (root / "f").read_bytes()
    (root / "f").write_bytes(stored[:size])
    with pytest.raises(Corrupt):
        await encrypted.read_file("f")
    with pytest.raises(Corrupt):
        async with encrypted.open_read("f") as file:
            await read_all(file)
    assert (await encrypted.stat("f")).size <= max(0, size - 28)  # listings do not fail


@pytest.mark.parametrize("size", [0, 1, 10])
async def test_weakness_4_a_small_damaged_file_is_an_error_at_once(
    local: Remote, root: Path, size: int
) -> None:
    """Upstream's read of one with a checksum never ends: the error comes before its listener."""
    remote = Encrypted(local, FileCipher(Algorithm.AES_256_GCM, KEY))
    await stream(remote, "f", LARGE[:size])
    stored = bytearray((root / "f").read_bytes())
    stored[-1] ^= 1
    (root / "f").write_bytes(stored)
    with trio.fail_after(10):
        for _ in range(2):
            with pytest.raises(Corrupt, match="it is damaged"):
                async with remote.open_read("f") as file:
                    await read_all(file)


@pytest.mark.parametrize("behind", [False, True])
async def test_a_file_that_changes_while_it_is_read(
    encrypted: Remote, root: Path, *, behind: bool
) -> None:
    await encrypted.write_file("f", LARGE)
    stored = (root / "f").read_bytes()
    async with encrypted.open_read("f") as file:
        await file.read_into(memoryview(bytearray(1000)))
        (root / "f").write_bytes(stored[: UNIT // 2] + (b"x" * UNIT if behind else b""))
        with pytest.raises(Corrupt):
            await read_all(file)


async def test_a_limit_is_of_the_content(encrypted: Remote) -> None:
    await encrypted.write_file("f", bytes(100))
    assert await encrypted.read_files(["f"], limit=100) == (bytes(100),)
    for limit in (99, 60):
        [found] = await encrypted.read_files(["f"], limit=limit)
        assert isinstance(found, Corrupt)
        assert f"the {limit} bytes" in found.message
        with pytest.raises(Corrupt, match=f"the {limit} bytes"):
            await encrypted.read_file("f", limit=limit)


async def test_weakness_14_a_changed_file_of_aes_256_cbc_is_read(local: Remote, root: Path) -> None:
    """What verify says of such a remote, and why no new one gets this algorithm."""
    remote = ENCRYPTIONS["cbc"](local)
    await remote.write_file("f", LARGE)
    stored = bytearray((root / "f").read_bytes())
    stored[1000] ^= 1
    (root / "f").write_bytes(stored)
    found = await remote.read_file("f")
    assert found != LARGE
    assert len(found) == len(LARGE)


async def test_files_that_change_places_are_not_noticed(encrypted: Remote) -> None:
    """The format authenticates no names: docs/architecture.md says what follows."""
    await encrypted.write_file("a", b"one")
    await encrypted.write_file("b", b"two")
    await encrypted.rename_all([("a", "c"), ("b", "a"), ("c", "b")])
    assert [await encrypted.read_file("a"), await encrypted.read_file("b")] == [b"two", b"one"]


# -- trouble below -------------------------------------------------------------------------------

GONE = Unreachable("gone")


async def test_a_read_that_failed_can_be_repeated(encrypted: Remote, faults: Faults) -> None:
    await encrypted.write_file("f", LARGE)
    remote = Retry(encrypted, waits=[0] * 5)
    for skip in range(3):
        faults.add("read.read_into", Fail(GONE), skip=skip)
    async with remote.open_read("f") as file:
        assert await read_all(file, UNIT) == LARGE
    assert faults.unused == []


async def test_a_write_that_failed_cannot_be_completed(
    encrypted: Remote, faults: Faults, root: Path
) -> None:
    faults.add("create.write", Fail(GONE), skip=1)
    async with encrypted.create("f") as file:
        with pytest.raises(Unreachable):
            await in_pieces(file, 10, 1_000_000)  # an error is told by one of the next calls
        for call in (file.write(b"x"), file.commit()):
            with pytest.raises(Refused) as caught:
                await call
            assert caught.value.code == "EBADF"
    assert tree(root) == []


async def in_pieces(file: FileWriter, count: int, size: int) -> None:
    for _ in range(count):
        await file.write(LARGE[:size])


async def test_a_last_write_that_failed_is_told_by_the_commit(
    encrypted: Remote, faults: Faults, root: Path
) -> None:
    faults.add("create.write", Fail(GONE), skip=1)
    async with encrypted.create("f") as file:
        await file.write(LARGE[:1_000_000])
        await file.write(LARGE[:1_000_000])
        with pytest.raises(Unreachable):
            await file.commit()
        with pytest.raises(Refused):
            await file.commit()
    assert tree(root) == []


async def test_a_full_disk_keeps_its_name(encrypted: Remote, faults: Faults, root: Path) -> None:
    faults.fill_after(1_000_000)
    with pytest.raises(Refused) as caught:
        await stream(encrypted, "f", LARGE)
    assert caught.value.code == "ENOSPC"
    assert caught.value.message.startswith("ENOSPC")
    assert tree(root) == []


@pytest.mark.parametrize("verb", ["create.write", "create.commit"])
async def test_a_cancel_leaves_nothing(
    encrypted: Remote, faults: Faults, root: Path, verb: str
) -> None:
    gate = faults.add(verb, Gate())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream, encrypted, "f", LARGE)
        await gate.reached.wait()
        nursery.cancel_scope.cancel()
    assert tree(root) == []


async def test_a_cancelled_read_does_not_go_on_elsewhere(encrypted: Remote, faults: Faults) -> None:
    """What was taken from the file and not decrypted must not be skipped."""
    await encrypted.write_file("f", LARGE)
    async with encrypted.open_read("f") as file:
        await file.read_into(memoryview(bytearray(100_000)))
        gate = faults.add("read.read_into", Gate(after=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.read_into, memoryview(bytearray(3_000_000)))
            await gate.reached.wait()
            nursery.cancel_scope.cancel()
        with pytest.raises(Corrupt, match="interrupted"):
            await read_all(file)


async def test_a_file_that_is_too_large_says_what_to_do(
    encrypted: Remote, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of a counter that starts again."""
    algorithm = algorithm_of(encrypted)
    assert algorithm is not None
    monkeypatch.setitem(LONGEST, algorithm, UNIT)
    with pytest.raises(Refused, match=r"'f': EFBIG.*incremental") as caught:
        await stream(encrypted, "f", LARGE)
    assert caught.value.code == "EFBIG"
    assert tree(root) == []


async def test_nothing_is_changed_in_place(encrypted: Remote) -> None:
    await encrypted.write_file("disk.vhd", b"x")
    with pytest.raises(Refused, match="VHD directories") as caught:
        async with encrypted.edit("disk.vhd"):
            pass
    assert caught.value.code == "ENOTSUP"


async def test_walk_leaves_out_what_has_gone(encrypted: Remote, root: Path) -> None:
    await encrypted.write_file("d/a", b"a")
    await encrypted.write_file("d/b", b"b")
    (root / "d/sub").mkdir()
    found: dict[str, FileStat] = {}
    async for path, status in encrypted.walk("d"):
        found[path] = status
        (root / "d/b").unlink(missing_ok=True)
    assert [*found] in (["d/a"], ["d/a", "d/b"])
    assert {status.size for status in found.values()} == {1}
    with pytest.raises(NotFound):
        await encrypted.read_file("d/b")


async def test_the_key_is_in_no_text(encrypted: Remote) -> None:
    shown = [repr(encrypted), str(vars(encrypted)), repr(vars(encrypted)["cipher"])]
    await encrypted.write_file("f", b"x" * 100)
    async with encrypted.create("g") as file, encrypted.open_read("f") as reader:
        shown += [repr(vars(file)), repr(vars(reader))]
        try:
            await encrypted.edit("f").__aenter__()
        except ProxyError as error:
            shown += [repr(error), str(error.data)]
    assert len(shown) == 7
    assert not [text for text in shown if KEY[:8] in text]
