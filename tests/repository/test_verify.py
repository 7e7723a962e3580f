"""Every kind of damage is seen where the format or our checksums allow it, and nothing else is
called damaged; a verify changes nothing."""

from __future__ import annotations

import functools
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import brotli
import pytest
import trio

from proxy.disks.disk import Block, block_pool
from proxy.disks.writing import Shape
from proxy.errors import NotFound, Refused, Unreachable
from proxy.formats.checksums import BlockSums, block_digest
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE, NO_UUID, Footer, Header
from proxy.formats.vhd_directory import Compression
from proxy.remotes.faults import Fail, Faults, Gate
from proxy.remotes.interface import Remote
from proxy.remotes.recording import Recording
from proxy.repository import clean_vm, lock_vm
from proxy.repository.checksums import checksums_path, merging_checksums, orphan_checksums
from proxy.repository.incremental_writer import open_incremental_backup
from proxy.repository.verify import verify
from proxy.repository.verify_reports import BackupReport, DiskReport, Report

from .conftest import NOON, VM, metadata_of, open_local, write_full

JOB = "0c3c4b4e-6a3a-4a0e-8f7e-1f6c0d3b9a01"
VDI = "5d9d3f2a-4c1b-4b52-9d0c-2a7c6f0e1b11"
BLOCKS = 6
KINDS = ("files", "directories")
Parent = tuple[str, UUID]


@dataclass
class House:
    """A remote with a chain of backups: each changes block 0 and one more."""

    remote: Remote
    root: Path
    uuids: list[UUID] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)
    vdi: str = VDI

    @property
    def folder(self) -> Path:
        return self.root / "xo-vm-backups" / VM / "vdis" / JOB / self.vdi

    @property
    def ending(self) -> str:
        return ".alias.vhd" if self.remote.use_vhd_directory else ".vhd"

    def disk(self, number: int) -> Path:
        """The file of a disk, or its directory."""
        if self.remote.use_vhd_directory:
            return self.folder / "data" / f"{self.dates[number]}.vhd"
        return self.folder / f"{self.dates[number]}.vhd"

    def name(self, number: int) -> str:
        return f"/xo-vm-backups/{VM}/vdis/{JOB}/{self.vdi}/{self.dates[number]}{self.ending}"

    def json(self, number: int) -> Path:
        return self.root / "xo-vm-backups" / VM / f"{self.dates[number]}.json"

    def block(self, number: int, index: int) -> Path:
        return self.disk(number) / "blocks" / "0" / str(index)

    async def add(self, *, compression: Compression = Compression.BROTLI) -> None:
        number = len(self.uuids)
        uuid = uuid4()
        changed = range(BLOCKS) if number == 0 else sorted({0, number % BLOCKS})
        is_delta = number > 0
        shape = Shape(
            virtual_size=BLOCKS * BLOCK_SIZE - 512,
            order=tuple(changed),
            uuid=uuid,
            is_differencing=is_delta,
            parent_uuid=self.uuids[-1] if is_delta else NO_UUID,
            parent_name=f"{self.dates[-1]}{self.ending}" if is_delta else "",
            timestamp=NOON // 1000 + number,
        )
        sums = BlockSums(BLOCKS)
        pool = block_pool(6)
        async with open_incremental_backup(
            self.remote, VM, NOON + number * 1000, after=self.dates[-1] if is_delta else ""
        ) as writer:
            async with writer.disk(
                "OpaqueRef:1", JOB, self.vdi, shape, compression=compression, sums=sums
            ) as disk:
                for index in changed:
                    buffer = await pool.acquire()
                    size = BLOCK_SIZE - (512 if index == BLOCKS - 1 else 0)
                    data = content(number, index, size).ljust(BLOCK_SIZE, b"\0")
                    buffer.memory[BITMAP_SIZE:] = data
                    sums[index] = block_digest(buffer.memory[BITMAP_SIZE:])
                    await disk.write(Block(index, buffer))
                await disk.commit()
            vdis = {"OpaqueRef:1": {"uuid": str(uuid), "name_label": "disk"}}
            metadata = metadata_of(NOON + number * 1000, vdis=vdis, vbds={}, vifs={})
            await writer.commit({**metadata, "isVhdDifferencing": {"OpaqueRef:1": is_delta}})
        self.uuids.append(uuid)
        self.dates.append(writer.date)


def content(number: int, index: int, size: int) -> bytes:
    """Half of it cannot be compressed."""
    noise = random.Random(number * 100 + index).randbytes(size // 2)
    return noise + bytes(size - len(noise))


_kept: dict[str, tuple[Path, list[UUID], list[str]]] = {}


async def open_house(root: Path, kind: str) -> House:
    remote = await open_local(root, use_vhd_directory=kind == "directories")
    return House(remote, root)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("templates")


@pytest.fixture
def kept(templates: Path, tmp_path: Path) -> Callable[[str], Any]:
    """A chain of three backups, made once of each kind and copied with its times."""

    async def copy(kind: str) -> House:
        if kind not in _kept:
            made = await open_house(templates / kind, kind)
            for _ in range(3):
                await made.add()
            await made.remote.aclose()
            _kept[kind] = (made.root, made.uuids, made.dates)
        source, uuids, dates = _kept[kind]
        shutil.copytree(source, tmp_path / "remote")
        house = await open_house(tmp_path / "remote", kind)
        house.uuids, house.dates = list(uuids), list(dates)
        return house

    return copy


async def reports_of(house: House, **how: Any) -> list[Report]:
    found: list[Report] = []
    with trio.fail_after(30):
        async for report in verify(how.pop("remote", house.remote), **how):
            found.append(report)  # noqa: PERF401  the form of a caller
    return found


def backups(found: list[Report]) -> list[str]:
    return [str(each.status) for each in found if isinstance(each, BackupReport)]


def disks(found: list[Report]) -> list[str]:
    return [str(each.status) for each in found if isinstance(each, DiskReport)]


def kinds(found: list[Report]) -> list[str]:
    """What is wrong with disks."""
    return [
        problem.what for each in found if isinstance(each, DiskReport) for problem in each.problems
    ]


def flip(path: Path, offset: int, *, keep_times: bool = True) -> None:
    """As a disk does it that goes bad: no write, so no new time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# -- all is well ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["structure", "read"])
async def test_good_backups_are_ok_each_disk_once(
    kept: Callable[[str], Any], kind: str, level: str
) -> None:
    house = await kept(kind)
    progress: list[tuple[int, int]] = []
    found = await reports_of(house, level=level, on_progress=lambda *at: progress.append(at))
    assert backups(found) == ["ok"] * 3
    assert disks(found) == ["ok"] * 3
    assert [type(each).__name__ for each in found] == ["DiskReport", "BackupReport"] * 3
    assert (
        progress[-1][0]
        == progress[-1][1]
        == sum(json.loads(house.json(number).read_bytes())["size"] for number in range(3))
    )
    assert progress == sorted(progress)
    last = found[-1]
    assert isinstance(last, BackupReport)
    assert last.disks == [house.name(2), house.name(1), house.name(0)]
    for each in found:
        if isinstance(each, DiskReport):
            assert each.checksum.result == ("match" if level == "read" else "unknown")
            assert each.read == (each.blocks if level == "read" else 0)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_verify_changes_nothing(kept: Callable[[str], Any], kind: str) -> None:
    house = await kept(kind)
    await write_full(house.remote, NOON + 3_600_000)
    flip(house.block(1, 1) if kind == "directories" else house.disk(1), 700_000)
    (house.root / "xo-vm-backups" / VM / "20200101T000000Z.json").write_text("{")
    recording = Recording(house.remote)
    before = tree(house.root)
    assert "damaged" in backups(await reports_of(house, level="read", remote=recording))
    assert recording.changes == []
    assert tree(house.root) == before


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*")}


# -- damage --------------------------------------------------------------------------------


async def test_only_the_checksum_sees_a_wrong_byte_in_a_file(kept: Callable[[str], Any]) -> None:
    house = await kept("files")
    first_block = 2048  # footer, header and table of six entries
    flip(house.disk(0), first_block + BITMAP_SIZE + 3 * (BITMAP_SIZE + BLOCK_SIZE) + 12345)
    assert backups(await reports_of(house)) == ["ok"] * 3
    found = await reports_of(house, level="read")
    assert backups(found) == ["damaged"] * 3
    assert disks(found) == ["damaged", "ok", "ok"]
    (report,) = [each for each in found if isinstance(each, DiskReport) and each.problems]
    assert report.path == house.name(0)
    assert report.checksum.result == "mismatch"
    assert [(each.what, each.block) for each in report.problems] == [("checksum", 3)]
    (house.root / checksums_path(house.name(0))).unlink()
    found = await reports_of(house, level="read")
    assert backups(found) == ["ok"] * 3
    assert isinstance(found[0], DiskReport)
    assert found[0].checksum.reason == "NONE"


@pytest.mark.parametrize("index", range(BLOCKS))
@pytest.mark.parametrize("where", [0.1, 0.5, 0.999])
async def test_a_wrong_byte_in_any_block_of_a_directory_is_seen(
    kept: Callable[[str], Any], index: int, where: float
) -> None:
    house = await kept("directories")
    path = house.block(0, index)
    flip(path, int(path.stat().st_size * where))
    found = await reports_of(house, level="read")
    assert backups(found) == ["damaged"] * 3
    (report,) = [each for each in found if isinstance(each, DiskReport) and each.problems]
    assert [each.block for each in report.problems] == [index]
    assert report.problems[0].path is not None


def cut_end(house: House) -> Path:
    path = house.disk(1)
    os.truncate(path, path.stat().st_size - 512)
    return path


def cut_middle(house: House) -> Path:
    path = house.disk(1)
    os.truncate(path, path.stat().st_size // 2)
    return path


def change_header(house: House) -> Path:
    flip(house.disk(1), 512 + 70)
    return house.disk(1)


def change_footer(house: House) -> Path:
    flip(house.disk(1), 70)
    return house.disk(1)


def change_table(house: House) -> Path:
    flip(house.disk(1), 1536 + 3)
    return house.disk(1)


def lose_parent(house: House) -> Path:
    house.disk(0).unlink()
    return house.disk(1)


def wrong_uuid(house: House) -> Path:
    """The parent is another disk: its header and footers are right, its uuid is not."""
    path = house.disk(0)
    raw = bytearray(path.read_bytes())
    footer = Footer.parse(bytes(raw[:512]))
    other = Footer(
        current_size=footer.current_size,
        original_size=footer.original_size,
        disk_type=footer.disk_type,
        uuid=uuid4(),
    ).pack()
    raw[:512] = raw[-512:] = other
    path.write_bytes(raw)
    return house.disk(1)


@pytest.mark.parametrize(
    "harm",
    [
        cut_end,
        cut_middle,
        change_header,
        change_footer,
        change_table,
        lose_parent,
        wrong_uuid,
    ],
)
async def test_damaged_structures_of_a_file_are_seen_without_reading(
    kept: Callable[[str], Any], harm: Callable[[House], Path]
) -> None:
    house = await kept("files")
    path = harm(house)
    found = await reports_of(house)
    assert backups(found)[1:] == ["damaged"] * 2
    damaged = [each for each in found if isinstance(each, DiskReport) and each.status == "damaged"]
    assert [Path(each.path).name for each in damaged] == [path.name]
    assert all(each.message and each.path for each in damaged[0].problems)


def lose_block(house: House) -> str:
    house.block(1, 1).unlink()
    return "block missing"


def empty_block(house: House) -> str:
    house.block(1, 1).write_bytes(b"")
    return "block size"


def huge_block(house: House) -> str:
    house.block(1, 1).write_bytes(bytes(BLOCK_SIZE + 100_000))
    return "block size"


def lose_footer(house: House) -> str:
    (house.disk(1) / "footer").unlink()
    return "footer missing"


def lose_table(house: House) -> str:
    (house.disk(1) / "bat").unlink()
    return "bat missing"


def wrong_filters(house: House) -> str:
    (house.disk(1) / "chunk-filters.json").write_text('["gzip"]')
    return "chunk"


def lose_filters(house: House) -> str:
    (house.disk(1) / "chunk-filters.json").unlink()
    return "header cut"


def lose_data(house: House) -> str:
    shutil.rmtree(house.disk(1))
    return "missing"


def empty_alias(house: House) -> str:
    (house.root / house.name(1).lstrip("/")).write_bytes(b"")
    return "alias"


@pytest.mark.parametrize(
    "harm",
    [
        lose_block,
        empty_block,
        huge_block,
        lose_footer,
        lose_table,
        wrong_filters,
        lose_filters,
        lose_data,
        empty_alias,
    ],
)
async def test_damaged_structures_of_a_directory_are_seen_without_reading(
    kept: Callable[[str], Any], harm: Callable[[House], str]
) -> None:
    house = await kept("directories")
    what = harm(house)
    found = await reports_of(house)
    assert backups(found) == ["ok", "damaged", "damaged"]
    assert what in kinds(found)


async def test_a_filter_of_a_later_version_is_unknown(kept: Callable[[str], Any]) -> None:
    house = await kept("directories")
    (house.disk(1) / "chunk-filters.json").write_text('["lzma"]')
    assert backups(await reports_of(house)) == ["ok", "unknown", "unknown"]


async def test_swapped_blocks_are_seen(kept: Callable[[str], Any]) -> None:
    """Each is a whole block: only the checksum knows where it belongs."""
    house = await kept("directories")
    one, other = house.block(0, 2), house.block(0, 3)
    one.rename(house.folder / "x")
    other.rename(one)
    (house.folder / "x").rename(other)
    found = await reports_of(house, level="read")
    (report,) = [each for each in found if isinstance(each, DiskReport) and each.problems]
    assert sorted((each.what, each.block) for each in report.problems) == [
        ("checksum", 2),
        ("checksum", 3),
    ]


async def test_a_block_of_another_size_is_seen_when_read(kept: Callable[[str], Any]) -> None:
    house = await kept("directories")
    house.block(0, 4).write_bytes(brotli.compress(bytes(1000)))
    found = await reports_of(house, level="read")
    assert kinds(found) == ["block size"]


async def test_missing_disk_and_metadata_that_say_too_little(kept: Callable[[str], Any]) -> None:
    house = await kept("files")
    house.disk(2).unlink()
    metadata = json.loads(house.json(1).read_bytes())
    del metadata["vmSnapshot"]
    house.json(1).write_text(json.dumps(metadata))
    house.json(0).write_text('{"mode":')
    found = await reports_of(house)
    of_backups = {
        each.id.rpartition("/")[2]: each for each in found if isinstance(each, BackupReport)
    }
    assert {key: str(each.status) for key, each in of_backups.items()} == {
        f"{date}.json": "damaged" for date in house.dates
    }
    said = [of_backups[f"{date}.json"].problems[0].what for date in house.dates]
    assert said == ["metadata", "metadata", "disk missing"]


async def test_a_mode_of_a_later_version_is_unknown(kept: Callable[[str], Any]) -> None:
    house = await kept("files")
    metadata = json.loads(house.json(1).read_bytes())
    house.json(1).write_text(json.dumps({**metadata, "mode": "forever"}))
    assert backups(await reports_of(house)) == ["ok", "unknown", "ok"]


# -- what proves nothing -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_disk_that_somebody_wrote_has_unknown_checksums(
    kept: Callable[[str], Any], kind: str
) -> None:
    house = await kept(kind)
    path = house.disk(0) if kind == "files" else house.disk(0) / "bat"
    os.utime(path)
    found = await reports_of(house, level="read")
    assert backups(found) == ["ok"] * 3
    first = found[0]
    assert isinstance(first, DiskReport)
    assert (first.checksum.result, first.checksum.reason) == ("unknown", "CHANGED")


async def test_damaged_checksums_say_nothing_of_the_disk(kept: Callable[[str], Any]) -> None:
    house = await kept("files")
    path = house.root / checksums_path(house.name(0))
    raw = path.read_bytes()
    for damaged in (raw[:-1], raw[:20], b"", raw[:60] + b"\0" + raw[61:], bytes(5000)):
        path.write_bytes(damaged)
        found = await reports_of(
            house, level="read", filename=f"/xo-vm-backups/{VM}/{house.dates[0]}.json"
        )
        assert backups(found) == ["ok"]
        assert isinstance(found[0], DiskReport)
        assert found[0].checksum.reason == "UNREADABLE"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_storage_that_fails_is_unreadable_not_damaged(
    kept: Callable[[str], Any], kind: str
) -> None:
    house = await kept(kind)
    faults = Faults(house.remote)
    verb = "read.*" if kind == "files" else "read_file"
    path = "*/vdis/*.vhd" if kind == "files" else "*/blocks/*"
    faults.add(verb, Fail(Unreachable("EIO: input/output error", code="EIO")), path=path, times=99)
    found = await reports_of(house, level="read", remote=faults)
    assert backups(found) == ["unreadable"] * 3


async def test_one_bad_read_is_healed_by_the_second(kept: Callable[[str], Any]) -> None:
    house = await kept("directories")
    faults = Faults(house.remote)
    faults.add("read_file", Fail(Unreachable("EIO", code="EIO")), path="*/blocks/0/3")
    faults.add("read_file", Fail(Unreachable("EIO", code="EIO")), path="*/bat")
    found = await reports_of(house, level="read", remote=faults)
    assert faults.unused == []
    assert backups(found) == ["ok"] * 3


async def test_a_directory_that_cannot_be_listed_hides_no_other_vm(
    kept: Callable[[str], Any],
) -> None:
    house = await kept("files")
    (house.root / "xo-vm-backups" / "0-other").mkdir()
    faults = Faults(house.remote)
    faults.add("list", Fail(Unreachable("EIO", code="EIO")), path="*/0-other")
    found = await reports_of(house, remote=faults)
    assert backups(found) == ["unreadable", "ok", "ok", "ok"]


async def test_a_backup_deleted_meanwhile_is_not_damaged(kept: Callable[[str], Any]) -> None:
    house = await kept("files")
    faults = Faults(house.remote)
    gate = faults.add("list", Gate(), path="*/vdis/*")
    found: list[Report] = []
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            found.extend(await reports_of(house, remote=faults))

        nursery.start_soon(look)
        await gate.reached.wait()
        house.json(0).unlink()
        shutil.rmtree(house.folder)
        gate.release.set()
    assert backups(found)[0] == "unknown"


# -- merges --------------------------------------------------------------------------------


def merge_by_hand(house: House) -> None:
    """What a merge of the two oldest directories does: blocks of the newer one are moved into the
    older one, which gets table and footer anew and then the newer one's name."""
    for block in (house.disk(1) / "blocks" / "0").iterdir():
        block.rename(house.disk(0) / "blocks" / "0" / block.name)
    footer = Footer.parse(brotli.decompress((house.disk(0) / "footer").read_bytes()))
    merged = Footer(
        current_size=footer.current_size,
        original_size=footer.original_size,
        disk_type=footer.disk_type,
        uuid=house.uuids[1],
        timestamp=footer.timestamp + 1,
    )
    (house.disk(0) / "footer").write_bytes(brotli.compress(merged.pack()))
    names = [house.folder / f"{house.dates[number]}.alias.vhd" for number in (0, 1)]
    names[0].rename(names[1])
    shutil.rmtree(house.disk(1))
    house.json(0).unlink()


async def test_our_merge_carries_the_checksums_along(kept: Callable[[str], Any]) -> None:
    house = await kept("directories")
    async with merging_checksums(house.remote, [house.name(0), house.name(1)]):
        merge_by_hand(house)
    found = await reports_of(house, level="read")
    assert backups(found) == ["ok"] * 2
    assert [each.checksum.result for each in found if isinstance(each, DiskReport)] == ["match"] * 2
    assert [path.name for path in sorted(house.folder.glob(".*.xxh3"))] == [
        f".{house.dates[number]}.xxh3" for number in (1, 2)
    ]
    flip(house.block(0, 0), 1000)
    assert backups(await reports_of(house, level="read")) == ["damaged"] * 2


async def test_somebody_elses_merge_leaves_them_unknown(kept: Callable[[str], Any]) -> None:
    house = await kept("directories")
    merge_by_hand(house)
    found = await reports_of(house, level="read")
    assert backups(found) == ["ok"] * 2
    assert [each.checksum.reason for each in found if isinstance(each, DiskReport)] == [
        "CHANGED",
        None,
    ]
    names = [path.name for path in house.folder.iterdir()]
    assert orphan_checksums(names) == [f".{house.dates[0]}.xxh3"]


async def test_a_merge_of_unknown_checksums_has_none(kept: Callable[[str], Any]) -> None:
    house = await kept("directories")
    os.utime(house.disk(0) / "footer")
    async with merging_checksums(house.remote, [house.name(0), house.name(1)]):
        merge_by_hand(house)
    assert [path.name for path in house.folder.glob(".*.xxh3")] == [f".{house.dates[2]}.xxh3"]


def state_of(house: House, step: str = "mergeBlocks") -> None:
    names = [f"{house.dates[number]}{house.ending}" for number in (0, 1)]
    state = {
        "child": {"uuid": str(house.uuids[1])},
        "parent": {"uuid": str(house.uuids[0])},
        "chain": names,
        "currentBlock": 0,
        "mergedDataSize": 0,
        "step": step,
        "diskSize": 0,
    }
    (house.folder / f".{names[0]}.merge.json").write_text(json.dumps(state))


@pytest.mark.parametrize("state", ["as it is", "not readable"])
async def test_a_chain_under_merge_is_merging_at_worst(
    kept: Callable[[str], Any], state: str
) -> None:
    house = await kept("directories")
    house.block(1, 1).rename(house.block(0, 1))
    house.json(0).unlink()
    state_of(house)
    if state == "not readable":
        (house.folder / f".{house.dates[0]}.alias.vhd.merge.json").write_text('{"chain":')
    found = await reports_of(house, level="read")
    assert backups(found) == ["ok" if state == "as it is" else "merging"] * 2


async def test_a_merge_that_begins_meanwhile_is_no_damage(kept: Callable[[str], Any]) -> None:
    house = await kept("directories")
    faults = Faults(house.remote)
    gate = faults.add("read_file", Gate(), path=f"*/{house.dates[1]}.vhd/blocks/0/1")
    found: list[Report] = []
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            found.extend(await reports_of(house, level="read", remote=faults))

        nursery.start_soon(look)
        await gate.reached.wait()
        state_of(house)
        house.block(1, 1).rename(house.block(0, 1))
        gate.release.set()
    assert "damaged" not in backups(found)


@pytest.mark.parametrize("kind", KINDS)
async def test_checksums_go_with_their_disks(kept: Callable[[str], Any], kind: str) -> None:
    house = await kept(kind)
    assert len(list(house.folder.glob(".*.xxh3"))) == 3
    (house.folder / ".1767225600000..20200101T000000Z.xxh3.tmp").touch()
    (house.folder / ".other.xxh3.txt").touch()
    house.json(2).unlink()
    async with lock_vm(house.remote, VM, owner="test") as lock:
        now = NOON / 1000 + 10**9
        await clean_vm(house.remote, VM, lock=lock, warn=lambda *_: None, now=lambda: now)
    left = sorted(path.name for path in house.folder.glob(".*"))
    assert left == [*(f".{date}.xxh3" for date in house.dates[:2]), ".other.xxh3.txt"]


# -- samples, names, cancel ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_sample_reads_its_share_and_in_time_everything(
    kept: Callable[[str], Any], kind: str
) -> None:
    house = await kept(kind)
    flip(
        house.block(0, 3) if kind == "directories" else house.disk(0),
        9_000_000 if kind == "files" else 500_000,
    )
    only = f"/xo-vm-backups/{VM}/{house.dates[0]}.json"
    seen: list[str] = []
    for day in range(3):
        for _ in range(2):
            found = await reports_of(
                house,
                level="read",
                sample=1 / 3,
                filename=only,
                now=lambda day=day: NOON / 1000 + day * 86400,
            )
            report = found[0]
            assert isinstance(report, DiskReport)
            assert report.read == 2
            seen += backups(found)
    assert seen[::2] == seen[1::2]
    assert sorted(seen[::2]) == ["damaged", "ok", "ok"]


@pytest.mark.parametrize("sample", [0, -1, 1.5, float("nan")])
async def test_no_sample_at_all_is_refused(kept: Callable[[str], Any], sample: float) -> None:
    house = await kept("files")
    with pytest.raises(Refused, match="0 < sample <= 1"):
        await reports_of(house, level="read", sample=sample)
    with pytest.raises(Refused, match="level 'read'"):
        await reports_of(house, sample=0.5)


@pytest.mark.parametrize(
    "filename",
    [
        "../../etc/passwd",
        f"/xo-vm-backups/{VM}/../../x.json",
        f"/xo-vm-backups/{VM}/vdis/x.json",
        "",
    ],
)
async def test_a_name_that_is_no_backup_is_refused(
    kept: Callable[[str], Any], filename: str
) -> None:
    house = await kept("files")
    with pytest.raises(Refused):
        await reports_of(house, filename=filename)
    with pytest.raises(Refused):
        await reports_of(house, vm_uuid="../x")
    with pytest.raises(Refused, match="no backup of the VM"):
        await reports_of(
            house, vm_uuid="another", filename=f"/xo-vm-backups/{VM}/20200101T000000Z.json"
        )
    with pytest.raises(NotFound):
        await reports_of(house, filename=f"/xo-vm-backups/{VM}/20200101T000000Z.json")


async def test_metadata_cannot_lead_out_of_its_vm(kept: Callable[[str], Any]) -> None:
    house = await kept("files")
    metadata = json.loads(house.json(0).read_bytes())
    metadata["vhds"] = {"OpaqueRef:1": "../../../etc/x.vhd"}
    house.json(0).write_text(json.dumps(metadata))
    faults = Faults(house.remote)
    found = await reports_of(house, remote=faults)
    assert backups(found)[0] == "damaged"
    assert not [path for _, path in faults.seen if "etc" in path]


async def test_a_chain_that_bites_its_tail_ends(kept: Callable[[str], Any]) -> None:
    house = await kept("directories")
    header = house.disk(1) / "header"
    raw = brotli.decompress(header.read_bytes())
    parsed = Header.parse(raw)
    name = f"{house.dates[1]}.alias.vhd"
    header.write_bytes(
        brotli.compress(replace(parsed, parent_name=name, parent_uuid=house.uuids[1]).pack())
    )
    found = await reports_of(house)
    assert backups(found) == ["ok", "damaged", "damaged"]
    assert "chain" in kinds(found)


@pytest.mark.parametrize("kind", [*KINDS, "full"])
async def test_a_cancel_at_any_read_leaves_nothing(kept: Callable[[str], Any], kind: str) -> None:
    house = await kept("files" if kind == "full" else kind)
    if kind == "full":
        await write_full(house.remote, NOON - 3_600_000)
    for skip in range(0, 20, 3):
        faults = Faults(house.remote)
        gate = faults.add("read*", Gate(), skip=skip)
        async with trio.open_nursery() as nursery:

            async def look(faults: Faults = faults) -> None:
                await reports_of(house, level="read", remote=faults)

            nursery.start_soon(look)
            with trio.fail_after(10):
                await gate.reached.wait()
            nursery.cancel_scope.cancel()


# -- full backups --------------------------------------------------------------------------


@functools.cache
def full_xva(size: int = 5_000_000) -> bytes:
    """By Python's own tar writer: ova.xml first, then a chunk."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in (
            ("ova.xml", b"<x/>"),
            ("Ref:4/00000000", random.Random(1).randbytes(size)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
async def full(tmp_path: Path) -> House:
    house = await open_house(tmp_path / "full", "files")
    backup = await write_full(house.remote, NOON, data=full_xva())
    house.dates.append(Path(backup.id).stem)
    return house


async def full_report(house: House, **how: Any) -> BackupReport:
    (report,) = await reports_of(house, **how)
    assert isinstance(report, BackupReport)
    return report


async def test_a_good_archive_is_ok(full: House) -> None:
    report = await full_report(full)
    assert (report.status, report.read) == ("ok", 0)
    report = await full_report(full, level="read")
    assert report.status == "ok"
    assert report.checksum is not None
    assert report.checksum.result == "match"
    assert (
        report.read == report.checksum.compared == full.json(0).with_suffix(".xva").stat().st_size
    )


@pytest.mark.parametrize("offset", [100, 600, 2000, 3_000_000, -5000])
async def test_a_wrong_byte_in_an_archive_is_seen(full: House, offset: int) -> None:
    path = full.json(0).with_suffix(".xva")
    flip(path, offset % path.stat().st_size)
    assert (await full_report(full)).status == "ok"
    report = await full_report(full, level="read")
    assert report.status == "damaged"


@pytest.mark.parametrize("wrong", ["archive", "checksum"])
async def test_remotes_weakness_4_a_small_archive_that_is_wrong_ends_the_read(
    tmp_path: Path, wrong: str
) -> None:
    """Upstream compares the checksum when nobody listens yet, and its read never ends."""
    house = await open_house(tmp_path / "small", "files")
    backup = await write_full(house.remote, NOON, data=full_xva(100))
    house.dates.append(Path(backup.id).stem)
    path = house.json(0).with_suffix(".xva")
    if wrong == "archive":
        flip(path, 1540)  # in the content of its chunk
    else:
        path.with_suffix(".xva.checksum").write_bytes(b"$1$$" + b"0" * 32)
    with trio.fail_after(10):
        report = await full_report(house, level="read")
    assert report.status == "damaged"
    assert report.checksum is not None
    assert (report.checksum.result, report.checksum.compared) == ("mismatch", path.stat().st_size)


async def test_without_its_checksum_the_archive_is_read_all_the_same(full: House) -> None:
    path = full.json(0).with_suffix(".xva")
    path.with_suffix(".xva.checksum").unlink()
    report = await full_report(full, level="read")
    assert report.status == "ok"
    assert report.checksum is not None
    assert report.checksum.reason == "NONE"
    path.with_suffix(".xva.checksum").write_text("$5$$abc")
    report = await full_report(full, level="read")
    assert report.checksum is not None
    assert (report.status, report.checksum.reason) == ("ok", "UNREADABLE")
    flip(path, 0)  # the name of its first entry
    assert (await full_report(full, level="read")).status == "damaged"


@pytest.mark.parametrize("cut", [20_480, 100_352, 100_000])  # it ends with 20 zero blocks and more
async def test_a_cut_archive_is_seen_without_reading(full: House, cut: int) -> None:
    path = full.json(0).with_suffix(".xva")
    os.truncate(path, path.stat().st_size - cut)
    report = await full_report(full)
    assert report.status == "damaged"
    metadata = json.loads(full.json(0).read_bytes())
    full.json(0).write_text(json.dumps({**metadata, "size": path.stat().st_size}))
    report = await full_report(full)
    assert report.status == "damaged"
    assert report.problems[0].what == "archive cut"


async def test_a_missing_archive_is_damage(full: House) -> None:
    full.json(0).with_suffix(".xva").unlink()
    report = await full_report(full)
    assert report.status == "damaged"
    assert report.problems[0].what == "missing"


async def test_a_sample_takes_an_archive_whole_or_not_at_all(full: House) -> None:
    taken = [
        (
            await full_report(
                full, level="read", sample=0.25, now=lambda day=day: day * 86400.0 + 5
            )
        ).read
        for day in range(4)
    ]
    size = full.json(0).with_suffix(".xva").stat().st_size
    assert sorted(taken) == [0, 0, 0, size]
