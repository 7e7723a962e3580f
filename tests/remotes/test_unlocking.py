"""Which key opens which remote, and what happens to the two files that say so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import trio

from proxy.errors import (
    Busy,
    Conflict,
    Corrupt,
    NotFound,
    ProxyError,
    Refused,
    Unauthorized,
    Unreachable,
)
from proxy.formats.encrypted import Algorithm, FileCipher
from proxy.remotes import Entry, open_remote, opened_remote
from proxy.remotes.encryption import Encrypted, algorithm_of
from proxy.remotes.faults import Fail, Faults, Gate
from proxy.remotes.local import LocalRemote
from proxy.remotes.recording import Recording, crash_states
from proxy.remotes.unlocking import look, settle, unlocked
from proxy.remotes.wrapper import Wrapper
from proxy.runtime.secrets import scrub_text
from tests.remotes.conftest import KEY, OPTIONS, tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.remotes import Remote

FIXTURES = Path(__file__).parent.parent / "fixtures" / "encryption"
MANIFEST: dict[str, Any] = json.loads((FIXTURES / "manifest.json").read_text())
RIGHT: str = MANIFEST["keyUtf8"]
WRONG: str = MANIFEST["wrongKeyUtf8"]
CHACHA = b'{"algorithm":"chacha20-poly1305"}'
GCM = b'{"algorithm":"aes-256-gcm"}'
NONE = b'{"algorithm":"none"}'
BOTH = ["encryption.json", "metadata.json"]


def probe(algorithm: Algorithm = Algorithm.CHACHA20_POLY1305, key: str = RIGHT) -> bytes:
    return bytes(FileCipher(algorithm, key).encrypt(b'{"random":"x"}'))


def place(root: Path, files: Mapping[str, bytes | None], *, data: bool = False) -> None:
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        if content is not None:
            (root / name).write_bytes(content)
    if data:
        (root / "xo-vm-backups").mkdir()
        (root / "xo-vm-backups" / "x").write_bytes(b"data")


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


async def opening(root: Path, key: str | None, **record: Any) -> Algorithm | None:
    """The algorithm; the remote is closed again."""
    record = {"url": f"file://{root}", "encryptionKey": key, **record}
    remote = await open_remote(record, options=OPTIONS)
    await remote.write_file(".written", b"w") if not remote.is_immutable else None
    found = algorithm_of(remote)
    await remote.aclose()
    (root / ".written").unlink(missing_ok=True)
    return found


async def refusal(root: Path, key: str | None, kind: type[ProxyError], **record: Any) -> ProxyError:
    """The one error; and nothing was changed."""
    before = content(root)
    with pytest.raises(kind) as caught:
        await opening(root, key, **record)
    assert content(root) == before
    shown = f"{caught.value.message} {caught.value.data}"
    assert RIGHT not in shown
    assert WRONG not in shown
    return caught.value


# -- the outcomes of Xen Orchestra ---------------------------------------------------------------


async def test_an_empty_remote_without_a_key_gets_no_files(root: Path) -> None:
    assert await opening(root, None) is None
    assert tree(root) == []


@pytest.mark.parametrize("before", [[], [".snapshot", ".hidden"]])
async def test_an_empty_remote_is_set_up_for_its_key(root: Path, before: list[str]) -> None:
    root.mkdir()
    for name in before:
        (root / name).write_bytes(b"")
    assert await opening(root, RIGHT) is Algorithm.CHACHA20_POLY1305
    assert tree(root) == sorted([*before, *BOTH])
    assert (root / BOTH[0]).read_bytes() == CHACHA
    stored = (root / BOTH[1]).read_bytes()
    assert len(stored) == 77
    plain = FileCipher(Algorithm.CHACHA20_POLY1305, RIGHT).decrypt(stored)
    assert [len(value) for value in json.loads(plain).values()] == [36]
    written = content(root)
    assert await opening(root, RIGHT) is Algorithm.CHACHA20_POLY1305
    assert content(root) == written
    await refusal(root, None, Unauthorized)


@pytest.mark.parametrize("name", ["f", "lost+found", "xo-vm-backups", "a.test"])
async def test_a_key_for_a_remote_with_plain_data(root: Path, name: str) -> None:
    (root / name).mkdir(parents=True)
    assert await opening(root, None) is None
    error = await refusal(root, RIGHT, Conflict)
    assert error.code == "ENOTEMPTY"
    assert error.message.startswith("Remote directory must be empty. It is not encrypted")
    assert name in error.message
    assert ("inside of this file system" in error.message) is (name == "lost+found")


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_the_right_key_and_any_other(root: Path, algorithm: Algorithm) -> None:
    shutil.copytree(FIXTURES / algorithm, root)
    before = content(root)
    assert await opening(root, RIGHT) is algorithm
    assert content(root) == before
    error = await refusal(root, WRONG, Unauthorized)
    assert error.code == "EAUTH"
    assert "does not open this remote" in error.message
    assert "use an empty remote" in error.message
    error = await refusal(root, None, Unauthorized)
    assert str(algorithm) in error.message


async def test_a_remote_whose_encryption_was_dropped(root: Path) -> None:
    shutil.copytree(FIXTURES / "none", root)
    before = content(root)
    assert await opening(root, None) is None
    assert content(root) == before


async def test_weakness_1_a_key_for_a_remote_that_says_none(root: Path) -> None:
    """Xen Orchestra opens it, and then every access throws."""
    shutil.copytree(FIXTURES / "none", root)
    error = await refusal(root, RIGHT, Conflict)
    assert "is not encrypted" in error.message
    for name in ("stream-17.bin", "stream-17.bin.checksum"):
        (root / name).unlink()
    former = content(root)
    assert await opening(root, RIGHT) is Algorithm.CHACHA20_POLY1305
    assert (root / BOTH[0]).read_bytes() == CHACHA
    kept = {path: data for path, data in content(root).items() if path.startswith(".")}
    assert sorted(kept.values()) == sorted(former.values())


@pytest.mark.parametrize("data", [False, True])
async def test_weakness_2_without_the_key_nothing_is_dropped(root: Path, *, data: bool) -> None:
    """Xen Orchestra's merges open remotes without their key: an empty one is plain from then
    on, and the key no longer opens it."""
    place(root, {BOTH[0]: CHACHA, BOTH[1]: probe()}, data=data)
    error = await refusal(root, None, Unauthorized)
    assert "set its encryption key" in error.message
    assert await opening(root, RIGHT) is Algorithm.CHACHA20_POLY1305


async def test_without_its_description_an_encrypted_remote_is_not_plain(root: Path) -> None:
    place(root, {BOTH[1]: probe()}, data=True)
    error = await refusal(root, None, Unauthorized)
    assert "looks encrypted" in error.message
    assert await opening(root, RIGHT) is Algorithm.CHACHA20_POLY1305
    assert (root / BOTH[0]).read_bytes() == CHACHA  # for those who come without a key
    (root / BOTH[0]).unlink()
    (root / BOTH[1]).write_bytes(probe(Algorithm.AES_256_GCM))
    damage = await refusal(root, RIGHT, Corrupt)
    assert '{"algorithm":"aes-256-gcm"}' in damage.message
    assert (await refusal(root, WRONG, Unauthorized)).code == "EAUTH"


async def test_a_description_that_cannot_be_written_again(root: Path) -> None:
    place(root, {BOTH[1]: probe()}, data=True)
    inner = await local(root)
    faults = Faults(inner)
    faults.add("write_file", Fail(Refused("read-only", code="EROFS")))
    with structlog.testing.capture_logs() as logs:
        assert isinstance(await unlocked(faults, RIGHT), Encrypted)
    assert [log["error"] for log in logs] == ["read-only"]
    await inner.aclose()


async def test_without_the_probe_no_key_is_believed(root: Path) -> None:
    place(root, {BOTH[0]: CHACHA}, data=True)
    error = await refusal(root, RIGHT, Conflict)
    assert error.message.startswith("Remote directory must be empty. It holds xo-vm-backups")
    assert "bring that file back" in error.message


@pytest.mark.parametrize("description", [b"{}", CHACHA])
async def test_a_description_without_an_algorithm(root: Path, description: bytes) -> None:
    place(root, {BOTH[0]: description, BOTH[1]: probe()}, data=True)
    assert await opening(root, RIGHT) is Algorithm.CHACHA20_POLY1305
    assert (root / BOTH[0]).read_bytes() == description


@pytest.mark.parametrize("description", [b"[]", b"null", b'{"algorithm":5}', b"\xff", b"{ "])
@pytest.mark.parametrize("key", [None, RIGHT])
async def test_a_description_that_says_nothing(
    root: Path, description: bytes, key: str | None
) -> None:
    place(root, {BOTH[0]: description, BOTH[1]: probe()})
    error = await refusal(root, key, Corrupt)
    assert "If the remote is empty, remove it" in error.message


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("size", [0, 1, 14, 20, -1])
async def test_weakness_3_a_description_that_a_crash_has_cut(
    root: Path, algorithm: Algorithm, size: int
) -> None:
    """As Xen Orchestra writes it; the key tells what stood there.  Without it, nobody does."""
    whole = b'{"algorithm":"%s"}' % algorithm.encode()
    place(root, {BOTH[0]: whole[:size], BOTH[1]: whole_probe(algorithm)}, data=True)
    for key, kind in ((None, Corrupt), (WRONG, Corrupt)):
        assert "it was cut while it was written" in (await refusal(root, key, kind)).message
    before = content(root)
    assert await looking(root, RIGHT) is algorithm
    assert content(root) == before
    assert await opening(root, RIGHT) is algorithm
    assert content(root) == {**before, BOTH[0]: whole}


async def test_an_algorithm_that_is_not_known(root: Path) -> None:
    place(root, {BOTH[0]: b'{"algorithm":"aes-128-gcm"}', BOTH[1]: b"x"})
    error = await refusal(root, RIGHT, Refused)
    assert error.code == "BAD_ALGORITHM"
    assert (await refusal(root, None, Unauthorized)).data == {"algorithm": "aes-128-gcm"}


@pytest.mark.parametrize("key", ["x" * 31, "é" * 32])
async def test_a_key_that_is_none_touches_nothing(root: Path, key: str) -> None:
    with pytest.raises(Refused) as caught:
        await opening(root, key)
    assert caught.value.code == "BAD_ALGORITHM"
    assert not root.exists()


async def test_a_key_that_is_empty_is_not_no_key(root: Path) -> None:
    """It would open an encrypted remote, still empty, as a plain one."""
    for url, key in ((f"file://{root}?encryptionKey=", None), (f"file://{root}", "")):
        with pytest.raises(Refused, match="holds no key"):
            await open_remote({"url": url, "encryptionKey": key}, options=OPTIONS)
    assert not root.exists()


async def test_weakness_14_nobody_without_the_key_takes_the_authentication_away(root: Path) -> None:
    """Who knows 16 bytes of any file has a pair of AES's input and output, which is a block of
    CBC whose content is theirs to choose."""
    cipher = FileCipher(Algorithm.AES_256_GCM, RIGHT)
    place(root, {BOTH[0]: GCM, BOTH[1]: probe(Algorithm.AES_256_GCM)}, data=True)
    known = b"16 known letters"
    stored = bytes(cipher.encrypt(known))
    counter = stored[:12] + (2).to_bytes(4, "big")
    block = bytes(a ^ b for a, b in zip(stored[12:28], known, strict=True))
    wanted = b"{}" + bytes([14]) * 14
    made_up = bytes(a ^ b for a, b in zip(counter, wanted, strict=True)) + block
    assert FileCipher(Algorithm.AES_256_CBC, RIGHT).decrypt(made_up) == b"{}"
    place(root, {BOTH[0]: b'{"algorithm":"aes-256-cbc"}', BOTH[1]: made_up})
    await refusal(root, RIGHT, Unauthorized)


# -- who only looks ------------------------------------------------------------------------------


def whole_probe(algorithm: Algorithm = Algorithm.CHACHA20_POLY1305, key: str = RIGHT) -> bytes:
    """As long as those of Xen Orchestra."""
    return bytes(FileCipher(algorithm, key).encrypt(b'{"random":"%s"}' % (b"x" * 36)))


def looked_at(root: Path, key: str | None, **record: Any) -> AbstractAsyncContextManager[Remote]:
    spec = {"url": f"file://{root}", "encryptionKey": key, **record}
    return opened_remote(spec, options=replace(OPTIONS, set_up=False))


async def looking(root: Path, key: str | None, **record: Any) -> Algorithm | None:
    async with looked_at(root, key, **record) as remote:
        await remote.list("")
        return algorithm_of(remote)


@pytest.mark.parametrize("immutable", [False, True])
@pytest.mark.parametrize(
    "placed",
    [{}, {BOTH[0]: GCM}, {BOTH[0]: b'{"algo'}, {BOTH[1]: b""}, {BOTH[0]: CHACHA, BOTH[1]: b"torn"}],
)
async def test_who_only_looks_sets_nothing_up(
    root: Path, placed: dict[str, bytes], *, immutable: bool
) -> None:
    place(root, {".hidden": b"", **placed})
    before = content(root)
    async with looked_at(root, RIGHT, immutable=immutable) as remote:
        assert remote.is_encrypted
        names = {entry.name for entry in await remote.list("")}
        assert names == {".hidden", *placed}
        with pytest.raises(NotFound):
            await remote.list("xo-vm-backups")
        with pytest.raises(NotFound):
            await remote.read_file("xo-vm-backups/x")
        with pytest.raises(Refused, match="not set up for its encryption key yet") as caught:
            await remote.write_file("f", b"data")
        assert caught.value.code == "EROFS"
        with pytest.raises(Refused):
            async with remote.create("g"):
                pass
        with pytest.raises(Refused):
            async with remote.batch() as batch:
                await batch.write("h", b"data")
        for call in (remote.mktree, remote.unlink, remote.rmtree, remote.rmdir):
            with pytest.raises(Refused):
                await call("f")
        with pytest.raises(NotFound):
            async with remote.lock("xo-vm-backups/vm", owner="us"):
                pass
    assert content(root) == before


@pytest.mark.parametrize("placed", [{}, {BOTH[0]: GCM}])
async def test_who_looks_sees_what_is_set_up_meanwhile(
    root: Path, placed: dict[str, bytes]
) -> None:
    root.mkdir()
    async with looked_at(root, RIGHT) as remote:
        assert await remote.list("") == []
        place(root, placed)  # the algorithm too is chosen meanwhile
        async with opened_remote(
            {"url": f"file://{root}", "encryptionKey": RIGHT}, options=OPTIONS
        ) as other:
            await other.write_file("xo-vm-backups/x", b"secret")
            assert await remote.read_file("xo-vm-backups/x") == b"secret"
            assert algorithm_of(remote) is algorithm_of(other)
            await remote.write_file("f", b"x")
            assert await other.read_file("f") == b"x"


async def test_one_opening_serves_those_who_look_and_those_who_write(root: Path) -> None:
    root.mkdir()
    async with looked_at(root, RIGHT) as remote:
        await look(remote)
        assert tree(root) == []
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(settle, remote)
        assert tree(root) == BOTH
        before = content(root)
        await settle(remote)
        assert content(root) == before
        await remote.write_file("f", b"x")
        await look(remote)
    assert await opening(root, RIGHT)


async def test_an_opening_that_only_looked_gives_an_empty_remote_another_key(root: Path) -> None:
    """When somebody wants to write."""
    place(root, {BOTH[0]: CHACHA, BOTH[1]: whole_probe(key=WRONG)})
    async with looked_at(root, RIGHT) as remote:
        with pytest.raises(Unauthorized, match="with another encryption key"):
            await look(remote)
        await settle(remote)
        await remote.write_file("f", b"x")
    assert await opening(root, RIGHT)
    await refusal(root, WRONG, Unauthorized)


async def test_an_opening_that_only_looked_repairs_when_somebody_wants_to_write(root: Path) -> None:
    place(root, {BOTH[1]: probe()}, data=True)
    async with looked_at(root, RIGHT) as remote:
        await look(remote)
        await remote.list("")
        assert not (root / BOTH[0]).exists()
        await settle(remote)
    assert (root / BOTH[0]).read_bytes() == CHACHA


@pytest.mark.parametrize("former", [CHACHA, GCM])
async def test_a_remote_that_was_emptied_while_it_was_open_is_set_up_again(
    root: Path, former: bytes
) -> None:
    """Else its backups would be taken for plain ones, and nothing could tell which key is right."""
    algorithm = Algorithm.AES_256_GCM if former == GCM else Algorithm.CHACHA20_POLY1305
    place(root, {BOTH[0]: former, BOTH[1]: whole_probe(algorithm)}, data=True)
    async with looked_at(root, RIGHT) as remote:
        await settle(remote)
        shutil.rmtree(root / "xo-vm-backups")
        for name in BOTH:
            (root / name).unlink()
        await settle(remote)
        assert tree(root) == BOTH
        await remote.write_file("xo-vm-backups/x", b"x")
        async with looked_at(root, RIGHT) as other:
            assert await other.read_file("xo-vm-backups/x") == b"x"


@pytest.mark.parametrize("data", [False, True])
async def test_an_open_remote_that_got_another_key_is_not_written_to(
    root: Path, *, data: bool
) -> None:
    root.mkdir()
    async with looked_at(root, RIGHT) as remote:
        await settle(remote)
        place(root, {BOTH[1]: whole_probe(key=WRONG)}, data=data)
        before = content(root)
        if data:
            with pytest.raises(Unauthorized, match="does not open this remote"):
                await settle(remote)
            assert content(root) == before
        else:  # an empty one is whose it is that writes first
            await settle(remote)
            assert await opening(root, RIGHT)


async def test_a_failure_that_passes_does_not_cost_a_run_its_remote(root: Path) -> None:
    place(root, {BOTH[0]: CHACHA, BOTH[1]: whole_probe()})

    class Unsteady(Wrapper):
        fails = 0

        async def read_files(
            self, paths: Sequence[str], *, limit: int = 16 * 1024 * 1024
        ) -> Sequence[bytes | ProxyError]:
            self.fails -= 1
            if self.fails >= 0:
                return [Unreachable("busy") for _ in paths]
            return await super().read_files(paths, limit=limit)

    storage = Unsteady(await LocalRemote.open(str(root), url="file:///x"))
    remote = await unlocked(storage, RIGHT, set_up=False)
    storage.fails = 1
    await settle(remote)
    assert storage.fails == 0
    await remote.aclose()


async def test_who_looks_is_told_of_another_key_that_came_meanwhile(root: Path) -> None:
    root.mkdir()
    async with looked_at(root, RIGHT) as remote:
        await opening(root, WRONG)
        with pytest.raises(Unauthorized, match="with another encryption key"):
            await remote.list("")
        (root / "xo-vm-backups").mkdir()
        with pytest.raises(Unauthorized, match="does not open this remote"):
            await remote.list("")


async def test_who_looks_is_told_of_plain_backups_that_came_meanwhile(root: Path) -> None:
    root.mkdir()
    async with looked_at(root, RIGHT) as remote:
        place(root, {}, data=True)
        with pytest.raises(Conflict, match="It is not encrypted"):
            await remote.read_file("xo-vm-backups/x")


@pytest.mark.parametrize(
    ("placed", "text"),
    [
        ({BOTH[0]: CHACHA, BOTH[1]: whole_probe(key=WRONG)}, "with another encryption key"),
        ({BOTH[1]: whole_probe(key=WRONG)}, "with another encryption key"),
        ({BOTH[0]: NONE, BOTH[1]: b'{"random":"x"}'}, "without encryption"),
        ({BOTH[0]: NONE}, "without encryption"),
    ],
)
async def test_who_only_looks_gives_an_empty_remote_no_other_key(
    root: Path, placed: dict[str, bytes], text: str
) -> None:
    place(root, placed)
    with pytest.raises(Unauthorized, match=text) as caught:
        await looking(root, RIGHT)
    assert caught.value.code == "EAUTH"
    assert "make a backup: that sets an empty remote up for it" in caught.value.message
    assert content(root) == placed
    assert await opening(root, RIGHT) is Algorithm.CHACHA20_POLY1305  # and that does


async def test_who_only_looks_does_not_repair(root: Path) -> None:
    place(root, {BOTH[1]: probe()}, data=True)
    before = content(root)
    assert await looking(root, RIGHT) is Algorithm.CHACHA20_POLY1305
    assert content(root) == before


# -- another key for an empty remote ---------------------------------------------------------------


async def local(root: Path) -> Remote:
    return await LocalRemote.open(str(root), url=f"file://{root}")


async def test_an_empty_remote_gets_another_key_and_keeps_the_former_files(root: Path) -> None:
    former = {BOTH[0]: GCM, BOTH[1]: probe(Algorithm.AES_256_GCM)}
    place(root, former)
    with structlog.testing.capture_logs() as logs:
        assert await opening(root, WRONG) is Algorithm.CHACHA20_POLY1305
    kept = sorted(name for name in tree(root) if name.startswith("."))
    assert [log["path"] for log in logs if log["log_level"] == "warning"] == kept[::-1]
    assert [(root / name).read_bytes() for name in kept] == [former[name] for name in BOTH]
    for name, back in zip(BOTH, kept, strict=True):  # the way back, for who had the other key
        (root / back).rename(root / name)
    assert await opening(root, RIGHT) is Algorithm.AES_256_GCM


async def test_the_algorithm_that_was_chosen_before_there_was_a_key(root: Path) -> None:
    place(root, {BOTH[0]: GCM})
    assert await opening(root, RIGHT) is Algorithm.AES_256_GCM
    assert (root / BOTH[0]).read_bytes() == GCM
    assert await opening(root, RIGHT) is Algorithm.AES_256_GCM
    (root / BOTH[1]).unlink()
    (root / BOTH[0]).write_bytes(b'{"algorithm":"aes-256-cbc"}')
    assert await opening(root, RIGHT) is Algorithm.CHACHA20_POLY1305
    assert (root / BOTH[0]).read_bytes() == CHACHA


async def test_an_immutable_remote_keeps_its_key(root: Path) -> None:
    assert await opening(root, RIGHT, immutable=True) is Algorithm.CHACHA20_POLY1305
    error = await refusal(root, WRONG, Unauthorized, immutable=True)
    assert error.code == "EAUTH"
    assert await opening(root, RIGHT, immutable=True) is Algorithm.CHACHA20_POLY1305


@pytest.mark.parametrize("verb", ["list", "read_files"])
@pytest.mark.parametrize("placed", [{}, {BOTH[0]: CHACHA, BOTH[1]: probe()}])
async def test_weakness_24_what_cannot_be_listed_is_not_empty(
    root: Path, verb: str, placed: dict[str, bytes]
) -> None:
    root.mkdir()
    inner = await local(root)
    place(root, placed)
    faults = Faults(inner)
    for _ in range(2):
        faults.add(verb, Fail(Unreachable("gone", code="ESTALE")))
        with pytest.raises(Unreachable, match="gone"):
            await unlocked(faults, WRONG)
    assert content(root) == placed
    await inner.aclose()


class Forgetful(Wrapper):
    """Its listings lack what is named, as those of a store that is not yet consistent."""

    def __init__(self, inner: Remote, *lacking: str) -> None:
        super().__init__(inner)
        self.lacking = lacking

    async def list(self, path: str) -> list[Entry]:
        return [each for each in await self.inner.list(path) if each.name not in self.lacking]


@pytest.mark.parametrize("lacking", [BOTH, ["xo-vm-backups"]])
async def test_weakness_24_a_remote_that_looks_empty_is_not_set_up_again(
    root: Path, lacking: list[str]
) -> None:
    root.mkdir()
    inner = await local(root)
    place(root, {BOTH[0]: CHACHA, BOTH[1]: probe()}, data=True)
    before = content(root)
    with pytest.raises((Unreachable, Unauthorized)) as caught:
        await unlocked(Forgetful(inner, *lacking), WRONG)
    assert isinstance(caught.value, Unreachable) is (lacking == BOTH)
    assert content(root) == before
    await inner.aclose()


# -- crashes, and two at once ----------------------------------------------------------------------


async def test_a_crash_after_any_write_is_finished_by_the_next(root: Path) -> None:
    for placed in ({}, {BOTH[0]: GCM, BOTH[1]: probe(Algorithm.AES_256_GCM)}, {BOTH[0]: NONE}):
        for done in range(5):
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            inner = await local(root)
            place(root, placed)
            faults = Faults(inner)
            faults.add("write_file", Fail(Unreachable("gone")), skip=done)
            try:
                await unlocked(faults, WRONG)
            except Unreachable:
                crashed = True
            else:
                crashed = False
            assert await opening(root, WRONG) is Algorithm.CHACHA20_POLY1305
            with pytest.raises(Unauthorized):
                await opening(root, None)
            (root / "data").write_bytes(b"")
            assert await opening(root, WRONG) is Algorithm.CHACHA20_POLY1305
            assert crashed is (done < 2 * (1 + (BOTH[1] in placed)))
            await inner.aclose()


@pytest.mark.parametrize(
    "placed",
    [
        {},
        {BOTH[0]: GCM},
        {BOTH[0]: NONE},
        {BOTH[0]: GCM, BOTH[1]: whole_probe(Algorithm.AES_256_GCM)},
        {BOTH[1]: b"torn"},
    ],
)
async def test_a_kill_at_any_moment_of_the_setting_up(
    root: Path, tmp_path: Path, placed: dict[str, bytes]
) -> None:
    """The next one that may write sets it up; until then, it is nobody's or the new key's."""
    start = tmp_path / "start"
    place(start, placed)
    shutil.copytree(start, root)
    inner = await local(root)
    recording = Recording(inner)
    assert isinstance(await unlocked(recording, WRONG), Encrypted)
    await inner.aclose()
    place_of_crash = tmp_path / "crashed"
    place_of_crash.mkdir()
    count = 0
    for label, apply in crash_states(recording.changes, start=start):
        apply(place_of_crash)
        count += 1
        before = content(place_of_crash)
        try:
            await looking(place_of_crash, WRONG)
        except Unauthorized:  # not before the new key's file is there
            assert before.get(BOTH[1]) == placed.get(BOTH[1]), label
        assert content(place_of_crash) == before, label
        assert await opening(place_of_crash, WRONG), label
        (place_of_crash / "xo-vm-backups").mkdir()
        assert await opening(place_of_crash, WRONG), label
        assert await looking(place_of_crash, WRONG), label
        with pytest.raises(Unauthorized):
            await opening(place_of_crash, None)
    assert count >= 2


@pytest.mark.parametrize("immutable", [False, True])
@pytest.mark.parametrize("first", BOTH)
async def test_a_kill_inside_one_of_the_two_files(
    root: Path, first: str, *, immutable: bool
) -> None:
    """On an immutable remote nothing has a temporary name; Xen Orchestra has none anywhere.  And
    whichever of the two comes first."""
    whole = {BOTH[0]: CHACHA, BOTH[1]: whole_probe()}
    second = BOTH[1 - BOTH.index(first)]
    for name, others in ((first, {}), (second, {first: whole[first]})):
        size = len(whole[name])
        for cut in sorted({0, 1, 11, 12, 13, 14, 27, 28, size - 1}):
            shutil.rmtree(root, ignore_errors=True)
            place(root, {**others, name: whole[name][:cut]})
            before = content(root)
            assert await looking(root, RIGHT, immutable=immutable), cut
            assert content(root) == before
            assert await opening(root, RIGHT, immutable=immutable), cut
            with pytest.raises(Unauthorized):
                await opening(root, None, immutable=immutable)
            assert (root / BOTH[0]).read_bytes() == CHACHA
            stored = (root / BOTH[1]).read_bytes()
            FileCipher(Algorithm.CHACHA20_POLY1305, RIGHT).decrypt(stored)
            (root / "xo-vm-backups").mkdir()
            assert await opening(root, RIGHT, immutable=immutable), cut


async def test_a_cut_file_that_is_protected_already_is_left(root: Path) -> None:
    place(root, {BOTH[1]: b"torn"})
    inner = await LocalRemote.open(str(root), url=f"file://{root}", is_immutable=True)
    faults = Faults(inner)
    faults.add("unlink", Fail(Refused("EPERM: protected", code="EPERM")))
    with pytest.raises(Refused, match="protected"):
        await unlocked(faults, RIGHT)
    assert (root / BOTH[1]).read_bytes() == b"torn"
    await inner.aclose()


@pytest.mark.parametrize("key", [RIGHT, WRONG])
@pytest.mark.parametrize("skip", [0, 1])
async def test_two_at_once(root: Path, key: str, skip: int) -> None:
    """The second comes between any two steps of the first: one key, or one error."""
    inner = await local(root)
    faults = Faults(inner)
    gate = faults.add("write_file", Gate(), skip=skip)
    outcomes: list[Remote | ProxyError] = []

    async def first() -> None:
        try:
            outcomes.append(await unlocked(faults, RIGHT))
        except ProxyError as error:
            outcomes.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await gate.reached.wait()
        try:
            outcomes.append(await unlocked(inner, key))
        except ProxyError as error:
            outcomes.append(error)
        gate.release.set()
    used = [each for each in outcomes if isinstance(each, Encrypted)]
    if key == RIGHT:
        assert len(used) == 2
        await used[0].write_file("f", b"x")
        assert await used[1].read_file("f") == b"x"
    else:
        assert not [each for each in outcomes if isinstance(each, Busy)]
    owner = used[-1]
    await owner.write_file("xo-vm-backups/x", b"x")
    found = [key for key in (RIGHT, WRONG) if await opens(root, key)]
    assert len(found) == 1
    await inner.aclose()


async def opens(root: Path, key: str) -> bool:
    try:
        return await opening(root, key) is not None
    except Unauthorized:
        return False


async def test_a_failed_opening_leaves_nothing_open(root: Path) -> None:
    place(root, {BOTH[0]: CHACHA, BOTH[1]: probe()}, data=True)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        await refusal(root, WRONG, Unauthorized)
        with trio.CancelScope() as scope:
            scope.cancel()
            await opening(root, RIGHT)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


async def test_the_key_is_in_no_log(root: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        await opening(root, KEY)
    assert logs
    assert KEY not in str(logs)
    assert KEY not in scrub_text(f"openssl enc -K {KEY}")
