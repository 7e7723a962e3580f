"""The whole life of backups on an encrypted remote."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from proxy.errors import ProxyError
from proxy.formats.encrypted import Algorithm, FileCipher
from proxy.jobs.copying import Check
from proxy.repository import clean_vm, delete_backups, list_all, lock_vm

from .conftest import KEY, House, explained, files_of, read_stored
from .test_incremental_backup import back_up, change, digests, disk_records, house_of, restored
from .test_restore import undone
from .test_verify_run import spoil, statuses, task_of, verified

FIXTURES = Path(__file__).parents[1] / "fixtures"
REMOTE = "encrypted1"
OTHER_KEY = KEY[::-1]


def prepare(house: House, algorithm: Algorithm) -> None:
    """As Xen Orchestra set the remote up, or would have years ago."""
    root = house.folder(REMOTE)
    root.mkdir()
    (root / "encryption.json").write_text(json.dumps({"algorithm": algorithm}))
    random = json.dumps({"random": str(UUID(int=1))}).encode()
    probe = FileCipher(algorithm, KEY).encrypt(random)
    (root / "metadata.json").write_bytes(probe)


def nothing_is_readable(house: House) -> None:
    """Every file of a backup decrypts by itself, and shows nothing of it otherwise."""
    root = house.folder(REMOTE)
    for path in (root / "xo-vm-backups").rglob("*"):
        if path.is_file():
            content = read_stored(root, path)
            stored = path.read_bytes()
            assert len(stored) - len(content) in (28, *range(17, 33)), path
            assert not content or content[:64] not in stored, path


async def test_deltas_are_merged_restored_verified_and_deleted(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        points: list[list[str]] = []
        for number in range(3):
            change(house, number, number + 1)
            change(house, 0, number + 100)
            points.append(digests(house))
            outcome = await back_up(house, REMOTE, exportRetention=2)
            assert outcome.status == "success", outcome.snapshot
            kinds = {record["got"] for record in disk_records(outcome)}
            assert kinds == ({"full"} if number == 0 else {"delta"})
        assert [len(names) for names in house.chains(REMOTE).values()] == [2]
        nothing_is_readable(house)
        for backup_id, point in zip(house.backups(REMOTE), points[-2:], strict=True):
            assert await restored(house, backup_id, REMOTE) == point
        records = await verified(house, REMOTE, level="read")
        assert statuses(records) == ["ok", "ok"]
        assert records[-1]["checksums"] == {"match": 2}
        assert set(house.files(REMOTE)) == explained(house.folder(REMOTE))
        async with house.services.remote(house.remote_spec(REMOTE)) as remote:
            listed = await list_all(remote)
            assert [backup.id for backup in listed[house.pool.vm_uuid("vm1")]] == house.backups(
                REMOTE
            )
            await delete_backups(remote, house.backups(REMOTE)[:1])
        assert len(house.backups(REMOTE)) == 1
        assert await restored(house, house.backups(REMOTE)[0], REMOTE) == points[-1]


async def full_backup(house: House) -> str:
    outcome = await house.run(house.request(remotes=(REMOTE,)))
    assert outcome.status == "success", outcome.snapshot
    return house.backups(REMOTE)[-1]


def archive_of(house: House, backup_id: str) -> Path:
    return house.folder(REMOTE) / (backup_id.removesuffix(".json") + ".xva").lstrip("/")


@pytest.mark.parametrize("beside", [(), ("remote1",)])
async def test_an_md5_is_made_only_where_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: tuple[str, ...]
) -> None:
    """Beside an encrypted archive it would be of other bytes; and it takes most of the time."""
    made: list[Check] = []

    class Noting(Check):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            made.append(self)

    monkeypatch.setattr("proxy.jobs.full_backup.Check", Noting)
    async with house_of(tmp_path) as house:
        outcome = await house.run(house.request(remotes=(REMOTE, *beside)))
        assert outcome.status == "success", outcome.snapshot
        [check] = made
        assert (check._md5 is not None) is bool(beside)
        assert not list(house.folder(REMOTE).rglob("*.checksum"))
        for name in beside:
            [stored] = house.folder(name).rglob("*.xva.checksum")
            content = stored.with_suffix("").read_bytes()
            digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
            assert stored.read_text() == f"$1$${digest}"
            [archive] = house.folder(REMOTE).rglob("*.xva")
            assert read_stored(house.folder(REMOTE), archive) == content


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_a_full_backup_is_restored_and_verified(tmp_path: Path, algorithm: Algorithm) -> None:
    async with house_of(tmp_path) as house:
        prepare(house, algorithm)
        backup_id = await full_backup(house)
        nothing_is_readable(house)
        assert [name for name in house.files(REMOTE) if name.endswith(".checksum")] == []
        assert await restored(house, backup_id, REMOTE) == digests(house)
        assert statuses(await verified(house, REMOTE, level="structure")) == ["ok"]
        records = await verified(house, REMOTE, level="read")
        assert statuses(records) == ["ok"]
        [checksum] = [each["checksum"] for each in records if each["type"] == "backup"]
        warnings = json.dumps((await task_of(house, records))["data"].get("warnings", []))
        if algorithm.is_authenticated:
            assert checksum["result"] == "match"
            assert checksum["compared"] > 16 * 1024 * 1024
            assert warnings == "[]"
        else:
            assert checksum["reason"] == "UNAUTHENTICATED"
            assert "an unauthenticated algorithm" in checksum["message"]
            assert "an unauthenticated algorithm" in warnings
        assert set(house.files(REMOTE)) == explained(house.folder(REMOTE))


async def test_a_damaged_archive_is_found_and_leaves_no_vm(tmp_path: Path) -> None:
    """Its data goes to the host before its tag is known; its last piece does not."""
    async with house_of(tmp_path) as house:
        backup_id = await full_backup(house)
        archive = archive_of(house, backup_id)
        stored = archive.read_bytes()
        # in the last piece, which the host never sees: anywhere else it may complain itself first
        archive.write_bytes(stored[:-1000] + bytes([stored[-1000] ^ 1]) + stored[-999:])
        assert statuses(await verified(house, REMOTE, level="structure")) == ["ok"]
        records = await verified(house, REMOTE, level="read")
        assert statuses(records) == ["damaged"]
        [problem] = next(each["problems"] for each in records if each["type"] == "backup")
        assert problem["what"] == "encryption"
        outcome = await house.outcome(await house.restore(backup_id, REMOTE))
        await undone(house, outcome, "ECORRUPT")
        assert "cannot be decrypted" in outcome.snapshot["data"]["error"]["message"]
        archive.write_bytes(stored)
        assert await restored(house, backup_id, REMOTE) == digests(house)
        archive.write_bytes(stored[:-1])
        assert statuses(await verified(house, REMOTE, level="structure")) == ["damaged"]


async def test_a_damaged_block_is_found_and_not_restored(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        assert (await back_up(house, REMOTE)).status == "success"
        [backup_id] = house.backups(REMOTE)
        base = house.folder(REMOTE)
        for path in base.rglob("*.xxh3"):
            path.unlink()  # the tags alone tell
        spoil(min(path for path in base.rglob("*") if path.parent.parent.name == "blocks"))
        assert statuses(await verified(house, REMOTE, level="structure")) == ["ok"]
        assert statuses(await verified(house, REMOTE, level="read")) == ["damaged"]
        before = house.pool.store.count("VM")
        outcome = await house.outcome(await house.restore(backup_id, REMOTE))
        assert outcome.status == "failure"
        assert outcome.snapshot["data"]["error"]["code"] == "ECORRUPT"
        assert house.pool.store.count("VM") == before


def with_key(house: House, key: str) -> None:
    spec = house.remotes[REMOTE]
    spec["url"] = spec["url"].partition("&")[0]
    spec["encryptionKey"] = key


async def test_another_key_is_one_error_and_touches_nothing(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        assert (await back_up(house, REMOTE)).status == "success"
        root = house.folder(REMOTE)
        before = {name: (root / "xo-vm-backups" / name).read_bytes() for name in files_of(root)}
        [backup_id] = house.backups(REMOTE)
        with_key(house, OTHER_KEY)
        outcome = await back_up(house, REMOTE)
        assert outcome.status == "failure"
        assert outcome.error("get remote adapter")["code"] == "EAUTH"
        for call in (house.restore(backup_id, REMOTE), verified(house, REMOTE)):
            with pytest.raises(ProxyError) as caught:
                await call
            assert caught.value.code == "EAUTH"
        after = {name: (root / "xo-vm-backups" / name).read_bytes() for name in files_of(root)}
        assert after == before
        stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        for secret in (KEY, OTHER_KEY):
            assert secret not in json.dumps([outcome.log, outcome.snapshot])
            assert secret.encode() not in stored  # nor in the journal
        with_key(house, KEY)
        assert (await back_up(house, REMOTE)).status == "success"
        assert len(house.chains(REMOTE)) == 1
        assert set(house.files(REMOTE)) == explained(house.folder(REMOTE))


async def test_what_another_key_wrote_is_never_cleaned_away(tmp_path: Path) -> None:
    """Xen Orchestra may have given a remote that looked empty another key meanwhile."""
    async with house_of(tmp_path) as house:
        for _ in range(2):
            assert (await back_up(house, REMOTE)).status == "success"
        root = house.folder(REMOTE)
        before = files_of(root)
        probe = FileCipher(Algorithm.CHACHA20_POLY1305, OTHER_KEY).encrypt(b"{}")
        (root / "metadata.json").write_bytes(probe)
        with_key(house, OTHER_KEY)
        vm = house.pool.vm_uuid("vm1")
        warnings: list[Any] = []
        async with house.services.remote(house.remote_spec(REMOTE)) as remote:
            async with lock_vm(remote, vm, owner="test") as lock:
                await clean_vm(
                    remote,
                    vm,
                    lock=lock,
                    merge=True,
                    min_age=0,
                    warn=lambda message, data: warnings.append((message, data)),
                )
        assert set(before) <= set(files_of(root))
        assert warnings


async def test_a_recorded_remote_is_listed_when_it_is_encrypted(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        for name in ("full", "delta"):
            root = house.folder(REMOTE)
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(FIXTURES / "repository" / name / "remote", root)
            async with house.services.remote({"url": f"file://{root}", "id": name}) as plain:
                expected = await list_all(plain)
            cipher = FileCipher(Algorithm.AES_256_GCM, KEY)
            for path in root.rglob("*"):
                if path.is_file() and not path.name.endswith(".checksum"):
                    path.write_bytes(cipher.encrypt(path.read_bytes()))
            (root / "encryption.json").write_text('{"algorithm":"aes-256-gcm"}')
            (root / "metadata.json").write_bytes(cipher.encrypt(b"{}"))
            async with house.services.remote(house.remote_spec(REMOTE)) as remote:
                assert await list_all(remote) == expected
                assert await list_all(remote) == expected  # by the cache that the first one wrote
            assert expected
