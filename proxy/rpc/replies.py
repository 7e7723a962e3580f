"""The three kinds of answer: one JSON value, records a line each, raw bytes.

What a method returns decides.  An iterator, an asynchronous iterator, a list or a tuple is a
stream of records (NDJSON, yet ``application/json``, as XO expects); :class:`Binary` is bytes;
all else is one value.  Nothing is compressed: a compressor would hold live records back.

XO gives up a call after 60 s without a byte, and breaks on an empty line or on blanks after
the last record.  So while nothing else is sent a space goes out every ``interval`` seconds,
always where JSON allows white space in front of or behind a value, never a line break.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import structlog
import trio

from proxy.rpc.envelope import encode, failure, stream_header, success
from proxy.runtime.deadlines import undo_within
from proxy.runtime.secrets import scrub_text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from proxy.rpc.envelope import Identity

Headers: TypeAlias = "list[tuple[bytes, bytes]]"
Send: TypeAlias = "Callable[[Any], Awaitable[None]]"

_BATCH = 64 * 1024
_JSON = (b"content-type", b"application/json")
_CLOSING = 10.0
"""Seconds for the cleanup of an iterator whose client left."""

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Binary:
    """Bytes as they are.  A failure after the first one can only break the connection.

    The method says ``"x-stream": "binary"`` in its result's schema: no spaces are sent then.
    """

    chunks: AsyncIterator[bytes]
    content_type: str = "application/octet-stream"


class StreamBroken(Exception):
    """The answer cannot be completed: the server must break the connection.

    A clean end would read as success to the client.
    """


class ClientGone(OSError):
    """The client has closed its side, or was cut off: raised by ``send``."""


class Reply:
    """One HTTP answer in the making.  Safe for one writer and the keep-alive beside it."""

    def __init__(self, send: Send, headers: Callable[[], Headers]) -> None:
        self._send = send
        self._headers = headers
        self._lock = trio.Lock()
        self._started = False
        self._finished = False
        self._silent_since = 0.0
        self._keeps_alive = True

    async def _hold(self) -> None:
        # a free lock is taken without a pass through the scheduler
        if self._lock.locked():
            await self._lock.acquire()
        else:
            self._lock.acquire_nowait()

    async def begin(self, kind: tuple[bytes, bytes], *more: tuple[bytes, bytes]) -> None:
        headers = [kind, *more, *self._headers()]
        self._started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes, kind: tuple[bytes, bytes] = _JSON) -> None:
        """Send ``data`` now; returns when the kernel has taken it."""
        await self._hold()
        try:
            if not self._started:
                await self.begin(kind)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._silent_since = trio.current_time()
        finally:
            self._lock.release()

    async def finish(self, data: bytes = b"") -> None:
        """Send the last bytes; with ``Content-Length`` when they are the first, too."""
        await self._hold()
        try:
            self._finished = True
            if not self._started:
                await self.begin(_JSON, (b"content-length", b"%d" % len(data)))
            await self._send({"type": "http.response.body", "body": data})
        finally:
            self._lock.release()

    async def begin_binary(self, kind: bytes) -> None:
        """No keep-alive from here on: every byte counts."""
        await self._hold()
        try:
            self._keeps_alive = False
            if self._started:
                raise StreamBroken("a space has gone out as JSON before the bytes were ready")
            await self.begin((b"content-type", kind))
        finally:
            self._lock.release()

    async def keep_alive(self, interval: float) -> None:
        """Send a space whenever ``interval`` seconds went by in silence.  Runs until cancelled."""
        self._silent_since = trio.current_time()
        while True:
            await trio.sleep_until(self._silent_since + interval)
            if trio.current_time() < self._silent_since + interval:
                continue
            # a cancel may only come between two spaces, never within the bytes of one: the
            # one who cancels has passed through the lock in finish()
            await self._hold()
            try:
                if self._finished or not self._keeps_alive:
                    return
                if not self._started:
                    await self.begin(_JSON)
                await self._send({"type": "http.response.body", "body": b" ", "more_body": True})
                self._silent_since = trio.current_time()
            finally:
                self._lock.release()


def is_stream(result: object) -> bool:
    return isinstance(result, list | tuple | Iterator | AsyncIterable)


async def answer_now(reply: Reply, identity: Identity, call: Callable[[], Any]) -> None:
    """Answer with what a plain function returns."""
    try:
        result = call()
        records = iter(cast("Iterable[Any]", result)) if is_stream(result) else None
        if records is None:
            body = success(identity, result)
        else:
            body = stream_header(identity) + _batch(records)
    except Exception as error:  # noqa: BLE001  the client is told
        await reply.finish(failure(identity, error))
        return
    if records is not None:
        await _send_batches(reply, body, records)
    else:
        await reply.finish(body)


async def _send_batches(reply: Reply, first: bytes, records: Iterator[Any]) -> None:
    batch = first
    while len(batch) >= _BATCH:
        await reply.write(batch)
        try:
            batch = _batch(records)
        except Exception as error:
            raise _broken(error) from error
    await reply.finish(batch)


def _batch(records: Iterator[Any]) -> bytes:
    """The next records, at least ``_BATCH`` bytes of them unless they end."""
    batch = bytearray()
    for record in records:
        batch += encode(record) + b"\n"
        if len(batch) >= _BATCH:
            break
    return bytes(batch)


async def answer_when_ready(
    reply: Reply, identity: Identity, interval: float, call: Callable[[], Awaitable[Any]]
) -> None:
    """Answer with what ``call`` returns, in silence sending spaces (0: none)."""
    async with trio.open_nursery() as nursery:
        if interval > 0:
            nursery.start_soon(reply.keep_alive, interval)
        await _answer(reply, identity, call)
        nursery.cancel_scope.cancel()


async def _answer(reply: Reply, identity: Identity, call: Callable[[], Awaitable[Any]]) -> None:
    try:
        result = await call()
        body = b"" if is_stream(result) or isinstance(result, Binary) else None
        if body is None:
            body = success(identity, result)
    except Exception as error:  # noqa: BLE001  the client is told
        await reply.finish(failure(identity, error))
        return
    if isinstance(result, Binary):
        await _send_binary(reply, identity, result)
    elif isinstance(result, AsyncIterable):
        records = aiter(result)  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
        await _send_records(reply, identity, records)  # pyright: ignore[reportUnknownArgumentType]
    elif is_stream(result):
        await _send_records(reply, identity, _one_by_one(iter(result)))
    else:
        await reply.finish(body)


async def _one_by_one(records: Iterator[Any]) -> AsyncIterator[Any]:
    for record in records:
        yield record


async def _send_records(reply: Reply, identity: Identity, records: AsyncIterator[Any]) -> None:
    """Header line, then each record when it comes.

    Until the first record is there, a failure is an error answer like any other.  ``bytes``
    are records that are encoded already and live: their line ends at once.  The line of any
    other record ends with the next one or with the stream, so that spaces sent meanwhile
    never stand behind the last line.
    """
    async with _closing(records):
        try:
            record = await anext(records, _END)
            line = stream_header(identity) + _line(record) if record is not _END else b""
        except Exception as error:  # noqa: BLE001  the client is told
            await reply.finish(failure(identity, error))
            return
        if record is _END:
            await reply.finish(stream_header(identity))
            return
        try:
            while record is not _END:
                live = isinstance(record, bytes)
                await reply.write(line + b"\n" if live else line)
                record = await anext(records, _END)
                line = (b"" if live else b"\n") + (_line(record) if record is not _END else b"")
        except ClientGone:
            raise
        except Exception as error:
            raise _broken(error) from error
        await reply.finish(line)


_END = object()


def _line(record: object) -> bytes:
    return record.rstrip(b"\n") if isinstance(record, bytes) else encode(record)


async def _send_binary(reply: Reply, identity: Identity, result: Binary) -> None:
    async with _closing(result.chunks):
        try:
            chunk = await anext(result.chunks, b"")
        except Exception as error:  # noqa: BLE001  the client is told
            await reply.finish(failure(identity, error))
            return
        await reply.begin_binary(result.content_type.encode())
        try:
            if chunk:
                await _write_pieces(reply, chunk)
            async for chunk in result.chunks:
                await _write_pieces(reply, chunk)
        except ClientGone:
            raise
        except Exception as error:
            raise _broken(error) from error
        await reply.finish()


async def _write_pieces(reply: Reply, chunk: bytes) -> None:
    """In pieces, so that a slow but living client is told from a stalled one."""
    view = memoryview(chunk)
    for start in range(0, len(view), _BATCH):
        await reply.write(bytes(view[start : start + _BATCH]))


@contextlib.asynccontextmanager
async def _closing(records: AsyncIterator[Any]) -> AsyncIterator[None]:
    """Run the iterator's cleanup at the end, also when the client left."""
    try:
        yield
    finally:
        close = getattr(records, "aclose", None)
        if close is not None:
            with undo_within("close the records of an answer", _CLOSING):
                await close()


def _broken(error: Exception) -> StreamBroken:
    if isinstance(error, StreamBroken):
        return error
    logger.error("answer broken off", error=scrub_text(f"{type(error).__name__}: {error}"))
    return StreamBroken("the answer's source failed")
