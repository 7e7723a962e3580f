"""One stream, read once, given to several consumers at the pace of the slowest.

Memory is the buffers of one pool, whatever the number of consumers.  The time that each
stage waits for the others is measured on the way: it names what limits the speed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import trio

from proxy.errors import Corrupt, ProxyError, XapiError
from proxy.runtime.buffers import Buffer
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from proxy.jobs.rate_limit import RateLimit
    from proxy.runtime.buffers import BufferPool


_TURN = 32 * 1024 * 1024
"""Bytes that the check may take in one go: about 50 ms."""


_EXPLAIN_SECONDS = 10.0


class Source(Protocol):
    """Where the bytes come from: an export, or a file of a remote."""

    async def read_into(self, view: memoryview, /) -> int: ...

    async def finish(self) -> None:
        """After the last byte: raise unless the source says that it was all and all well."""
        ...

    @property
    def peer_lossy(self) -> bool: ...


class NoConsumers(ProxyError):
    """Nobody needs the rest of the stream."""

    def __init__(self) -> None:
        super().__init__("no more consumers for this stream")


class Validator(Protocol):
    """Knows a format: fed every byte, then asked whether that was a whole file."""

    def feed(self, view: memoryview, /) -> None: ...

    def finish(self) -> None:
        """Raise ``Corrupt`` unless it was."""
        ...


class Check:
    """Looks at every byte of a stream: is it whole, and what is its MD5?

    ``feed`` and ``finish`` are CPU work; ``digest`` is valid after ``finish``.  Without ``md5``
    there is none: it takes most of the time, and not every target stores it.
    """

    def __init__(self, validator: Validator, *, md5: bool = True) -> None:
        self._validator = validator
        self._md5 = hashlib.md5(usedforsecurity=False) if md5 else None

    def feed(self, view: memoryview) -> None:
        self._validator.feed(view)
        if self._md5 is not None:
            self._md5.update(view)

    def finish(self) -> None:
        self._validator.finish()

    def digest(self) -> bytes:
        assert self._md5 is not None, "nobody said that it would be asked for"
        return self._md5.digest()


class Held(Protocol):
    """Something that is shared by several consumers and given back by each."""

    def release(self) -> None: ...


T = TypeVar("T", bound=Held)


class Lane(Generic[T]):
    """One consumer's end of a fan-out; used by one task."""

    def __init__(self, capacity: int) -> None:
        self._send, self._receive = trio.open_memory_channel[T](capacity)
        self._failure: Exception | None = None

    async def next(self) -> T | None:
        """What comes next, to be released by the consumer; ``None`` at the confirmed end.

        Raises the source's error where it broke.
        """
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if self._failure is not None:
                raise self._failure from None
            return None

    def give(self, item: T) -> bool:
        """Whether the consumer is still there; never blocks: the channel holds the whole pool."""
        try:
            self._send.send_nowait(item)
        except trio.BrokenResourceError:
            return False
        return True

    def end(self, failure: Exception | None) -> None:
        """Nothing more comes; with ``failure`` it was not all."""
        self._failure = failure
        self._send.close()

    def leave(self) -> None:
        """Want nothing more; what is queued goes back to the pool."""
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            while True:
                self._receive.receive_nowait().release()
        self._receive.close()


class Consumer(Lane[Buffer]):
    """One end of a :class:`FanOut`."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.busy = 0.0
        """Seconds spent with buffers in hand."""

    @contextlib.contextmanager
    def using(self, buffer: Buffer) -> Iterator[memoryview]:
        """The buffer's bytes for the block; then it goes back to the pool."""
        began = trio.current_time()
        try:
            yield buffer.view
        finally:
            buffer.release()
            self.busy += trio.current_time() - began

    async def pour(
        self, write: Callable[[memoryview], Awaitable[None]], moved: Callable[[], None]
    ) -> None:
        """Hand every buffer to ``write``, and call ``moved`` after each, until the confirmed end.

        Raises the source's error where it broke.
        """
        while (buffer := await self.next()) is not None:
            with self.using(buffer) as view:
                await write(view)
            moved()


class _Checking:
    """The consumer that feeds a :class:`Check`, which is what limits the speed of a fast pool.

    MD5 is serial by nature and takes a core.  So the thread goes on with the next buffer
    without a detour over the event loop, and gives each back as soon as it is done.
    """

    def __init__(self, check: Check) -> None:
        self.busy = 0.0
        self._check = check
        self._queue: deque[Buffer] = deque()
        self._news = trio.Event()
        self._ended = False

    def give(self, buffer: Buffer) -> None:
        self._queue.append(buffer)
        self._news.set()

    def end(self) -> None:
        """No more buffers: :meth:`run` returns when it has seen the last."""
        self._ended = True
        self._news.set()

    async def run(self) -> None:
        """Check until the end.  Raises ``Corrupt``.  A cancel is felt within a turn."""
        token = trio.lowlevel.current_trio_token()
        try:
            while self._queue or not self._ended:
                await self._news.wait()
                self._news = trio.Event()
                while self._queue:
                    began = trio.current_time()
                    await in_thread(Work.CPU, self._turn, token)
                    self.busy += trio.current_time() - began
        finally:
            while self._queue:
                self._queue.popleft().release()

    def _turn(self, token: trio.lowlevel.TrioToken) -> None:
        """In the thread: what is queued, but not so much that other transfers wait long."""
        left = _TURN
        while left > 0 and self._queue:
            buffer = self._queue.popleft()
            left -= buffer.length
            try:
                self._check.feed(buffer.view)
            finally:
                token.run_sync_soon(buffer.release)


class FanOut:
    """Reads a source once for all its targets, and checks it on the way.

    ``pool`` bounds the memory.  Targets are made before :meth:`run`.
    """

    def __init__(
        self, source: Source, pool: BufferPool, check: Check, rate: RateLimit | None = None
    ) -> None:
        self._source = source
        self._pool = pool
        self._check = check
        self._rate = rate
        self._targets: list[Consumer] = []
        self._checker = _Checking(check)
        self._waited_source = 0.0
        self._waited_buffer = 0.0
        self._waited_rate = 0.0

    def target(self) -> Consumer:
        made = Consumer(self._pool.count)
        self._targets.append(made)
        return made

    async def feed(
        self, receivers: Iterable[Callable[[Consumer], Awaitable[None]]]
    ) -> Exception | None:
        """:meth:`run` beside ``receivers``, each with a target of its own, until all have ended.

        Receivers keep their failures to themselves; the others go on.  Returns what was wrong
        with the source, for who has things to close before it is raised.  That nobody was left to
        take the stream is nothing: the receivers know why.
        """
        broken: Exception | None = None

        async def receive(
            receiver: Callable[[Consumer], Awaitable[None]], consumer: Consumer
        ) -> None:
            try:
                await receiver(consumer)
            finally:
                consumer.leave()

        async with trio.open_nursery() as nursery:
            for receiver in receivers:
                nursery.start_soon(receive, receiver, self.target())
            try:
                await self.run()
            except NoConsumers:
                pass
            except Exception as error:  # noqa: BLE001  returned when the receivers have ended
                broken = error
        return broken

    async def run(self) -> None:
        """Read to the end, finish the check, and ask the source whether it was all.

        Raises the first error of these, or :class:`NoConsumers`.  Targets see their end only
        after all three: what they make permanent is complete and checked.
        """
        failure: Exception | None = NoConsumers()
        try:
            await self._read_and_check()
            await self._source.finish()
            failure = None
        except Corrupt as error:
            failure = reason = await self._explained(error)
            raise reason from (None if reason is error else error)
        except Exception as error:
            failure = error
            raise
        finally:
            for target in self._targets:
                target.end(failure)

    async def _explained(self, error: Corrupt) -> ProxyError:
        """Why a stream that was read to its end is not whole, if its source tells soon."""
        with trio.move_on_after(_EXPLAIN_SECONDS):
            try:
                await self._source.finish()
            except XapiError as reason:
                return reason
            except ProxyError:
                pass
        return error

    async def _read_and_check(self) -> None:
        failures: list[Exception] = []

        async def checking() -> None:
            try:
                await self._checker.run()
            except ProxyError as error:
                failures.append(error)
                nursery.cancel_scope.cancel("the stream is corrupt")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(checking)
            try:
                await self._pump()
            except Exception as error:  # noqa: BLE001  raised below, outside of the nursery's group
                failures.append(error)
                nursery.cancel_scope.cancel("the source broke")
            self._checker.end()
        if failures:
            raise failures[0]
        await in_thread(Work.CPU, self._check.finish)

    async def _pump(self) -> None:
        while True:
            began = trio.current_time()
            buffer = await self._pool.acquire()
            got_buffer = trio.current_time()
            try:
                buffer.length = await self._fill(buffer.memory)
            except BaseException:
                buffer.release()
                raise
            self._waited_buffer += got_buffer - began
            self._waited_source += trio.current_time() - got_buffer
            length = buffer.length
            if length == 0:
                buffer.release()
                return
            self._distribute(buffer)
            if self._rate is not None:
                self._waited_rate += await self._rate.spend(length)

    async def _fill(self, memory: memoryview) -> int:
        filled = 0
        while filled < len(memory):
            count = await self._source.read_into(memory[filled:])
            if count == 0:
                break
            filled += count
        return filled

    def _distribute(self, buffer: Buffer) -> None:
        # ours goes last: nobody frees it while it is given out
        buffer.share(len(self._targets) + 2)
        self._checker.give(buffer)
        for target in list(self._targets):
            if not target.give(buffer):
                buffer.release()
                self._targets.remove(target)
        buffer.release()
        if not self._targets:
            raise NoConsumers

    def bottleneck(self) -> str:
        """The stage that the others wait for: source, network, CPU, target, maxExportRate."""
        waits = {
            "source": self._waited_source,
            "downstream": self._waited_buffer,
            "maxExportRate": self._waited_rate,
        }
        slowest = max(waits, key=lambda stage: waits[stage])
        if slowest == "source":
            return "network" if self._source.peer_lossy else "source"
        if slowest == "downstream":
            busiest = max((target.busy for target in self._targets), default=0.0)
            return "CPU" if self._checker.busy > busiest else "target"
        return slowest
