"""The content of disks: what changed, against a plain comparison of the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from proxy.simulator import SimulatedPool
from proxy.simulator.disks import BLOCK, UNIT, DiskContent, ImageFile, Stamped


def whole(content: DiskContent) -> bytes:
    return b"".join(content.chunks())


def compared(content: DiskContent, base: DiskContent) -> list[int]:
    """The blocks that differ, byte by byte."""
    ours = whole(content)
    theirs = whole(base).ljust(len(ours), b"\0")
    starts = range(0, len(ours), BLOCK)
    return [at // BLOCK for at in starts if ours[at : at + BLOCK] != theirs[at : at + BLOCK]]


SIZE = 2 * BLOCK + 512 * 3


@pytest.mark.parametrize("size", [SIZE, SIZE - 512 * 3, 512, UNIT + 512])
@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
def test_a_snapshot_differs_where_it_was_written(size: int, fill: float) -> None:
    disk = DiskContent(size, kind="random", seed=3, fill=fill)
    base = disk.copy()
    assert disk.changed_units(base) == []
    disk.write(size - 512, b"x" * 512)
    assert disk.changed_units(base) == [(size - 1) // BLOCK]
    assert base.changed_units(disk) == [(size - 1) // BLOCK]


def test_the_same_bytes_written_again_are_no_change() -> None:
    disk = DiskContent(SIZE, kind="text", seed=3, fill=0.5)
    base = disk.copy()
    disk.write(0, whole(base))
    assert disk.changed_units(base) == []


def test_zeros_over_data_are_a_change_and_over_zeros_none() -> None:
    disk = DiskContent(2 * BLOCK)
    disk.write(0, b"x")
    base = disk.copy()
    disk.write(0, bytes(2 * BLOCK))
    assert disk.changed_units(base) == [0]


def test_disks_of_another_origin_are_compared_by_content() -> None:
    disk = DiskContent(SIZE, kind="random", seed=3)
    restored = DiskContent(SIZE)
    restored.write(0, whole(disk))
    assert disk.changed_units(restored) == []
    restored.write(BLOCK, b"!")
    assert disk.changed_units(restored) == [1]
    assert DiskContent(SIZE, kind="random", seed=4).changed_units(disk) == [0, 1, 2]


def test_a_file_under_a_disk(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"a" * BLOCK + bytes(BLOCK) + b"c" * 512)
    disk = DiskContent(2 * BLOCK + 512, file=ImageFile(image))
    base = disk.copy()
    disk.write(BLOCK + 5, b"new")
    assert disk.changed_units(base) == [1]
    assert disk.changed_units(DiskContent(disk.size)) == [0, 1, 2]


@pytest.mark.parametrize("size", [512, UNIT - 512, UNIT, UNIT + 512, BLOCK, BLOCK + 512])
def test_what_grew_is_zeros(size: int) -> None:
    disk = DiskContent(size, kind="random", seed=5)
    base = disk.copy()
    disk.resize(3 * BLOCK)
    assert whole(disk) == whole(base).ljust(3 * BLOCK, b"\0")
    assert disk.changed_units(base) == []
    disk.write(2 * BLOCK, b"x")
    assert disk.changed_units(base) == [2]


@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(0, SIZE - 600), st.binary(max_size=600)), max_size=8
    ),
    growth=st.sampled_from([0, 512, UNIT, BLOCK]),
)
def test_changes_are_those_of_a_plain_comparison(
    steps: list[tuple[bool, int, bytes]], growth: int
) -> None:
    disk = DiskContent(SIZE, kind="random", seed=1, fill=0.4)
    base = disk.copy()
    for on_base, offset, data in steps:
        (base if on_base else disk).write(offset, data)
    disk.resize(SIZE + growth)
    assert disk.changed_units(base) == compared(disk, base)


def test_a_mutation_is_new_and_takes_no_memory() -> None:
    disk = DiskContent(SIZE, kind="text", seed=1)
    base = disk.copy()
    disk.mutate([0, 2], seed=9)
    assert disk.changed_units(base) == compared(disk, base) == [0, 2]
    assert isinstance(disk.stored(0), Stamped)
    same = base.copy()
    same.mutate([2, 0], seed=9)
    assert whole(same) == whole(disk)
    same.mutate([0, 2], seed=10)
    assert same.changed_units(disk) == [0, 2]
    with pytest.raises(IndexError):
        disk.mutate([1, 3], seed=11)
    assert disk.changed_units(base) == [0, 2]


def test_a_pool_mutates_a_share() -> None:
    pool = SimulatedPool.small(disk_size=20 * BLOCK)
    vdi = pool.vms.disks(pool.vm("vm1"))[0]
    [uuid] = pool.disk_uuids(pool.vm("vm1"))
    base = pool.disks.contents[vdi].copy()
    changed = pool.mutate(uuid, 0.25)
    assert len(changed) == 5
    assert pool.disks.contents[vdi].changed_units(base) == changed
    assert pool.mutate(uuid, 0.25) != changed
    assert pool.mutate(uuid, 0.0, seed=3) == pool.mutate(uuid, 0.0, seed=3)
    assert pool.mutate(uuid, 1.0) == list(range(20))
    assert pool.mutate(uuid, []) == []


@pytest.mark.virtual_clock
async def test_guests_that_write() -> None:
    from proxy.simulator.standalone import churn

    pool = SimulatedPool.small(disk_size=10 * BLOCK)
    pool.add_generated(range(2, 3), disks=1, size=10 * BLOCK, running=False)
    live, halted = (pool.disk_uuids(pool.vm(name))[0] for name in ("vm1", "vm2"))
    before = pool.digest(live), pool.digest(halted)
    with trio.move_on_after(59):
        await churn(pool, 0.2, 60)
    assert (pool.digest(live), pool.digest(halted)) == before
    with trio.move_on_after(61):
        await churn(pool, 0.2, 60)
    assert pool.digest(live) != before[0]
    assert pool.digest(halted) == before[1]


@pytest.mark.virtual_clock
async def test_no_guest_writes_into_what_dom0_has_attached() -> None:
    """A snapshot that is being exported hangs on dom0, which is a VM that runs."""
    from proxy.simulator.standalone import churn

    pool = SimulatedPool.small(disk_size=2 * BLOCK)
    snapshot = pool.do("VDI.snapshot", pool.vms.disks(pool.vm("vm1"))[0], {})
    uuid = pool.store.get("VDI", snapshot)["uuid"]
    before = pool.digest(uuid)
    pool.disks.attach_to_dom0(snapshot)
    with trio.move_on_after(11):
        await churn(pool, 1.0, 10)
    assert pool.digest(uuid) == before
