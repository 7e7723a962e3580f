"""Kinds of answers, on a virtual clock with a recorded ``send``; then over real sockets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import structlog.testing
import trio

from proxy.errors import NotFound
from proxy.rpc import Binary, Context, Registry
from proxy.rpc.envelope import Identity
from proxy.rpc.methods.system import Nothing
from proxy.rpc.replies import Reply, StreamBroken, answer_now, answer_when_ready

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from proxy.config import ApiConfig
    from tests.rpc.conftest import Server

    Start = Callable[..., AbstractAsyncContextManager[Server]]

IDENTITY = Identity({"id": 0})
HEADER = '{"id":0,"jsonrpc":"2.0","result":{"$responseType":"ndjson"}}\n'


class Wire:
    """What went out, with the time of each piece."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.times: list[float] = []

    async def send(self, event: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.events.append(event)
        self.times.append(trio.current_time())

    @property
    def text(self) -> str:
        return b"".join(event.get("body", b"") for event in self.events).decode()

    @property
    def complete(self) -> bool:
        return self.events[-1].get("more_body") is not True and "body" in self.events[-1]

    def lines(self) -> list[Any]:
        """As XO's client reads them: no empty line, no blanks at the end."""
        parts = self.text.split("\n")
        if parts[-1] == "":
            parts.pop()
        return [json.loads(part) for part in parts]

    def gaps(self, begun: float) -> list[float]:
        return [b - a for a, b in zip([begun, *self.times], self.times, strict=False)]


async def answered(call: Callable[[], Awaitable[Any]], interval: float = 10) -> Wire:
    wire = Wire()
    await answer_when_ready(Reply(wire.send, list), IDENTITY, interval, call)
    return wire


async def listing(*waits: float, end: float = 0, live: bool = False) -> AsyncIterator[Any]:
    for index, wait in enumerate(waits):
        await trio.sleep(wait)
        yield b'{"n":%d}' % index if live else {"n": index}
    await trio.sleep(end)


@pytest.mark.virtual_clock
async def test_a_slow_value_is_kept_alive_by_spaces_in_front() -> None:
    async def slow() -> str:
        await trio.sleep(35)
        return "done"

    wire = await answered(slow)
    assert wire.text == '   {"id":0,"jsonrpc":"2.0","result":"done"}'
    assert wire.complete
    assert max(wire.gaps(wire.times[0] - 10)) <= 10


@pytest.mark.virtual_clock
async def test_a_quick_value_has_a_length_and_no_space() -> None:
    async def quick() -> dict[str, int]:
        return {"size": 1}

    wire = await answered(quick)
    assert wire.text == '{"id":0,"jsonrpc":"2.0","result":{"size":1}}'
    assert (b"content-length", b"44") in wire.events[0]["headers"]


@pytest.mark.virtual_clock
async def test_a_slow_failure_is_still_an_error() -> None:
    async def slow() -> None:
        await trio.sleep(25)
        raise NotFound("gone")

    wire = await answered(slow)
    assert wire.text.startswith("  {")
    assert wire.lines()[0]["error"]["message"] == "gone"


@pytest.mark.virtual_clock
async def test_an_interval_of_0_sends_no_spaces() -> None:
    async def slow() -> bool:
        await trio.sleep(100)
        return True

    assert (await answered(slow, interval=0)).text[0] == "{"


@pytest.mark.virtual_clock
@pytest.mark.parametrize("live", [True, False])
async def test_a_silent_stream_never_breaks_its_client(live: bool) -> None:
    """Before the header, between records, and behind the last one."""

    async def stream() -> AsyncIterator[Any]:
        await trio.sleep(25)
        return listing(25, 0, 65, end=0 if live else 35, live=live)

    wire = await answered(stream)
    header, *records = wire.lines()
    assert header == json.loads(HEADER)
    assert records == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert wire.text.count(" ") >= 10
    assert "\n\n" not in wire.text
    assert wire.text.endswith("\n")
    assert max(wire.gaps(wire.times[0])) <= 10


@pytest.mark.virtual_clock
async def test_live_records_go_out_at_once_with_their_line_end() -> None:
    async def stream() -> AsyncIterator[Any]:
        return listing(1, 5, live=True)

    wire = await answered(stream)
    bodies = [event["body"] for event in wire.events if event.get("body")]
    assert bodies == [HEADER.encode() + b'{"n":0}\n', b'{"n":1}\n']
    assert wire.times[2] - wire.times[1] == pytest.approx(5)


@pytest.mark.virtual_clock
async def test_an_empty_stream_is_its_header() -> None:
    async def nothing() -> list[int]:
        return []

    assert (await answered(nothing)).text == HEADER


@pytest.mark.virtual_clock
async def test_a_failure_before_the_first_record_is_a_plain_error() -> None:
    async def records() -> AsyncIterator[int]:
        await trio.sleep(15)
        raise NotFound("no remote")
        yield 1  # type: ignore[unreachable]

    async def stream() -> AsyncIterator[int]:
        return records()

    wire = await answered(stream)
    assert wire.text.startswith(" {")
    assert not wire.text.endswith("\n")
    assert wire.lines()[0]["error"]["data"]["code"] == "ENOENT"


async def failing() -> AsyncIterator[Any]:
    yield {"n": 0}
    raise NotFound("the remote went away")


@pytest.mark.virtual_clock
async def test_a_failure_after_the_header_never_ends_cleanly() -> None:
    """Weakness 2: upstream ends with a clean EOF, which XO takes for success."""
    wire = Wire()

    async def stream() -> AsyncIterator[Any]:
        return failing()

    with structlog.testing.capture_logs() as logs, pytest.raises(ExceptionGroup) as caught:
        await answer_when_ready(Reply(wire.send, list), IDENTITY, 10, stream)
    assert caught.group_contains(StreamBroken)
    assert not wire.complete
    assert "the remote went away" in logs[0]["error"]


@pytest.mark.virtual_clock
async def test_the_iterator_is_closed_when_the_client_leaves() -> None:
    """Weakness 3: upstream leaves it and its timer for ever."""
    closed: list[str] = []

    async def records() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await trio.sleep(1)
        finally:
            await trio.lowlevel.cancel_shielded_checkpoint()
            closed.append("yes")

    async def stream() -> AsyncIterator[int]:
        return records()

    wire = Wire()
    with trio.move_on_after(30):
        await answer_when_ready(Reply(wire.send, list), IDENTITY, 10, stream)
    assert closed == ["yes"]


@pytest.mark.virtual_clock
async def test_bytes_get_no_space() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"a"
        await trio.sleep(100)
        yield b"b"

    async def file() -> Binary:
        return Binary(chunks())

    wire = await answered(file)
    assert wire.text == "ab"
    assert wire.events[0]["headers"] == [(b"content-type", b"application/octet-stream")]


async def test_a_plain_generator_is_sent_in_batches() -> None:
    def records() -> Iterator[str]:
        for _ in range(100):
            yield "x" * 10_000

    wire = Wire()
    await answer_now(Reply(wire.send, list), IDENTITY, records)
    assert len(wire.lines()) == 101
    assert max(len(event.get("body", b"")) for event in wire.events) < 80_000
    assert wire.complete


# -- over real sockets ---------------------------------------------------------------------

methods = Registry()
events: list[str] = []


@methods.method("try.failing", Nothing)
async def try_failing(_context: Context, _: Nothing) -> AsyncIterator[Any]:
    return failing()


@methods.method("try.bug", Nothing)
def bug(_context: Context, _: Nothing) -> None:
    raise ZeroDivisionError("the divisor")


@methods.method("try.change", Nothing, changes=True)
async def change(_context: Context, _: Nothing) -> bool:
    events.append("begun")
    await trio.sleep(0.2)
    events.append("done")
    return True


@methods.method("try.bytes", Nothing, result={"x-stream": "binary"})
async def slow_bytes(_context: Context, _: Nothing) -> Binary:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"ab"

    await trio.sleep(0.3)
    return Binary(chunks())


@methods.method("try.look", Nothing)
async def look(_context: Context, _: Nothing) -> bool:
    events.append("begun")
    try:
        await trio.sleep(30)
    except trio.Cancelled:
        events.append("cancelled")
        raise
    return True


@methods.method("try.flood", Nothing)
async def flood(_context: Context, _: Nothing) -> AsyncIterator[bytes]:
    async def records() -> AsyncIterator[bytes]:
        while True:
            yield b'"' + b"x" * 60_000 + b'"'

    return records()


@methods.method("try.refused", Nothing, changes=True)
async def refused(_context: Context, _: Nothing) -> bool:
    raise NotFound("nothing there")


async def test_bytes_that_are_long_in_coming_are_not_spoilt_by_spaces(
    start: Start, settings: Callable[..., ApiConfig]
) -> None:
    async with start(methods, settings=settings(keep_alive_interval=0.1)) as server:
        answer = await server.call("try.bytes")
        slow = await server.call("try.change")
    assert answer.body == b"ab"
    assert slow.body.startswith(b" ")
    assert slow.body.lstrip(b" ").startswith(b"{")


async def test_a_broken_stream_breaks_its_connection(start: Start) -> None:
    async with start(methods) as server:
        with structlog.testing.capture_logs():
            answer = await server.call("try.failing")
    assert not answer.whole


async def test_a_bug_is_a_reference_not_a_stack(start: Start) -> None:
    async with start(methods) as server:
        with structlog.testing.capture_logs():
            answer = await server.call("try.bug")
    assert answer.status == 200
    assert answer.json()["error"]["data"]["code"] == "EINTERNAL"
    assert b"divisor" not in answer.body


async def leave_in(server: Server, method: str) -> None:
    events.clear()
    async with server.client() as client:
        await client.send(json.dumps({"id": 0, "method": method}).encode())
        await trio.sleep(0.1)
    await trio.sleep(0.4)


async def test_a_change_goes_on_when_its_client_vanishes(start: Start) -> None:
    async with start(methods) as server:
        await leave_in(server, "try.change")
    assert events == ["begun", "done"]


async def test_a_look_ends_when_its_client_vanishes(start: Start) -> None:
    async with start(methods) as server:
        await leave_in(server, "try.look")
    assert events == ["begun", "cancelled"]


async def test_a_change_answers_its_client(start: Start) -> None:
    async with start(methods) as server:
        assert (await server.call("try.change")).json()["result"] is True
        error = (await server.call("try.refused")).json()["error"]
    assert error["message"] == "nothing there"


async def short_life(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()


async def test_a_change_while_the_daemon_stops_is_told_so(start: Start) -> None:
    async with start(methods) as server:
        async with trio.open_nursery() as outside, server.client() as client:
            dying = await outside.start(short_life)
            server.services.nursery = dying
            await client.send(b'{"id":0,"method":"try.change"}')
            await trio.sleep(0.05)
            dying.cancel_scope.cancel()
            answer = await client.receive()
        assert answer.json()["error"]["data"]["code"] == "ESHUTDOWN"
        again = await server.call("try.change")
        assert again.json()["error"]["data"]["code"] == "ESHUTDOWN"


async def test_nothing_is_compressed(server: Server) -> None:
    """Weakness 1: compression held live records back until the end."""
    async with server.client() as client:
        answer = await client.post(
            b'{"id":0,"method":"system.describe"}',
            headers={"Accept-Encoding": "br, gzip, deflate"},
        )
    assert "content-encoding" not in answer.headers
    assert answer.json()["result"]["openrpc"]


async def test_a_client_that_leaves_is_no_error_of_ours(start: Start) -> None:
    with structlog.testing.capture_logs() as logs:
        async with start(methods) as server:
            async with server.client() as client:
                await client.send(b'{"id":0,"method":"try.flood"}')
                await client.head()
            await leave_in(server, "try.look")
    assert [entry for entry in logs if entry["log_level"] == "error"] == []
