"""What the writers of a disk hear of its end."""

from __future__ import annotations

import trio

from proxy.disks.disk import block_pool
from proxy.errors import Corrupt, Unreachable
from proxy.formats.checksums import BlockSums, block_digest
from proxy.jobs.disk_copying import DiskConsumer, DiskFanOut
from tests.disks.directories import MemoryDisk

BLOCK = 2 * 1024 * 1024
DISK = {0: 1, 2: 2}


async def drain(consumer: DiskConsumer, seen: list[object]) -> None:
    try:
        while (block := await consumer.next()) is not None:
            seen.append(block.index)
            block.release()
        seen.append("end")
    except Exception as error:  # noqa: BLE001  what the writer hears
        seen.append(error)


async def heard(fan_out: DiskFanOut) -> tuple[list[object], Exception | None]:
    """What two writers hear, the same, and what the reading raises."""
    seen: list[list[object]] = [[], []]
    raised: Exception | None = None
    async with trio.open_nursery() as nursery:
        for each in seen:
            nursery.start_soon(drain, fan_out.consumer(), each)
        try:
            await fan_out.run(block_pool(4))
        except Exception as error:  # noqa: BLE001  looked at by the caller
            raised = error
    assert seen[0] == seen[1]
    return seen[0], raised


async def test_the_end_comes_behind_the_confirmation() -> None:
    asked: list[BlockSums | None] = []

    async def confirm(sums: BlockSums | None) -> None:
        await trio.lowlevel.checkpoint()
        asked.append(sums)

    fan_out = DiskFanOut(MemoryDisk(DISK, 3), 4, None, confirm)
    assert await heard(fan_out) == ([0, 2, "end"], None)
    (sums,) = asked
    assert sums is not None
    assert {index: sums.get(index) for index in range(3)} == {
        0: block_digest(memoryview(bytes([1]) * BLOCK)),
        1: None,
        2: block_digest(memoryview(bytes([2]) * BLOCK)),
    }


async def test_what_is_not_confirmed_has_no_end() -> None:
    error = Corrupt("not what was stored")

    async def confirm(_: BlockSums | None) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    assert await heard(DiskFanOut(MemoryDisk(DISK, 3), 4, None, confirm)) == ([0, 2, error], error)


async def test_a_reading_that_another_disks_failure_ends_says_so() -> None:
    reason = Unreachable("the other disk")
    seen: list[object] = []

    async def confirm(_: BlockSums | None) -> None:
        await trio.sleep_forever()

    fan_out = DiskFanOut(MemoryDisk(DISK, 3), 4, None, confirm)
    consumer = fan_out.consumer()
    fan_out.when_cancelled = reason
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain, consumer, seen)
        with trio.move_on_after(0.2):
            await fan_out.run(block_pool(4))
    assert seen == [0, 2, reason]
