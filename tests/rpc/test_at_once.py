"""Small calls are answered by the task that read them: nobody may notice but by the time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import h11
import pytest
import trio

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from tests.rpc.conftest import Server

    Start = Callable[..., AbstractAsyncContextManager[Server]]

HEAD = b"POST /api/v1 HTTP/1.1\r\nHost: p\r\nCookie: authenticationToken=%s\r\n"


def request(method: str, *, token: bytes = b"a-token", more: bytes = b"", **params: Any) -> bytes:
    body = json.dumps({"id": method, "method": method, "params": params}).encode()
    return HEAD % token + b"Content-Length: %d\r\n%s\r\n%s" % (len(body), more, body)


async def exchange(server: Server, *pieces: bytes) -> bytes:
    """Send the pieces one by one, say that nothing follows, and read to the end."""
    got = b""
    stream = await server.raw()
    async with stream:
        stream.setsockopt(6, 1, 1)  # TCP_NODELAY
        for piece in pieces:
            await stream.send_all(piece)
            await trio.sleep(0.01)
        with trio.fail_after(5):
            while data := await stream.receive_some(65536):
                got += data
    return got


async def answer_to(server: Server, *pieces: bytes) -> bytes:
    """The same, but the client keeps the connection: the answer's own end counts."""
    got = b""
    stream = await server.raw()
    async with stream:
        stream.setsockopt(6, 1, 1)
        for piece in pieces:
            await stream.send_all(piece)
            await trio.sleep(0.01)
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method="POST", target="/", headers=[("Host", "p")]))
        reader.send(h11.EndOfMessage())
        with trio.fail_after(5):
            while True:
                event = reader.next_event()
                if event is h11.NEED_DATA:
                    data = bytes(await stream.receive_some(65536))
                    assert data
                    got += data
                    reader.receive_data(data)
                elif isinstance(event, h11.EndOfMessage):
                    return got


def undated(answer: bytes) -> bytes:
    return b"\r\n".join(line for line in answer.split(b"\r\n") if not line.startswith(b"date:"))


@pytest.mark.parametrize(
    "method",
    ["system.getServerVersion", "system.listMethods", "task.list", "no.such", "test.range"],
)
async def test_the_answer_does_not_depend_on_how_the_request_was_cut(
    server: Server, method: str
) -> None:
    """What comes in one piece is read by other code than what comes in several."""
    whole = request(method, stop=3)
    head = whole.index(b"\r\n\r\n") + 4
    expected = undated(await answer_to(server, whole))
    assert expected.startswith(b"HTTP/1.1 200 OK\r\n")
    for cut in (1, head - 2, head, head + 5, len(whole) - 1):
        assert undated(await answer_to(server, whole[:cut], whole[cut:])) == expected


async def test_quick_and_slow_calls_in_one_packet_are_answered_in_order(server: Server) -> None:
    quick, slow = "system.getServerVersion", "event.from"
    last = request(quick, more=b"Connection: close\r\n")
    calls = [request(quick), request(slow, timeout=0), request(quick), request(slow), last]
    got = await exchange(server, b"".join(calls))
    places = [got.index(b"HTTP/1.1")]
    while (at := got.find(b"HTTP/1.1", places[-1] + 1)) >= 0:
        places.append(at)
    answers = [
        json.loads(got[start:end].partition(b"\r\n\r\n")[2])["id"]
        for start, end in zip(places, [*places[1:], len(got)], strict=True)
        if b"chunked" not in got[start:end]
    ]
    assert answers == [quick, slow, quick, slow, quick]


async def test_a_wrong_token_is_refused(server: Server) -> None:
    whole = request("system.getServerVersion", token=b"other", more=b"Connection: close\r\n")
    assert (await exchange(server, whole)).startswith(b"HTTP/1.1 401")


async def test_a_body_beyond_the_limit_is_refused(start: Start, settings: Any) -> None:
    async with start(settings=settings(max_body_size=20)) as server:
        answer = await exchange(server, request("system.getServerVersion"))
    assert answer.startswith(b"HTTP/1.1 413")


async def test_records_without_end_stop_with_a_reader_that_stalls(
    start: Start, settings: Any
) -> None:
    async with start(settings=settings(send_timeout=0.3)) as server:
        stream = await server.raw()
        async with stream:
            await stream.send_all(request("test.range", stop=1e12))
            await trio.sleep(1.6)  # more than the watch's second; nothing is read meanwhile
            with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
                await drain(stream)


async def drain(stream: trio.SocketStream) -> None:
    while await stream.receive_some(65536):
        pass


async def test_a_reader_that_leaves_ends_the_records(server: Server) -> None:
    stream = await server.raw()
    async with stream:
        await stream.send_all(request("test.range", stop=1e12))
        await stream.receive_some(100)
    answer = await server.call("system.getServerVersion")
    assert answer.status == 200
