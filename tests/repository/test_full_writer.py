from __future__ import annotations

import hashlib
import json
import stat
from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.errors import Conflict, Corrupt, ProxyError, Refused, Unreachable
from proxy.formats.encrypted import Algorithm, FileCipher
from proxy.remotes.encryption import Encrypted
from proxy.repository import (
    list_vm_backups,
    lock_vm,
    open_full_backup,
    read_backup,
    refuse_broken_xva,
)
from tests.remotes.objects.conftest import opened_s3
from tests.repository.conftest import (
    NOON,
    VM,
    Watched,
    metadata_of,
    open_local,
    recorded_names,
    write_full,
    xva_bytes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.remotes.interface import Remote
    from proxy.remotes.wrapper import Operation

NAME = "20261124T015901Z"
WRITTEN = [f"{NAME}.json", f"{NAME}.xva", f"{NAME}.xva.checksum", "cache.json.gz"]


def names(vm_dir: Path) -> list[str]:
    return sorted(path.name for path in vm_dir.iterdir())


async def test_a_backup_is_its_data_checksum_metadata_and_cache(
    remote: Remote, vm_dir: Path
) -> None:
    data = xva_bytes()
    backup = await write_full(remote, data=data)
    assert names(vm_dir) == WRITTEN
    assert (vm_dir / f"{NAME}.xva").read_bytes() == data
    assert (vm_dir / f"{NAME}.xva.checksum").read_bytes() == (
        b"$1$$" + hashlib.md5(data).hexdigest().encode()
    )
    stored = json.loads((vm_dir / f"{NAME}.json").read_bytes())
    assert (stored["xva"], stored["size"]) == (f"./{NAME}.xva", len(data))
    assert [backup] == await list_vm_backups(remote, VM)
    assert (await read_backup(remote, backup.id)).backup == backup


async def test_names_and_modes_are_those_of_a_recorded_remote(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    await write_full(remote, NOON - 2_225)
    await write_full(remote, NOON)
    recorded = recorded_names("full/tree.txt")
    ours = {
        str(path.relative_to(root)): stat.filemode(path.stat().st_mode)
        for path in root.rglob("*")
        if path.is_file()
    }
    assert ours == {name: mode for name, mode in recorded.items() if not name.endswith("/")}


async def test_two_backups_of_one_second_get_two_names(remote: Remote, vm_dir: Path) -> None:
    first = await write_full(remote, NOON, data=xva_bytes(1))
    second = await write_full(remote, NOON + 1, data=xva_bytes(2))
    assert second.id == first.id.replace("15901Z", "15902Z")
    assert second.timestamp == NOON + 1, "the time inside is the real one"
    assert (vm_dir / f"{NAME}.xva").read_bytes() == xva_bytes(1)


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("left", [".xva", ".xva.checksum"])
async def test_a_rerun_after_a_crash_before_the_metadata_succeeds(
    remote: Remote, vm_dir: Path, left: str, exclusive: bool
) -> None:
    """Upstream: the second run of the same second fails on what the first left."""
    vm_dir.mkdir(parents=True)
    (vm_dir / f"{NAME}.xva").write_bytes(b"half")
    if left == ".xva.checksum":
        (vm_dir / f"{NAME}.xva.checksum").write_bytes(b"$1$$00")
    data = xva_bytes(3)
    backup = await write_full(remote, data=data, exclusive=exclusive)
    assert backup.xva is not None
    assert (vm_dir / backup.xva).read_bytes() == data
    assert (backup.id.endswith(f"{NAME}.json")) is not exclusive


async def test_remotes_weakness_7_a_checksum_that_was_left_is_replaced(
    remote: Remote, vm_dir: Path
) -> None:
    """Upstream replaces the data, then fails with EEXIST and keeps the old checksum."""
    vm_dir.mkdir(parents=True, exist_ok=True)
    (vm_dir / f"{NAME}.xva.checksum").write_bytes(b"$1$$" + b"0" * 32)
    await write_full(remote, data=xva_bytes(), exclusive=False)
    digest = hashlib.md5(xva_bytes()).hexdigest().encode()
    assert (vm_dir / f"{NAME}.xva.checksum").read_bytes() == b"$1$$" + digest


async def test_a_complete_backup_is_never_replaced(remote: Remote, vm_dir: Path) -> None:
    await write_full(remote, data=xva_bytes(1))
    with pytest.raises(Conflict):
        await write_full(remote, data=xva_bytes(2), exclusive=False)
    assert names(vm_dir) == WRITTEN
    assert (vm_dir / f"{NAME}.xva").read_bytes() == xva_bytes(1)


async def test_leaving_without_commit_leaves_nothing(remote: Remote, vm_dir: Path) -> None:
    async with open_full_backup(remote, VM, NOON) as writer:
        await writer.write(b"x" * 100)
    assert names(vm_dir) == []


async def test_a_cut_export_is_refused(remote: Remote, vm_dir: Path) -> None:
    """Upstream: the validator's verdict is ignored, a truncated export is a success."""

    async def validator(path: str, size: int) -> None:
        await refuse_broken_xva(remote, path, size)

    with pytest.raises(Corrupt):
        await write_full(remote, data=xva_bytes()[:2048], validator=validator)
    assert names(vm_dir) == []
    await write_full(remote, validator=validator)
    assert names(vm_dir) == WRITTEN


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_a_whole_export_passes_on_an_encrypted_remote(
    remote: Remote, algorithm: Algorithm
) -> None:
    """Before its commit a file lacks its end, without which aes-256-cbc tells no size at all."""
    encrypted = Encrypted(remote, FileCipher(algorithm, "0123456789abcdef0123456789abcdef"))

    async def validator(path: str, size: int) -> None:
        await refuse_broken_xva(encrypted, path, size)

    backup = await write_full(encrypted, validator=validator)
    assert (await list_vm_backups(encrypted, VM)) == [backup]
    with pytest.raises(Corrupt):
        await write_full(encrypted, NOON + 1000, data=b"cut", validator=validator)


async def test_what_the_validator_refuses_leaves_nothing_on_an_object_store() -> None:
    """No temporary name: the bytes are looked at under the final one, before the metadata."""
    async with opened_s3() as (remote, server):
        seen: list[tuple[str, bool]] = []

        async def validator(path: str, size: int) -> None:
            seen.append((path.rpartition("/")[2], (await remote.stat(path)).size == size))
            await refuse_broken_xva(remote, path, size)

        with pytest.raises(Corrupt):
            await write_full(remote, data=xva_bytes()[:2048], validator=validator)
        assert server.objects == {}
        assert seen == [(f"{NAME}.xva", True)]
        await write_full(remote, validator=validator)
        stored = {key.rpartition("/")[2] for key in server.objects}
        assert stored == set(WRITTEN)
        assert [backup.size for backup in await list_vm_backups(remote, VM)] == [len(xva_bytes())]


async def test_a_storage_that_lost_bytes_is_noticed(remote: Remote, vm_dir: Path) -> None:
    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "create.commit" and done:
            (vm_dir / f"{NAME}.xva").write_bytes(b"")

    with pytest.raises(Corrupt):
        await write_full(Watched(remote, step))
    assert names(vm_dir) == []


async def test_an_immutable_remote_gets_the_same_files(tmp_path: Path) -> None:
    remote = await open_local(tmp_path, is_immutable=True)
    await write_full(remote)
    assert names(tmp_path / "xo-vm-backups" / VM) == WRITTEN[:3]
    with pytest.raises(Corrupt):
        await write_full(remote, NOON + 5_000, validator=_refuse)
    assert names(tmp_path / "xo-vm-backups" / VM) == WRITTEN[:3]
    await remote.aclose()


async def _refuse(path: str, size: int) -> None:
    raise Corrupt("refused")


async def test_metadata_that_does_not_encode_leaves_nothing(remote: Remote, vm_dir: Path) -> None:
    async def write() -> None:
        async with open_full_backup(remote, VM, NOON) as writer:
            await writer.write(b"x")
            await writer.commit({}, b"")

    with pytest.raises(KeyError):
        await write()
    assert names(vm_dir) == []


class Stop:
    """Fails or cancels at the operation of a number, before or after its effect."""

    def __init__(self, at: int, *, after: bool, cancel: bool) -> None:
        self.at = at
        self.after = after
        self.scope = trio.CancelScope() if cancel else None
        self.seen = -1
        self.verb = ""

    def __call__(self, operation: Operation, done: bool) -> None:
        if not done:
            self.seen += 1
        if self.seen != self.at or done is not self.after or self.verb:
            return
        self.verb = f"{operation.verb} {operation.path.rpartition('/')[2]}"
        if self.scope is None:
            raise Unreachable("stopped here", code="EIO")
        self.scope.cancel()


async def run_until(remote: Remote, stop: Stop) -> bool:
    """Whether the backup was reported as written."""
    watched = Watched(remote, stop)
    with stop.scope or trio.CancelScope():
        try:
            await write_full(watched, NOON + 10_000)
        except ProxyError:
            return False
        return True
    return False


@pytest.mark.parametrize("cancel", [True, False], ids=["cancel", "error"])
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
async def test_stopped_at_any_step_there_is_a_backup_or_no_trace(
    tmp_path: Path, cancel: bool, after: bool
) -> None:
    outcomes: set[bool] = set()
    for at in range(200):
        root = tmp_path / str(at)
        remote = await open_local(root)
        await write_full(remote)
        stop = Stop(at, after=after, cancel=cancel)
        reported = await run_until(remote, stop)
        if not stop.verb:
            assert at > 15, "the steps were watched"
            break
        vm_dir = root / "xo-vm-backups" / VM
        listed = await list_vm_backups(remote, VM)
        left = {name for name in names(vm_dir) if name not in WRITTEN}
        new = NAME.replace("01Z", "11Z")
        if len(listed) == 2:
            assert left == {f"{new}.json", f"{new}.xva", f"{new}.xva.checksum"}, stop.verb
        else:
            assert not left, stop.verb
            assert not reported, stop.verb
        assert names(root / "xo-vm-backups") == [VM], "no lock is left"
        outcomes.add(len(listed) == 2)
        await remote.aclose()
    else:
        pytest.fail("never ran to its end")
    assert outcomes == {True, False}


async def test_metadata_written_by_a_call_that_failed_keeps_its_data(
    remote: Remote, vm_dir: Path
) -> None:
    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "write_file" and operation.path.endswith("Z.json") and done:
            raise Unreachable("the answer was lost")

    with pytest.raises(Unreachable):
        await write_full(Watched(remote, step))
    assert names(vm_dir) == WRITTEN[:3]
    assert len(await list_vm_backups(remote, VM)) == 1


async def test_metadata_found_written_by_a_repeated_call_is_ours(
    remote: Remote, vm_dir: Path
) -> None:
    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "write_file" and operation.path.endswith("Z.json") and done:
            raise Conflict("the first try had its effect")

    await write_full(Watched(remote, step))
    assert names(vm_dir) == WRITTEN


async def test_when_the_outcome_cannot_be_told_nothing_is_removed(
    remote: Remote, vm_dir: Path
) -> None:
    def step(operation: Operation, done: bool) -> None:
        json_path = operation.path.endswith("Z.json")
        if operation.verb in {"write_file", "stat"} and json_path:
            raise Unreachable("no answer")

    with pytest.raises(Unreachable):
        await write_full(Watched(remote, step))
    assert names(vm_dir) == WRITTEN[1:3]


async def test_data_of_another_writer_is_not_removed(remote: Remote, vm_dir: Path) -> None:
    """Where the storage has no locks, another proxy may take the name before us."""

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "create.commit" and not done:
            (vm_dir / f"{NAME}.xva").write_bytes(b"theirs")

    with pytest.raises(Conflict):
        await write_full(Watched(remote, step))
    assert names(vm_dir) == [f"{NAME}.xva"]
    assert (vm_dir / f"{NAME}.xva").read_bytes() == b"theirs"


async def test_a_failing_undo_does_not_hide_the_failure(remote: Remote, vm_dir: Path) -> None:
    def step(operation: Operation, done: bool) -> None:
        if operation.path.endswith(".checksum"):
            raise Refused("no space left", code="ENOSPC")

    with pytest.raises(Refused) as caught:
        await write_full(Watched(remote, step))
    assert caught.value.code == "ENOSPC"


async def test_an_encrypted_remote_gets_no_checksum(remote: Remote, vm_dir: Path) -> None:
    watched: Any = Watched(remote, lambda operation, done: None)
    watched.is_encrypted = True
    await write_full(watched)
    assert names(vm_dir) == [WRITTEN[0], WRITTEN[1], WRITTEN[3]]


async def test_a_locked_vm_is_busy(remote: Remote) -> None:
    async with lock_vm(remote, VM, owner="another run"):
        with pytest.raises(ProxyError) as caught:
            await write_full(remote)
    assert caught.value.code == "ELOCKED"
    assert "another run" in caught.value.message


async def test_the_id_is_known_before_the_commit(remote: Remote) -> None:
    async with open_full_backup(remote, VM, NOON) as writer:
        assert writer.id == f"/xo-vm-backups/{VM}/{NAME}.json"
        await writer.write(memoryview(bytearray(10)))
        assert writer.size == 10
        backup = await writer.commit(metadata_of(), b"\0" * 16)
    assert backup.id == writer.id
