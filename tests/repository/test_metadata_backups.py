"""Metadata backups on a remote: names, writing, listing, retention, deletion, crashes."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Busy, Conflict, Many, ProxyError, Refused, Unreachable
from proxy.remotes.faults import Call, Fail, Faults, Gate
from proxy.remotes.recording import Recording, crash_states
from proxy.repository import (
    delete_metadata_backup,
    list_config_backups,
    list_pool_backups,
    lock_metadata,
    open_metadata_backup,
    prune_metadata,
    read_metadata_backup,
)
from proxy.repository.metadata_backup_paths import (
    config_directory,
    data_name,
    is_pool_backup,
    metadata_backup_path,
    pool_directory,
)
from tests.repository.conftest import RECORDED, open_local, place_recorded, recorded_names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.remotes.interface import Lock, Remote

SCHEDULE = "22222222-2222-4222-8222-222222222222"
POOL = "1656a1c0-d499-45bd-9bd7-2e870992ce0f"
CONFIGS = f"/xo-config-backups/{SCHEDULE}"
POOLS = f"/xo-pool-metadata-backups/{SCHEDULE}/{POOL}"
FIRST = 1_795_485_335_966
"""2026-11-24T01:55:35.966Z, the time of a recorded backup."""
DAY = 86_400_000


def answer(name: str) -> Any:
    lines = (RECORDED / "metadata" / name).read_text().splitlines()
    return json.loads(lines[0])["result"]["remote1"]


@asynccontextmanager
async def held(remote: Remote, directory: str = CONFIGS) -> AsyncIterator[Lock]:
    async with lock_metadata(remote, directory, owner="test", wait=0) as lock:
        yield lock


async def write(remote: Remote, timestamp: int, directory: str = CONFIGS) -> str:
    async with open_metadata_backup(remote, directory, timestamp, "data.json") as writer:
        await writer.write(b'{"users":')
        await writer.write(b"[]}")
        await writer.commit({"data": "./data.json", "timestamp": timestamp})
    return writer.name


async def prune(
    remote: Remote, keep: int, newest: str, *, directory: str = CONFIGS, **options: Any
) -> list[str]:
    """One pruning under the lock; its warnings."""
    warnings: list[str] = []
    async with held(remote, directory) as lock:
        await prune_metadata(
            remote,
            directory,
            keep=keep,
            newest=newest,
            lock=lock,
            warn=lambda message, data: warnings.append(message),
            **options,
        )
    return warnings


def names(root: Path, directory: str = CONFIGS) -> list[str]:
    return sorted(path.name for path in (root / directory[1:]).iterdir())


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [f"{CONFIGS}/20261124T015535Z", f"{POOLS}/20261124T015535Z"])
def test_an_id_is_taken_with_and_without_its_slash(path: str) -> None:
    assert metadata_backup_path(path) == metadata_backup_path(path[1:]) == path
    assert is_pool_backup(path) is ("pool" in path)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "/",
        "xo-config-backups",
        f"xo-config-backups/{SCHEDULE}",
        f"xo-config-backups/{SCHEDULE}/{POOL}/20261124T015535Z",
        f"xo-pool-metadata-backups/{SCHEDULE}/20261124T015535Z",
        f"xo-config-backups/{SCHEDULE}/20261124T015535Z/data.json",
        f"xo-config-backups/{SCHEDULE}/20261124T015535Z/../../..",
        "xo-config-backups/../20261124T015535Z",
        "xo-pool-metadata-backups/../../20261124T015535Z",
        f"xo-pool-metadata-backups/{SCHEDULE}/..\\x/20261124T015535Z",
        f"xo-config-backups/{SCHEDULE}.lock/20261124T015535Z",
        f"//xo-config-backups/{SCHEDULE}/20261124T015535Z",
        f"xo-vm-backups/{SCHEDULE}/20261124T015535Z",
        f"xo-config-backups/{SCHEDULE}/20261124T015535Z\n",
        f"xo-config-backups/{'x' * 300}/20261124T015535Z",
    ],
)
def test_an_id_that_leads_elsewhere_is_refused(wrong: str) -> None:
    with pytest.raises(Refused, match="not correspond to a metadata folder") as caught:
        metadata_backup_path(wrong)
    assert caught.value.data == {"part": "backupId"}


@given(
    st.lists(
        st.sampled_from(["..", ".", "", "a", SCHEDULE, "20261124T015535Z", "xo-config-backups"]),
        max_size=6,
    )
)
def test_no_id_leaves_its_folder(parts: list[str]) -> None:
    try:
        path = metadata_backup_path("xo-config-backups/" + "/".join(parts))
    except Refused:
        return
    assert os.path.normpath(path) == path
    assert path.startswith("/xo-config-backups/")
    assert path.count("/") == 3


@pytest.mark.parametrize("wrong", ["", ".", "..", "a/b", ".hidden", "x.lock", "a\0b"])
def test_no_schedule_or_pool_names_another_folder(wrong: str) -> None:
    with pytest.raises(Refused, match="schedule"):
        config_directory(wrong)
    with pytest.raises(Refused, match="pool"):
        pool_directory(SCHEDULE, wrong)


def test_the_data_of_a_configuration_lies_beside_its_metadata() -> None:
    assert data_name(None) == "data.json"  # before the field existed
    assert [data_name(f"./{name}") for name in ("data.json", "data")] == ["data.json", "data"]
    for wrong in ("../data", "./../x", "/etc/passwd", "", "./", ".x", "metadata.json", 3, ["data"]):
        assert data_name(wrong) is None


# -- listing ------------------------------------------------------------------------------------


async def test_what_xen_orchestra_wrote_is_listed_as_it_does(remote: Remote, root: Path) -> None:
    place_recorded("metadata", root)
    assert json.dumps(await list_config_backups(remote)) == json.dumps(answer("configs.json"))
    assert json.dumps(await list_pool_backups(remote)) == json.dumps(answer("pools.json"))
    assert await list_pool_backups(await open_local(root / "nothing")) == {}


async def test_a_listing_leaves_out_what_cannot_be_read(remote: Remote, root: Path) -> None:
    place_recorded("metadata", root)
    for folder, text in {
        "20200101T000000Z": "{",
        "20200102T000000Z": "[]",
        "20200103T000000Z": '{"id":"/elsewhere","timestamp":"then"}',
        "not a date": "{}",
        "20200104T000000Z.lock": "{}",
    }.items():
        path = root / CONFIGS[1:] / folder
        path.mkdir()
        (path / "metadata.json").write_text(text)
    (root / CONFIGS[1:] / "20200105T000000Z").mkdir()
    (root / "xo-config-backups" / f"{SCHEDULE}.lock").mkdir()
    (root / "xo-config-backups" / ".note").write_text("a lock's")
    shutil.copytree(root / POOLS[1:], root / POOLS[1:].replace(POOL, "empty"))
    shutil.rmtree(root / POOLS[1:].replace(POOL, "empty") / "20261124T015535Z")
    (root / POOLS[1:].replace(POOL, "empty") / "20261124T015537Z" / "metadata.json").unlink()
    listed = await list_config_backups(remote)
    assert listed[0] == {"id": f"{CONFIGS}/20200103T000000Z", "timestamp": "then"}
    assert listed[1:] == answer("configs.json")
    assert list(await list_pool_backups(remote)) == [POOL]


async def test_a_remote_that_stops_answering_is_no_empty_list(remote: Remote, root: Path) -> None:
    place_recorded("metadata", root)
    for verb, path in [("list", "*backups"), ("list", f"*/{SCHEDULE}"), ("read_files", "*")]:
        faults = Faults(remote)
        faults.add(verb, Fail(Unreachable("gone")), path=path, times=9)
        with pytest.raises(Unreachable):
            await list_config_backups(faults)
        with pytest.raises(Unreachable):
            await list_pool_backups(faults)
    faults = Faults(remote)
    faults.add("list", Fail(Refused("EACCES", code="EACCES")), path="*backups", times=9)
    with pytest.raises(Refused):
        await list_config_backups(faults)
    faults = Faults(remote)  # one schedule that is not ours to read
    faults.add("list", Fail(Refused("EACCES", code="EACCES")), path=f"*/{SCHEDULE}", times=9)
    assert await list_config_backups(faults) == []
    assert await list_pool_backups(faults) == {}


# -- writing ------------------------------------------------------------------------------------


async def test_files_and_bytes_are_the_recorded_ones(remote: Remote, root: Path) -> None:
    theirs = RECORDED / "metadata" / "remote"
    for directory, data in ((CONFIGS, "data.json"), (POOLS, "data")):
        for name in ("20261124T015535Z", "20261124T015537Z"):
            folder = theirs / directory[1:] / name
            metadata = json.loads((folder / "metadata.json").read_bytes())
            async with (
                held(remote, directory),
                open_metadata_backup(remote, directory, metadata["timestamp"], data) as writer,
            ):
                await writer.write((folder / data).read_bytes())
                await writer.commit(metadata)
    assert files(root) == files(theirs)
    for name in files(root):
        assert (root / name).read_bytes() == (theirs / name).read_bytes(), name
    modes = {
        name: oct((root / name).stat().st_mode & 0o777)
        for name in recorded_names("metadata/tree.txt")
    }
    assert {name for name, mode in modes.items() if mode == "0o700"} == {
        name for name, mode in recorded_names("metadata/tree.txt").items() if mode == "drwx------"
    }
    assert set(modes.values()) == {"0o700", "0o644"}


async def test_two_of_one_second_have_two_names(remote: Remote, root: Path) -> None:
    assert await write(remote, FIRST) == "20261124T015535Z"
    (root / CONFIGS[1:] / "20261124T015536Z").mkdir()  # unfinished ones have a name too
    assert await write(remote, FIRST) == "20261124T015537Z"
    assert [entry["timestamp"] for entry in await list_config_backups(remote)] == [FIRST, FIRST]


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("mktree", "*Z"),
        ("create.open", "*"),
        ("create.write", "*"),
        ("create.commit", "*"),
        ("stat", "*/data.json"),
        ("write_file", "*/metadata.json"),
    ],
)
async def test_a_failure_leaves_nothing(remote: Remote, root: Path, verb: str, path: str) -> None:
    faults = Faults(remote)
    faults.add(verb, Fail(Unreachable("gone")), path=path)
    with pytest.raises(Unreachable):
        await write(faults, FIRST)
    assert faults.unused == []
    assert not (root / CONFIGS[1:]).exists() or names(root) == []


async def test_a_lost_answer_is_a_backup(remote: Remote, root: Path) -> None:
    faults = Faults(remote)
    lost = Fail(Conflict("EEXIST", code="EEXIST"), after=True)
    faults.add("write_file", lost, path="*/metadata.json")
    await write(faults, FIRST)
    faults.add("write_file", Fail(Unreachable("gone"), after=True), path="*/metadata.json")
    with pytest.raises(Unreachable):
        await write(faults, FIRST + DAY)
    assert len(await list_config_backups(remote)) == 2, "its data must not go: there is metadata"
    assert len(files(root)) == 4


async def test_a_name_taken_meanwhile_keeps_its_owners_data(remote: Remote, root: Path) -> None:
    """Xen Orchestra takes no lock."""
    theirs = root / CONFIGS[1:] / "20261124T015535Z" / "data.json"

    def other(_: object) -> None:
        theirs.write_bytes(b"theirs")

    faults = Faults(remote)
    faults.add("create.commit", Call(other))
    with pytest.raises(Conflict):
        await write(faults, FIRST)
    assert theirs.read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("verb", "path", "after", "kept"),
    [
        ("create.write", "*", False, 0),
        ("create.commit", "*", True, 0),
        ("write_file", "*/metadata.json", False, 1),
        ("write_file", "*/metadata.json", True, 1),
    ],
)
async def test_a_cancel_leaves_all_or_nothing(
    remote: Remote, root: Path, verb: str, path: str, after: bool, kept: int
) -> None:
    faults = Faults(remote)
    gate = faults.add(verb, Gate(after=after), path=path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, faults, FIRST)
        await gate.reached.wait()
        nursery.cancel_scope.cancel()
        gate.release.set()
    assert len(await list_config_backups(remote)) == kept
    assert names(root) == ["20261124T015535Z"] * kept


# -- retention ----------------------------------------------------------------------------------


async def test_retention_keeps_the_latest(remote: Remote, root: Path) -> None:
    made = [await write(remote, FIRST + day * DAY) for day in range(5)]
    assert await prune(remote, 2, made[-1]) == []
    assert names(root) == made[-2:]
    assert await prune(remote, 1, made[-1]) == []
    assert names(root) == made[-1:]
    assert await prune(remote, 1, made[-1]) == []
    assert names(root) == made[-1:]


async def test_the_new_one_stays_when_the_clock_went_back(remote: Remote, root: Path) -> None:
    future = [await write(remote, FIRST + day * DAY) for day in (400, 401)]
    new = await write(remote, FIRST)
    await prune(remote, 2, new)
    assert names(root) == [new, future[1]]


async def test_weakness_17_an_interrupted_directory_does_not_count(
    remote: Remote, root: Path
) -> None:
    made = [await write(remote, FIRST + day * DAY) for day in range(2)]
    for name in ("20270101T000000Z", "20270102T000000Z"):
        folder = root / CONFIGS[1:] / name
        folder.mkdir()
        (folder / "data.json").write_text("{")
    before = names(root)
    now = FIRST / 1000 + 3 * 86400
    assert await prune(remote, 2, made[-1], now=lambda: now) == []
    assert names(root) == before, "neither pushed out a backup, nor old enough to go"


def age(path: Path, seconds: float) -> None:
    for each in [*path.rglob("*"), path]:
        os.utime(each, (seconds, seconds))


async def test_what_dead_runs_left_is_removed_when_it_is_old(remote: Remote, root: Path) -> None:
    new = await write(remote, FIRST)
    now = FIRST / 1000
    kinds = {
        "20260101T000000Z": ["data.json"],
        "20260102T000000Z": ["data"],
        "20260103T000000Z": [".1795485335966.data.json.tmp"],
        "20260104T000000Z": [".1795485335966.data"],  # Xen Orchestra's
        "20260105T000000Z": ["data.json", ".1795485335966.metadata.json.tmp"],
        "20260106T000000Z": [],
    }
    for name, inside in kinds.items():
        folder = root / CONFIGS[1:] / name
        folder.mkdir()
        for each in inside:
            (folder / each).write_text("x")
        age(folder, now - 4000)
    young = root / CONFIGS[1:] / "20260107T000000Z"
    young.mkdir()
    (young / "data").write_text("x")
    age(young, now - 3500)
    assert await prune(remote, 5, new, now=lambda: now) == []
    assert names(root) == [young.name, new]


async def test_nothing_goes_on_doubt(remote: Remote, root: Path) -> None:
    """Unknown files, metadata that cannot be read, storage that does not say."""
    new = await write(remote, FIRST)
    now = FIRST / 1000
    for name, inside in {
        "20260101T000000Z": {"data": "x", "notes.txt": "mine"},
        "20260102T000000Z": {"data": "x", "metadata.json": ""},
        "20260103T000000Z": {"data": "x", "metadata.json": "{torn"},
        "20260104T000000Z": {"data": "x"},
        "2026": {"data": "x"},
    }.items():
        folder = root / CONFIGS[1:] / name
        folder.mkdir()
        for each, text in inside.items():
            (folder / each).write_text(text)
        age(folder, now - 4000)
    (root / CONFIGS[1:] / "20260101T000001Z" / "data").mkdir(parents=True)
    age(root / CONFIGS[1:] / "20260101T000001Z", now - 4000)
    before = files(root)
    faults = Faults(remote)
    faults.add("stat", Fail(Unreachable("gone")), path="*20260104T000000Z/metadata.json")
    warnings = await prune(faults, 1, new, now=lambda: now)
    kept = "it does not count for the retention and stays"
    assert sorted(warnings) == [
        "20260101T000000Z is no backup and holds files that are not a backup's: it stays",
        "20260101T000001Z is no backup and holds files that are not a backup's: it stays",
        "could not remove the unfinished backup 20260104T000000Z",
        f"the metadata of 20260102T000000Z cannot be read: {kept}",
        f"the metadata of 20260103T000000Z cannot be read: {kept}",
    ]
    assert files(root) == before


async def test_metadata_that_comes_at_the_last_moment_saves_its_data(
    remote: Remote, root: Path
) -> None:
    new = await write(remote, FIRST)
    folder = root / CONFIGS[1:] / "20260101T000000Z"
    folder.mkdir()
    (folder / "data.json").write_text("x")
    now = FIRST / 1000
    age(folder, now - 4000)
    faults = Faults(remote)

    def commit(_: object) -> None:
        (folder / "metadata.json").write_text("{}")

    faults.add("stat", Call(commit), path="*/20260101T000000Z/data.json")
    await prune(faults, 1, new, now=lambda: now)
    assert sorted(path.name for path in folder.iterdir()) == ["data.json", "metadata.json"]


async def test_a_listing_that_fails_removes_nothing(remote: Remote, root: Path) -> None:
    made = [await write(remote, FIRST + day * DAY) for day in range(3)]
    faults = Faults(remote)
    faults.add("list", Fail(Unreachable("gone")), path=f"*{CONFIGS[1:]}")
    with pytest.raises(Unreachable):
        await prune(faults, 1, made[-1])
    faults.add("read_files", Fail(Unreachable("gone")))
    with pytest.raises(Unreachable):
        await prune(faults, 1, made[-1])
    assert names(root) == made


async def test_one_that_cannot_be_removed_stops_not_the_others(remote: Remote, root: Path) -> None:
    made = [await write(remote, FIRST + day * DAY) for day in range(4)]
    faults = Faults(remote)
    held_back = Refused("EROFS", code="EROFS")
    faults.add("unlink", Fail(held_back), path=f"*/{made[0]}/metadata.json")
    with pytest.raises(Refused, match="EROFS"):
        await prune(faults, 1, made[-1])
    assert names(root) == [made[0], made[-1]]
    made = [await write(remote, FIRST + day * DAY) for day in range(10, 12)]
    faults.add("unlink", Fail(held_back), path="*/metadata.json", times=2)
    with pytest.raises(Many):
        await prune(faults, 1, made[-1])


async def test_what_the_storage_protects_stays_with_a_warning(remote: Remote, root: Path) -> None:
    made = [await write(remote, FIRST + day * DAY) for day in range(3)]
    faults = Faults(remote)
    protected = Fail(Refused("EPERM: operation not permitted", code="EPERM"))
    faults.add("unlink", protected, path=f"*/{made[0]}/metadata.json")
    warnings = await prune(faults, 1, made[-1])
    assert warnings == ["old backups are protected and are removed by a later run"]
    assert names(root) == [made[0], made[-1]]
    assert len(await list_config_backups(remote)) == 2


async def test_an_immutable_remote_has_no_temporary_names(tmp_path: Path) -> None:
    remote = await open_local(tmp_path, is_immutable=True)
    faults = Faults(remote)
    gate = faults.add("create.commit", Gate())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, faults, FIRST)
        await gate.reached.wait()
        assert [Path(name).name for name in files(tmp_path)] == ["data.json"]
        assert await list_config_backups(remote) == []
        gate.release.set()
    assert len(await list_config_backups(remote)) == 1


async def test_a_lost_lock_ends_the_pruning(remote: Remote, root: Path) -> None:
    made = [await write(remote, FIRST + day * DAY) for day in range(3)]
    faults = Faults(remote)
    faults.add("lock.check", Fail(Busy("somebody else's")), skip=1)
    with pytest.raises(Busy):
        await prune(faults, 1, made[-1])
    assert names(root) == made[1:]


# -- deletion -----------------------------------------------------------------------------------


async def test_a_deletion_removes_its_backup_and_no_other(remote: Remote, root: Path) -> None:
    place_recorded("metadata", root)
    (gone, kept) = answer("pools.json")[POOL]
    await delete_metadata_backup(remote, gone["id"][1:])
    assert await list_pool_backups(remote) == {POOL: [kept]}
    assert await list_config_backups(remote) == answer("configs.json")
    await delete_metadata_backup(remote, gone["id"])  # a second time is no error
    await delete_metadata_backup(remote, "xo-config-backups/none/20261124T015535Z")
    assert not (root / "xo-config-backups" / "none").exists()
    assert [path.name for path in root.glob("*/*.lock")] == []


async def test_a_deletion_removes_the_metadata_first(remote: Remote, root: Path) -> None:
    place_recorded("metadata", root)
    backup = answer("configs.json")[0]["id"]
    faults = Faults(remote)
    faults.add("rmtree", Fail(Unreachable("gone")))
    with pytest.raises(Unreachable):
        await delete_metadata_backup(faults, backup)
    assert sorted(path.name for path in (root / backup[1:]).iterdir()) == ["data.json"]
    await delete_metadata_backup(remote, backup)
    assert not (root / backup[1:]).exists()


async def test_a_deletion_waits_for_a_run(remote: Remote, root: Path) -> None:
    place_recorded("metadata", root)
    backup = answer("configs.json")[0]["id"]
    async with held(remote):
        with pytest.raises(Busy, match="test"):
            await delete_metadata_backup(remote, backup)
    await delete_metadata_backup(remote, backup)
    assert len(await list_config_backups(remote)) == 1


async def test_reading_one_backup(remote: Remote, root: Path) -> None:
    place_recorded("metadata", root)
    entry = answer("configs.json")[0]
    assert {"id": entry["id"], **await read_metadata_backup(remote, entry["id"])} == entry
    with pytest.raises(ProxyError) as caught:
        await read_metadata_backup(remote, f"{CONFIGS}/20200101T000000Z")
    assert caught.value.code == "ENOENT"


# -- crashes ------------------------------------------------------------------------------------


async def test_after_a_crash_at_any_change_every_backup_is_whole(tmp_path: Path) -> None:
    remote = await open_local(tmp_path / "live")
    recording = Recording(remote)
    new = ""
    for day in range(3):
        async with held(recording):
            new = await write(recording, FIRST + day * DAY)
        await prune(recording, 2, new)
    await delete_metadata_backup(recording, f"{CONFIGS}/{new}")
    await remote.aclose()
    counts: set[int] = set()
    total = 0
    root = tmp_path / "crashed"
    root.mkdir()
    for label, apply in crash_states(recording.changes):
        apply(root)
        total += 1
        for lock in root.glob("*/*.lock"):
            lock.rmdir()  # the takeover of a dead lock is tested where locks are
        again = await open_local(root)
        before = await list_config_backups(again)
        counts.add(len(before))
        for entry in before:
            data = root / str(entry["id"])[1:] / "data.json"
            assert data.read_bytes() == b'{"users":[]}', label
        # a later run takes away what the crash left, and no backup
        async with held(again):
            new = await write(again, FIRST + 9 * DAY)
        now = FIRST / 1000 + 10 * 86400
        for folder in (root / CONFIGS[1:]).iterdir():
            age(folder, now - 4000)
        assert await prune(again, 9, new, now=lambda: now) == [], label  # noqa: B023  used at once
        listed = await list_config_backups(again)
        assert listed[:-1] == before, label
        assert names(root) == [str(entry["id"]).rpartition("/")[2] for entry in listed], label
        await again.aclose()
    assert counts == {0, 1, 2, 3}
    assert total > 30
