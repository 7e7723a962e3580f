"""Mirror runs between folders, and what is read back from what they copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pyvhdi

from proxy.errors import Refused
from tests.disks.vhd_images import qemu_reads
from tests.jobs.conftest import House, explained
from tests.jobs.test_incremental_backup import restored

from .mirrors import (
    MIRROR_JOB,
    MIRROR_SCHEDULE,
    SIZE,
    Stock,
    contents,
    disks_of,
    house_with,
    messages,
    metadata,
    mirror,
    times,
)

LIBVHDI: Any = pyvhdi


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("source", "remote1"),
        ("source", "directories1"),
        ("source", "encrypted1"),
        ("directories0", "remote1"),
        ("encrypted0", "remote1"),
        ("encrypted0", "directories1"),
    ],
)
async def test_a_chain_is_copied_in_the_form_that_the_remote_keeps(
    tmp_path: Path, stock: Stock, source: str, target: str
) -> None:
    async with house_with(stock, tmp_path, source) as house:
        outcome = await mirror(house, target, source=source)
        assert outcome.status == "success", outcome.snapshot
        assert await contents(house, target) == stock.chain
        assert times(house, target) == times(house, source)
        kinds = [set(each["isVhdDifferencing"].values()) for each in metadata(house, target)]
        assert kinds == [{False}, {True}, {True}, {True}]
        house.clean_remotes()


async def test_there_and_back_it_is_what_it_was(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        await mirror(house, "encrypted1")
        outcome = await mirror(house, "remote1", source="encrypted1")
        assert outcome.status == "success", outcome.snapshot
        assert await contents(house, "remote1") == stock.chain
        first, back = (
            [path.read_bytes() for path in data(house, name)] for name in ("source", "remote1")
        )
        assert len(first) == 8
        assert [len(each) for each in back] == [len(each) for each in first]


def data(house: House, remote: str) -> list[Path]:
    return sorted(disks_of(house, remote), key=lambda path: (path.parent.name, path.name))


async def test_qemu_reads_what_came_of_a_whole_chain(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path, "directories0") as house:
        await mirror(house, "remote1", source="directories0", settings={"exportRetention": 1})
        (newest,) = metadata(house, "remote1")
        vm = house.folder("remote1") / "xo-vm-backups" / stock.vm
        for path in newest["vhds"].values():
            assert await qemu_reads(vm / path) == stock.raw[-1][path.split("/")[2]]


async def test_libvhdi_reads_a_copied_chain(tmp_path: Path, stock: Stock) -> None:
    """Links and all: with a backup in between that was left out."""
    async with house_with(stock, tmp_path, "encrypted0") as house:
        moments = [each for number, each in enumerate(times(house, "encrypted0")) if number != 1]
        chosen = {"timestamp": {"__or": moments}}
        await mirror(house, "remote1", source="encrypted0", filter=chosen)
        *_, before, newest = metadata(house, "remote1")
        assert set(before["isVhdDifferencing"].values()) == {True}
        vm = house.folder("remote1") / "xo-vm-backups" / stock.vm
        for path in newest["vhds"].values():
            folder = (vm / path).parent
            files: list[Any] = []
            for name in sorted(each.name for each in folder.glob("*.vhd")):
                file = LIBVHDI.file()
                file.open(str(folder / name))
                if files:
                    file.set_parent(files[-1])
                files.append(file)
            assert files[-1].read_buffer(SIZE) == stock.raw[-1][folder.name]
            for file in reversed(files):
                file.close()


async def test_a_copy_restores(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        await mirror(house, "encrypted1", settings={"exportRetention": 2})
        backup = house.backups("encrypted1")[0]
        vm = await house.outcome(await house.restore(backup, "encrypted1"))
        assert vm.status == "success", vm.snapshot
        ref = house.pool.store.by_uuid("VM", vm.snapshot["data"]["result"]["id"])
        disks = [b"".join(house.pool.disk_bytes(each)) for each in house.pool.disk_uuids(ref)]
        assert disks == list(stock.raw[-2].values())


async def test_archives_are_copied_byte_for_byte(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path, "archives") as house:
        outcome = await mirror(house, "remote1", "encrypted1", source="archives", mode="full")
        assert outcome.status == "success", outcome.snapshot
        again = await mirror(house, "remote2", source="encrypted1", mode="full")
        assert again.status == "success", again.snapshot
        for remote in ("remote1", "remote2"):
            for kind in ("*/*.xva", "*/*.xva.checksum"):
                theirs, ours = (
                    {
                        path.name: path.read_bytes()
                        for path in house.folder(each).glob(f"xo-vm-backups/{kind}")
                    }
                    for each in ("archives", remote)
                )
                assert ours == theirs
                assert len(ours) == 3
        house.clean_remotes()
        backup = house.backups("remote2")[-1]
        assert len(await restored(house, backup, "remote2")) == 2


# -- metadata -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "mode"), [("source", "delta"), ("archives", "full")])
async def test_the_metadata_is_the_sources_but_for_whose_it_is(
    tmp_path: Path, stock: Stock, source: str, mode: str
) -> None:
    async with house_with(stock, tmp_path, source) as house:
        change_metadata(house, source, 0, note={"a": 1})
        await mirror(house, "remote1", source=source, mode=mode)
        for theirs, ours in zip(metadata(house, source), metadata(house, "remote1"), strict=True):
            differ = {key for key in theirs if ours.get(key) != theirs[key]}
            assert differ == {"jobId", "scheduleId", *(["vhds"] if mode == "delta" else [])}
            assert set(ours) == set(theirs)
            assert (ours["jobId"], ours["scheduleId"]) == (MIRROR_JOB, MIRROR_SCHEDULE)


def change_metadata(house: House, remote: str, number: int, **fields: Any) -> None:
    path = house.folder(remote) / house.backups(remote)[number].removeprefix("/")
    content = {**json.loads(path.read_bytes()), **fields}
    path.write_text(json.dumps({key: each for key, each in content.items() if each is not ...}))
    for cache in path.parent.glob("cache.json.gz"):
        cache.unlink()


async def test_the_flag_of_qcow2_disks_is_the_sources(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        change_metadata(house, "source", 0, includeNonNbdQcow2Fix=...)
        await mirror(house, "remote1")
        flags = [each.get("includeNonNbdQcow2Fix") for each in metadata(house, "remote1")]
        assert flags == [None, True, True, True]


# -- the log --------------------------------------------------------------------------------------


async def test_weakness_27_each_transfer_is_in_the_export_of_its_own_backup(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house:
        outcome = await mirror(house, "remote1", settings={"exportRetention": 3})
        (root,) = [r for r in outcome.log if r["type"] == "start" and "parentId" not in r]
        assert root["properties"]["name"] == "backup run"
        (vm,) = outcome.snapshot["tasks"]
        assert vm["data"]["name"] == "backup VM"
        assert (vm["data"]["id"], vm["data"]["type"]) == (stock.vm, "VM")
        assert "name_label" not in vm["data"]
        names = [task["data"]["name"] for task in vm["tasks"]]
        assert names == ["clean-vm", "export", "export", "export", "clean-vm"]
        exports = vm["tasks"][1:4]
        assert [each["data"]["isFull"] for each in exports] == [True, False, False]
        for export in exports:
            assert (export["data"]["id"], export["data"]["type"]) == ("remote1", "remote")
            (transfer,) = export["tasks"]
            assert transfer["data"]["name"] == "transfer"
            assert transfer["data"]["result"]["size"] > 0
        assert {"message": "vms", "data": {"vms": [stock.vm]}} in outcome.snapshot["data"]["infos"]
        assert outcome.snapshot["data"]["progress"] == vm["data"]["progress"] == 100


async def test_the_log_of_archives(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path, "archives") as house:
        outcome = await mirror(house, "remote1", source="archives", mode="full")
        (vm,) = outcome.snapshot["tasks"]
        shape = [
            (task["data"]["name"], task["data"].get("isFull"), len(task.get("tasks", [])))
            for task in vm["tasks"]
        ]
        assert shape == [("export", True, 1)] * 3 + [("clean-vm", None, 0)]


@pytest.mark.parametrize(("source", "mode"), [("source", "delta"), ("archives", "full")])
async def test_what_is_there_is_not_copied_again(
    tmp_path: Path, stock: Stock, source: str, mode: str
) -> None:
    async with house_with(stock, tmp_path, source) as house:
        await mirror(house, "remote1", source=source, mode=mode)
        files = house.files("remote1")
        outcome = await mirror(house, "remote1", source=source, mode=mode)
        assert outcome.status == "success"
        assert outcome.of("export") == []
        assert messages(outcome) == ["No new data to upload for this VM"]
        assert house.files("remote1") == files


# -- filter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [{"vm": {"uuid": {"__or": ["x"]}}}, {"vm": {"memory": 7}}])
async def test_an_excluded_vm_costs_nothing(tmp_path: Path, stock: Stock, wanted: Any) -> None:
    """Neither lock nor listing on the remote, nor a lock on the source."""
    async with house_with(stock, tmp_path) as house, house.faulty() as faults:
        async with house.faulty("source") as of_source:
            outcome = await mirror(house, "remote1", filter=wanted)
            verbs = {verb.partition(".")[0] for verb, _ in of_source.seen}
        assert messages(outcome) == ["This VM is excluded by the job filter"]
        assert outcome.status == "success"
        assert "lock" not in verbs
        assert [path for _, path in faults.seen if path.startswith("xo-vm-backups/")] == []
        assert outcome.of("clean-vm") == []


async def test_a_vm_without_backups_of_the_mode_has_no_task(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        outcome = await mirror(house, "remote1", mode="full")
        assert outcome.of("backup VM") == []
        assert outcome.status == "success"


async def test_only_the_matching_backups_are_copied(tmp_path: Path, stock: Stock) -> None:
    """Those left out are merged into the next ones: every copy is whole."""
    async with house_with(stock, tmp_path) as house:
        second, fourth = times(house, "source")[1], times(house, "source")[3]
        chosen = {"__or": [{"timestamp": second}, {"timestamp": fourth}]}
        outcome = await mirror(house, "remote1", filter=chosen)
        assert outcome.status == "success", outcome.snapshot
        assert times(house, "remote1") == [second, fourth]
        assert await contents(house, "remote1") == [stock.chain[1], stock.chain[3]]
        kinds = [set(each["isVhdDifferencing"].values()) for each in metadata(house, "remote1")]
        assert kinds == [{False}, {True}]
        house.clean_remotes()


async def test_a_filter_may_ask_for_any_field(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        change_metadata(house, "source", 2, note=["blue"])
        await mirror(house, "remote1", filter={"note": ["blue"]})
        assert times(house, "remote1") == [times(house, "source")[2]]


# -- retention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["remote1", "encrypted1"])
async def test_weakness_11_only_what_the_remote_would_keep_is_copied(
    tmp_path: Path, stock: Stock, target: str
) -> None:
    async with house_with(stock, tmp_path) as house:
        outcome = await mirror(house, target, settings={"exportRetention": 2})
        assert len(outcome.of("transfer")) == 2
        assert await contents(house, target) == stock.chain[-2:]
        house.clean_remotes()


@pytest.mark.parametrize(
    ("target", "delete_first"), [("remote1", False), ("remote1", True), ("directories1", False)]
)
async def test_new_backups_push_out_old_ones(
    tmp_path: Path, stock: Stock, target: str, delete_first: bool
) -> None:
    async with house_with(stock, tmp_path) as house:
        settings = {"exportRetention": 2, "deleteFirst": delete_first}
        early = {"timestamp": {"__or": times(house, "source")[:2]}}
        await mirror(house, target, settings=settings, filter=early)
        assert await contents(house, target) == stock.chain[:2]
        outcome = await mirror(house, target, settings=settings)
        assert outcome.status == "success", outcome.snapshot
        assert [export["data"]["isFull"] for export in outcome.of("export")] == [False, False]
        assert await contents(house, target) == stock.chain[-2:]
        house.clean_remotes()


async def test_one_run_merges_no_more_than_it_may(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        early = {"timestamp": {"__or": times(house, "source")[:3]}}
        await mirror(house, "remote1", filter=early)
        settings = {"exportRetention": 1, "maxMergedDeltasPerRun": 2}
        await mirror(house, "remote1", settings=settings)
        assert await contents(house, "remote1") == stock.chain[2:]
        house.clean_remotes()


async def test_weakness_25_older_backups_come_after_newer_ones(
    tmp_path: Path, stock: Stock
) -> None:
    """With long-term retention, which asserts strictly rising times on Xen Orchestra."""
    async with house_with(stock, tmp_path) as house:
        settings: dict[str, Any] = {
            "longTermRetention": {"daily": {"retention": 7, "settings": {}}},
            "timezone": "UTC",
        }
        await mirror(
            house, "remote1", filter={"timestamp": times(house, "source")[2]}, settings=settings
        )
        outcome = await mirror(house, "remote1", settings=settings)
        assert outcome.status == "success", outcome.snapshot
        assert await contents(house, "remote1") == stock.chain
        tags = [each["tags"] for each in metadata(house, "remote1")]
        assert [bool(each) for each in tags] == [True, False, True, False]
        house.clean_remotes()


async def test_what_was_deleted_by_hand_comes_back_whole(tmp_path: Path, stock: Stock) -> None:
    """Its place in the chain is taken: it becomes a backup of its own, and the log says why."""
    async with house_with(stock, tmp_path) as house:
        await mirror(house, "remote1")
        (house.folder("remote1") / house.backups("remote1")[1].removeprefix("/")).unlink()
        outcome = await mirror(house, "remote1")
        assert outcome.status == "success", outcome.snapshot
        assert await contents(house, "remote1") == stock.chain
        assert messages(outcome).count("a disk is copied whole") == 2
        house.clean_remotes()


# -- several remotes ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["remote1", "directories1", "encrypted1"])
async def test_what_was_merged_into_a_newer_one_comes_back(
    tmp_path: Path, stock: Stock, target: str
) -> None:
    """Where disks are directories, the newer one has the data of that name for good."""
    async with house_with(stock, tmp_path) as house:
        for kept in (4, 2, 4, 3, 4):
            outcome = await mirror(house, target, settings={"exportRetention": kept})
            assert outcome.status == "success", outcome.snapshot
            assert await contents(house, target) == stock.chain[-kept:]
            house.clean_remotes_but("source")


async def test_a_new_remote_gets_the_whole_and_the_old_one_the_rest(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house:
        early = {"timestamp": {"__or": times(house, "source")[:3]}}
        await mirror(house, "remote1", filter=early)
        settings = {"directories1": {"exportRetention": 1}}
        outcome = await mirror(house, "remote1", "directories1", levels=settings)
        assert outcome.status == "success", outcome.snapshot
        full = {each["data"]["id"]: each["data"]["isFull"] for each in outcome.of("export")}
        assert full == {"remote1": False, "directories1": True}
        assert await contents(house, "remote1") == stock.chain
        assert await contents(house, "directories1") == stock.chain[-1:]
        house.clean_remotes()


async def test_the_source_is_read_once_for_all(tmp_path: Path, stock: Stock) -> None:
    async def reads(*targets: str) -> int:
        async with house_with(stock, tmp_path / "_".join(targets), "directories0") as house:
            async with house.faulty("directories0") as faults:
                assert (await mirror(house, *targets, source="directories0")).status == "success"
                return len([path for _, path in faults.seen if "/blocks/" in path])

    (tmp_path / "remote1").mkdir()
    (tmp_path / "remote1_directories1").mkdir()
    once = await reads("remote1")
    assert once > 0
    assert await reads("remote1", "directories1") == once


# -- what cannot be opened ------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
async def test_weakness_10_a_source_that_is_not_there_fails_the_root(
    tmp_path: Path, stock: Stock, known: bool
) -> None:
    async with house_with(stock, tmp_path) as house:
        house.remote_spec("nowhere")
        from .mirrors import mirror_request

        request = mirror_request(house, "remote1", source="nowhere")
        if not known:
            del request.remotes["nowhere"]  # type: ignore[attr-defined]
        outcome = await house.run(request)
        assert outcome.status == "failure"
        assert outcome.log[-1]["status"] == "failure"
        message = outcome.snapshot["data"]["error"]["message"]
        assert "the source remote nowhere cannot be opened" in message
        assert outcome.of("get remote adapter")[0]["data"]["id"] == "nowhere"
        assert not house.folder("nowhere").exists()


async def test_weakness_10_a_remote_that_does_not_open_is_a_failed_task(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house:
        house.folder("remote1").write_text("no directory")
        outcome = await mirror(house, "remote1", "remote2")
        assert outcome.status == "failure"
        assert outcome.log[-1]["status"] == "success"  # Xen Orchestra derives the failure
        (task,) = outcome.of("get remote adapter")
        assert (task["status"], task["data"]["id"]) == ("failure", "remote1")
        assert await contents(house, "remote2") == stock.chain


async def test_the_source_under_another_name_is_no_target(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        house.remotes["same"] = {**house.remote_spec("source"), "id": "same"}
        outcome = await mirror(house, "same")
        assert outcome.status == "failure"
        assert "the source under another id" in outcome.error("get remote adapter")["message"]


async def test_an_unknown_mode_fails_the_root(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        outcome = await mirror(house, "remote1", mode="sideways")
        assert outcome.log[-1]["status"] == "failure"
        message = "Job mode sideways not implemented for mirror backup"
        assert outcome.snapshot["data"]["error"]["message"] == message


async def test_settings_without_effect_are_told(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        outcome = await mirror(house, "remote1", settings={"preferNbd": True})
        assert outcome.status == "success"
        assert messages(outcome, "backup run", "warnings") == [
            "the setting 'preferNbd' has no effect on a mirror"
        ]


async def test_what_is_wrong_with_the_job_makes_no_task(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        with pytest.raises(Refused, match="whatIsThis"):
            await mirror(house, "remote1", settings={"whatIsThis": 1})
        assert explained(house.folder("source")) == set(house.files("source"))
