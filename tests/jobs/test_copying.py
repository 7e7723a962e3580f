"""The fan-out: one reader, targets at their own pace, bounded memory, nothing lost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt, Refused, Unreachable
from proxy.jobs.copying import Check, Consumer, FanOut, NoConsumers
from proxy.jobs.rate_limit import RateLimit
from proxy.runtime.buffers import BufferPool
from proxy.runtime.threads import inline_threads

pytestmark = pytest.mark.virtual_clock

SIZE = 64


class AnyStream:
    """A validator that takes everything, or finds fault with a byte."""

    def __init__(self, bad: bytes = b"") -> None:
        self.bad = bad
        self.finished = False

    def feed(self, view: memoryview) -> None:
        if self.bad and self.bad in bytes(view):
            raise Corrupt("a bad byte")

    def finish(self) -> None:
        self.finished = True


@dataclass
class Bytes:
    """A source: ``content`` in pieces of ``piece`` bytes, ``pause`` seconds apart."""

    content: bytes
    piece: int = SIZE
    pause: float = 0.0
    breaks_at: int | None = None
    end: Exception | None = None
    peer_lossy: bool = False
    position: int = 0
    finished: bool = False

    async def read_into(self, view: memoryview, /) -> int:
        await trio.sleep(self.pause)
        if self.breaks_at is not None and self.position >= self.breaks_at:
            raise Unreachable("ECONNRESET: reset", code="ECONNRESET")
        data = self.content[self.position : self.position + min(self.piece, len(view))]
        view[: len(data)] = data
        self.position += len(data)
        return len(data)

    async def finish(self) -> None:
        if self.end is not None:
            raise self.end
        self.finished = True


@dataclass
class Target:
    """Takes what a consumer gives, ``pause`` seconds a buffer, and dies after ``dies`` bytes."""

    pause: float = 0.0
    dies: int | None = None
    got: bytearray = field(default_factory=bytearray)
    complete: bool = False
    error: Exception | None = None

    async def run(self, consumer: Consumer) -> None:
        try:
            while (buffer := await consumer.next()) is not None:
                with consumer.using(buffer) as view:
                    await trio.sleep(self.pause)
                    if self.dies is not None and len(self.got) >= self.dies:
                        raise Refused("ENOSPC", code="ENOSPC")
                    self.got += view
            self.complete = True
        except (Refused, Unreachable, Corrupt, NoConsumers) as error:
            self.error = error
        finally:
            consumer.leave()


async def copy(
    source: Bytes, *targets: Target, pool: BufferPool, bad: bytes = b"", rate: float = 0
) -> tuple[FanOut, Check, Exception | None]:
    check = Check(AnyStream(bad))
    fan_out = FanOut(source, pool, check, RateLimit(lambda: rate))
    error: Exception | None = None
    with inline_threads():
        async with trio.open_nursery() as nursery:
            for target in targets:
                nursery.start_soon(target.run, fan_out.target())
            try:
                await fan_out.run()
            except Exception as caught:  # noqa: BLE001  what it was is for the test to say
                error = caught
    await trio.testing.wait_all_tasks_blocked()
    assert pool.in_use == 0, "every buffer is back"
    return fan_out, check, error


@given(content=st.binary(max_size=2000), piece=st.integers(1, 100), count=st.integers(1, 4))
def test_every_target_gets_every_byte(content: bytes, piece: int, count: int) -> None:
    async def main() -> None:
        targets = [Target(pause=number * 0.1) for number in range(count)]
        _, check, error = await copy(Bytes(content, piece), *targets, pool=BufferPool(3, SIZE))
        assert error is None
        assert all(bytes(target.got) == content and target.complete for target in targets)
        assert check.digest() == hashlib.md5(content, usedforsecurity=False).digest()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_memory_is_the_pool_whatever_the_targets_do() -> None:
    pool = BufferPool(3, SIZE)
    slow, fast = Target(pause=1), Target()
    _, _, error = await copy(Bytes(bytes(50 * SIZE)), slow, fast, pool=pool)
    assert error is None
    assert pool._made == 3
    assert slow.complete
    assert fast.complete
    assert 48 <= trio.current_time() <= 52, "the slowest target sets the pace"


async def test_a_dying_target_does_not_hold_the_others() -> None:
    dying, living = Target(dies=2 * SIZE), Target()
    _, _, error = await copy(Bytes(b"x" * 20 * SIZE), dying, living, pool=BufferPool(2, SIZE))
    assert error is None
    assert living.complete
    assert dying.error is not None
    assert dying.error.args[0] == "ENOSPC"


async def test_without_targets_the_source_is_not_read_on() -> None:
    source = Bytes(b"x" * 100 * SIZE)
    _, _, error = await copy(source, Target(dies=0), pool=BufferPool(2, SIZE))
    assert isinstance(error, NoConsumers)
    assert source.position < 10 * SIZE
    assert not source.finished


async def test_a_broken_source_is_every_targets_error() -> None:
    targets = [Target(), Target(pause=0.5)]
    source = Bytes(b"x" * 20 * SIZE, breaks_at=5 * SIZE)
    _, _, error = await copy(source, *targets, pool=BufferPool(2, SIZE))
    assert isinstance(error, Unreachable)
    assert [target.error for target in targets] == [error, error]
    assert not any(target.complete for target in targets)


async def test_targets_see_the_end_only_when_the_source_confirmed_it() -> None:
    """Upstream weakness (pool contract, 5): the end of a failed export passes for success."""
    target = Target()
    late = Unreachable("the export's task failed")
    _, _, error = await copy(Bytes(b"x" * SIZE, end=late), target, pool=BufferPool(2, SIZE))
    assert error is late
    assert target.error is late
    assert not target.complete
    assert bytes(target.got) == b"x" * SIZE


async def test_a_corrupt_stream_completes_nowhere() -> None:
    target = Target()
    content = b"x" * 10 * SIZE + b"BAD" + b"x" * 10 * SIZE
    _, _, error = await copy(Bytes(content), target, pool=BufferPool(2, SIZE), bad=b"BAD")
    assert isinstance(error, Corrupt)
    assert isinstance(target.error, Corrupt)


async def test_a_cancel_gives_every_buffer_back() -> None:
    pool = BufferPool(3, SIZE)
    with trio.move_on_after(2.5) as scope:
        await copy(Bytes(bytes(100 * SIZE), pause=0.1), Target(pause=1), pool=pool)
    assert scope.cancelled_caught
    assert pool.in_use == 0


@pytest.mark.parametrize(
    ("source", "target", "rate", "expected"),
    [
        (Bytes(bytes(40 * SIZE), pause=1), Target(), 0, "source"),
        (Bytes(bytes(40 * SIZE), pause=1, peer_lossy=True), Target(), 0, "network"),
        (Bytes(bytes(40 * SIZE)), Target(pause=1), 0, "target"),
        (Bytes(bytes(400 * SIZE)), Target(), SIZE, "maxExportRate"),
    ],
    ids=["source", "network", "target", "rate"],
)
async def test_the_slowest_stage_is_named(
    source: Bytes, target: Target, rate: float, expected: str
) -> None:
    fan_out, _, error = await copy(source, target, pool=BufferPool(3, SIZE), rate=rate)
    assert error is None
    assert fan_out.bottleneck() == expected


async def test_the_check_is_named_when_it_is_the_slowest() -> None:
    fan_out, _, _ = await copy(Bytes(bytes(10 * SIZE)), Target(), pool=BufferPool(2, SIZE))
    fan_out._waited_buffer, fan_out._checker.busy = 10.0, 9.0
    assert fan_out.bottleneck() == "CPU"
