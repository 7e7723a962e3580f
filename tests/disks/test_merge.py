"""Merging chains of every kind, against a dictionary, other tools and crashes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import pyvhdi
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.disks.merge import merge_chain
from proxy.disks.merge_state import MergeState, Phase, Step, read_states, state_path
from proxy.disks.opening import open_chain, open_disk
from proxy.errors import Busy, Corrupt, Refused
from proxy.formats import vhd
from proxy.remotes.faults import Fail, Faults, Gate
from tests.disks.chains import (
    BLOCK,
    Held,
    Point,
    files,
    merge,
    model,
    name_of,
    place_chain,
    tags,
)
from tests.disks.directories import UNPACK, identity, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

KINDS = ("file", "brotli", "gzip", "none", "aliased")
FOLDER = "vdi"


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Faults]:
    async with opened(tmp_path) as faults:
        yield faults


def chain_of(kind: str) -> list[Point]:
    return [
        Point({0: 1, 1: 2, 3: 3}, kind),
        Point({1: 4, 2: 5}, kind),
        Point({2: 6, 3: 7}, kind),
    ]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_chain_becomes_one_disk(remote: Faults, tmp_path: Path, kind: str) -> None:
    points = chain_of(kind)
    chain = place_chain(tmp_path, FOLDER, points)
    told: list[tuple[int, int]] = []
    await merge(remote, chain, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (3, 3)]
    assert await tags(remote, chain[-1]) == model(points) == {0: 1, 1: 4, 2: 6, 3: 7}
    async with open_disk(remote, chain[-1]) as disk:
        assert disk.uuid == identity(3)
        assert not disk.is_differencing
        assert disk.footer.timestamp == 1_700_000_000
        assert list(disk.blocks) == [0, 1, 2, 3]
    left = {path.split("/")[1] for path in files(tmp_path)}
    assert left == {name_of(2, points[2])} | ({"data"} if kind != "file" else set())
    if kind != "file":
        assert [each.name for each in (tmp_path / FOLDER / "data").iterdir()] == [
            "20260101T000000Z.vhd"
        ], "the data keeps the oldest name"


@st.composite
def chains(draw: st.DrawFn) -> list[Point]:
    aliased = draw(st.booleans())
    kinds = [kind for kind in KINDS if kind != "file"] if aliased else ["file"]
    points: list[Point] = []
    count = draw(st.integers(1, 3))
    for position in range(draw(st.integers(2, 4))):
        count += draw(st.sampled_from([0, 0, 1, 127 if aliased is False else 2]))
        # in between any name is fine: only the oldest hands its name on
        kind = draw(st.sampled_from(kinds))
        indexes = draw(st.lists(st.sampled_from([*range(min(count, 4)), count - 1]), unique=True))
        points.append(
            Point({index: 10 * position + index % 7 + 1 for index in indexes}, kind, count)
        )
    return points


@settings(max_examples=15, deadline=None)
@given(points=chains(), upto=st.integers(2, 4))
def test_any_part_of_any_chain(
    points: list[Point], upto: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The rest of the chain, which stands on what was merged, reads the same."""
    root = tmp_path_factory.mktemp("merge")

    async def run() -> None:
        async with opened(root) as remote:
            chain = place_chain(root, FOLDER, points)
            expected = [model(points[: number + 1]) for number in range(len(points))]
            first = max(0, upto - 3)
            merged = chain[first:upto]
            if len(merged) < 2:
                return
            await merge(remote, merged)
            for number in range(len(merged) - 1 + first, len(chain)):
                assert await tags(remote, chain[number]) == expected[number]

    trio.run(run)


@pytest.mark.parametrize("grown", [5, 128, 129, 300])
async def test_a_grown_file_is_read_by_others(remote: Faults, tmp_path: Path, grown: int) -> None:
    points = [Point({3: 1, 0: 2}, "file"), Point({1: 3, grown - 1: 4}, "file", grown)]
    chain = place_chain(tmp_path, FOLDER, points)
    await merge(remote, chain)
    path = tmp_path / chain[-1]
    raw = tmp_path / "raw"
    await trio.run_process(["qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw])
    file = pyvhdi.file()
    file.open(str(path))
    assert file.get_media_size() == points[1].size
    theirs = raw.open("rb")
    for index in (0, 1, 2, 3, grown - 1):
        file.seek_offset(index * BLOCK, 0)
        data = file.read_buffer(BLOCK)
        theirs.seek(index * BLOCK)
        assert theirs.read(len(data)) == data
        assert data[0] == {0: 2, 1: 3, 2: 0, 3: 1, grown - 1: 4}[index]
    theirs.close()
    file.close()
    assert await tags(remote, chain[-1]) == model(points)
    content = path.read_bytes()
    assert content[:512] == content[-512:]


async def test_a_grown_directory_has_room_for_its_blocks(remote: Faults, tmp_path: Path) -> None:
    """Upstream leaves header and table as they were and cannot open the disk any more
    (vhd, weakness 4)."""
    points = [Point({0: 1}), Point({9: 2}, count=10)]
    chain = place_chain(tmp_path, FOLDER, points)
    await merge(remote, chain)
    data = tmp_path / FOLDER / "data" / "20260101T000000Z.vhd"
    header = UNPACK["brotli"]((data / "header").read_bytes())
    assert int.from_bytes(header[28:32], "big") == 10
    assert UNPACK["brotli"]((data / "bat").read_bytes()) == bytes((0x80, 0x40, *[0] * 8))
    assert await tags(remote, chain[-1]) == {0: 1, 9: 2}


async def test_codecs_are_not_mixed(remote: Faults, tmp_path: Path) -> None:
    """Upstream would put gzip blocks under a brotli manifest (vhd, weakness 5)."""
    points = [Point({0: 1}, "brotli"), Point({1: 2}, "gzip"), Point({2: 3}, "brotli")]
    chain = place_chain(tmp_path, FOLDER, points)
    await merge(remote, chain)
    data = tmp_path / FOLDER / "data" / "20260101T000000Z.vhd"
    assert json.loads((data / "chunk-filters.json").read_text()) == ["brotli"]
    for index in range(3):
        stored = UNPACK["brotli"]((data / "blocks" / "0" / str(index)).read_bytes())
        assert stored[512] == index + 1


async def test_a_directory_is_merged_by_renaming_only(remote: Faults, tmp_path: Path) -> None:
    points = [Point({0: 1}), Point({0: 2, 1: 3}), Point({2: 4})]
    chain = place_chain(tmp_path, FOLDER, points)
    inodes = {
        (tmp_path / FOLDER / f"data/2026010{day}T000000Z.vhd/blocks/0/{index}").stat().st_ino
        for day, index in ((2, 0), (2, 1), (3, 2))
    }
    await merge(remote, chain)
    merged = tmp_path / FOLDER / "data" / "20260101T000000Z.vhd" / "blocks" / "0"
    assert {path.stat().st_ino for path in merged.iterdir()} == inodes


async def test_the_parent_of_the_oldest_stays_its_parent(remote: Faults, tmp_path: Path) -> None:
    points = [Point({0: 1}), Point({1: 2}), Point({2: 3}), Point({3: 4})]
    chain = place_chain(tmp_path, FOLDER, points)
    await merge(remote, chain[1:3])
    async with open_disk(remote, chain[2]) as disk:
        assert disk.header.parent_name == name_of(0, points[0])
        assert disk.header.parent_uuid == identity(1)
        assert disk.is_differencing
    assert await tags(remote, chain[3]) == {0: 1, 1: 2, 2: 3, 3: 4}


@pytest.mark.parametrize("kind", ["brotli", "gzip"])
async def test_a_hole_in_a_child_is_found_before_anything_changes(
    remote: Faults, tmp_path: Path, kind: str
) -> None:
    """Moved blocks are missing too: later it could not be told any more."""
    chain = place_chain(tmp_path, FOLDER, [Point({0: 1}), Point({0: 2, 1: 3}, kind)])
    (tmp_path / FOLDER / "data/20260102T000000Z.vhd/blocks/0/0").unlink()
    before = files(tmp_path)
    with pytest.raises(Corrupt):
        await merge(remote, chain)
    assert files(tmp_path) == before


async def test_a_lost_lock_stops_before_the_next_step(remote: Faults, tmp_path: Path) -> None:
    class Lost(Held):
        def __init__(self, after: int) -> None:
            self.left = after

        async def check(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise Busy("lost")

    for after in range(30):
        root = tmp_path / str(after)
        points = chain_of("brotli")
        chain = place_chain(root, FOLDER, points)
        async with opened(root) as there:
            try:
                await merge_chain(there, chain, lock=Lost(after), owned=chain)
            except Busy:
                assert await tags(there, chain[-1]) == model(points)
                continue
            break
    assert 6 < after < 29


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancel_leaves_a_merge_that_goes_on(
    remote: Faults, tmp_path: Path, kind: str
) -> None:
    points = chain_of(kind)
    chain = place_chain(tmp_path, FOLDER, points)
    with trio.CancelScope() as scope:
        await merge(remote, chain, progress=lambda done, total: scope.cancel())
    assert scope.cancelled_caught
    listed = [entry.name for entry in await remote.list(FOLDER)]
    state = (await read_states(remote, FOLDER, listed))[chain[0]]
    assert isinstance(state, MergeState)
    assert state.chain == tuple(name_of(number, point) for number, point in enumerate(points))
    assert (state.parent_uuid, state.child_uuid) == (identity(1), identity(3))
    assert await tags(remote, chain[-1]) == model(points)
    await merge(remote, chain, state=state)
    assert await tags(remote, chain[-1]) == model(points)


@pytest.mark.parametrize("kind", ["brotli", "file"])
async def test_disks_that_are_not_owned_keep_their_data(
    remote: Faults, tmp_path: Path, kind: str
) -> None:
    points = chain_of("brotli")
    chain = place_chain(tmp_path, FOLDER, points)
    await merge_chain(remote, chain, lock=Held(), owned=())
    data = {path.name for path in (tmp_path / FOLDER / "data").iterdir()}
    assert data == {f"2026010{day}T000000Z.vhd" for day in (1, 2, 3)}
    assert await tags(remote, chain[-1]) == model(points)


async def test_a_file_of_two_tebibytes_does_not_grow(remote: Faults, tmp_path: Path) -> None:
    points = [Point({0: 1}, "file"), Point({1: 2}, "file")]
    chain = place_chain(tmp_path, FOLDER, points)
    path = tmp_path / chain[0]
    raw = bytearray(path.read_bytes())
    raw[1536:1540] = (0xFFFFFFFE - 4097).to_bytes(4, "big")
    with path.open("wb") as file:
        file.write(raw[:2048])
        file.truncate((0xFFFFFFFE - 4097) * 512 + vhd.STORED_BLOCK)
        file.seek(0, 2)
        file.write(raw[:512])
    with pytest.raises(Refused) as caught:
        await merge(remote, chain)
    assert caught.value.code == "EFBIG"


# -- what Xen Orchestra left


async def test_children_removed_before_the_parent_is_renamed(
    remote: Faults, tmp_path: Path
) -> None:
    """Upstream's own clean loses this chain (vhd, weakness 1; remote-layout, weakness 1)."""
    points = chain_of("brotli")
    chain = place_chain(tmp_path, FOLDER, points)
    done = await merged_by_xen_orchestra(remote, tmp_path, chain)
    assert await tags(remote, chain[-1]) == model(points), "read through the state"
    await merge(remote, chain, state=done, phase=Phase.RENAME)
    assert await tags(remote, chain[-1]) == model(points)
    assert {path.split("/")[1] for path in files(tmp_path)} == {"data", name_of(2, points[2])}


async def merged_by_xen_orchestra(remote: Faults, root: Path, chain: list[str]) -> MergeState:
    """Its state after the children's removal: blocks, table and footer are in the oldest."""
    await merge(remote, chain)
    (root / chain[-1]).rename(root / chain[0])
    done = MergeState(
        chain=tuple(path.split("/")[-1] for path in chain),
        step=Step.CLEANUP,
        next_block=4,
        child_uuid=identity(3),
        parent_uuid=identity(1),
    )
    (root / state_path(chain[0])).write_bytes(done.encode())
    return done


async def test_two_aliases_of_one_directory(remote: Faults, tmp_path: Path) -> None:
    """Upstream cannot resume from between the two steps of its renaming (vhd, weakness 2)."""
    points = chain_of("brotli")
    chain = place_chain(tmp_path, FOLDER, points)
    done = await merged_by_xen_orchestra(remote, tmp_path, chain)
    (tmp_path / chain[-1]).write_bytes((tmp_path / chain[0]).read_bytes())
    assert await tags(remote, chain[-1]) == model(points)
    await merge(remote, chain, state=done, phase=Phase.RENAME)
    assert await tags(remote, chain[-1]) == model(points)
    assert {path.split("/")[1] for path in files(tmp_path)} == {"data", name_of(2, points[2])}


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
async def test_blocks_moved_and_not_yet_listed(remote: Faults, tmp_path: Path, moved: int) -> None:
    """Upstream writes the parent's table at the end: until it resumes, it cannot read the chain
    (vhd, weakness 7)."""
    points = chain_of("brotli")
    chain = place_chain(tmp_path, FOLDER, points)
    data = tmp_path / FOLDER / "data"
    for index, day in ((1, 2), (2, 3), (3, 3))[:moved]:
        source = data / f"2026010{day}T000000Z.vhd/blocks/0/{index}"
        source.rename(data / f"20260101T000000Z.vhd/blocks/0/{index}")
    state = MergeState(
        chain=tuple(name_of(number, point) for number, point in enumerate(points)),
        next_block=1,
        child_uuid=identity(3),
        parent_uuid=identity(1),
    )
    (tmp_path / state_path(chain[0])).write_bytes(state.encode())
    assert await tags(remote, chain[-1]) == model(points)
    await merge(remote, chain, state=state)
    assert await tags(remote, chain[-1]) == model(points)


@pytest.mark.parametrize("place", ["behind the end", "over another"])
async def test_a_table_that_speaks_of_a_block_that_did_not_get_there(
    remote: Faults, tmp_path: Path, place: str
) -> None:
    """Upstream writes a file's table entry before the data (vhd, weakness 9)."""
    points = chain_of("file")
    chain = place_chain(tmp_path, FOLDER, points)
    path = tmp_path / chain[0]
    raw = bytearray(path.read_bytes())[:-300]  # and the end footer is overwritten
    sector = len(raw) // 512 + 1 if place == "behind the end" else 5
    raw[1536 + 8 : 1536 + 12] = sector.to_bytes(4, "big")
    path.write_bytes(raw)
    state = MergeState(chain=tuple(name_of(n, each) for n, each in enumerate(points)))
    (tmp_path / state_path(chain[0])).write_bytes(state.encode())
    if place == "behind the end":
        assert await tags(remote, chain[-1]) == model(points)
        await merge(remote, chain, state=state)
        assert await tags(remote, chain[-1]) == model(points)
    else:  # which of the two is wrong cannot be told: nothing is overwritten
        with pytest.raises(Corrupt):
            await merge(remote, chain, state=state)


# -- reading meanwhile


@pytest.mark.parametrize("kind", KINDS)
async def test_a_chain_that_is_open_reads_the_same_while_it_is_merged(
    remote: Faults, tmp_path: Path, kind: str
) -> None:
    """A restore started while a merge runs fails upstream with ENOENT."""
    points = [*chain_of(kind), Point({0: 8}, kind)]
    chain = place_chain(tmp_path, FOLDER, points)
    async with open_chain(remote, chain[3]) as before:
        buffer = bytearray(vhd.STORED_BLOCK)

        async def check() -> None:
            for index, tag in model(points).items():
                await before.read_block(index, memoryview(buffer))
                assert buffer[512] == tag

        await merge_chain(remote, chain[:3], lock=Held(), owned=chain)
        await check()
        await merge(remote, chain[:3], phase=Phase.REST)
        await merge(remote, [chain[2], chain[3]])
        await check()


async def test_a_chain_is_opened_while_its_disks_are_renamed(
    remote: Faults, tmp_path: Path
) -> None:
    points = chain_of("brotli")
    chain = place_chain(tmp_path, FOLDER, points)
    gate = remote.add("read_files", Gate(), path="*/20260101T000000Z.vhd/chunk-filters.json")
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            assert await tags(remote, chain[-1]) == model(points)

        nursery.start_soon(read)
        await gate.reached.wait()
        await merge(remote.inner, chain)
        gate.release.set()


async def test_damage_is_not_taken_for_a_merge(remote: Faults, tmp_path: Path) -> None:
    chain = place_chain(tmp_path, FOLDER, chain_of("brotli"))
    (tmp_path / FOLDER / "data/20260103T000000Z.vhd/blocks/0/2").unlink()
    with pytest.raises(Corrupt):
        await tags(remote, chain[-1])


async def test_an_error_of_the_storage_ends_the_merge_and_keeps_the_chain(
    remote: Faults, tmp_path: Path
) -> None:
    full = Refused("no space", code="ENOSPC")
    for kind in KINDS:
        points = chain_of(kind)
        for verb in ("write_file", "rename_all", "edit.write_at", "edit.sync", "rename", "unlink"):
            folder = f"{kind}-{verb}"
            chain = place_chain(tmp_path, folder, points)
            faults = Faults(remote)
            faults.add(verb, Fail(full), path=f"{folder}/*")
            try:
                await merge(faults, chain)
            except Refused:
                assert await tags(remote, chain[-1]) == model(points), folder
