"""Small calls a second, beside a server that does nothing but HTTP.

The floor is h11 on Trio, the least that a Trio server with a correct HTTP parser can do: it
reads each request whole and answers bytes made beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import select
import socket
import statistics
import time
from typing import TYPE_CHECKING

import h11
import trio

from benchmarks.lab import Figures, Options, daemon, main, scratch, started

if TYPE_CHECKING:
    from collections.abc import Sequence

METHODS = ("system.listMethods", "system.getServerVersion")
UPSTREAM = {
    ("system.listMethods", 1): 1684,
    ("system.getServerVersion", 1): 2340,
    ("system.listMethods", 32): 3612,
    ("system.getServerVersion", 32): 7280,
}


def measure(chosen: Options) -> list[Figures]:
    seconds = 0.2 if chosen.quick else 2.0
    rows: list[Figures] = []
    with scratch(chosen) as folder, daemon(folder) as proxy:
        for method in METHODS:
            request = proxy.request(method)
            size = len(one_answer(proxy.port, request))
            command = ("-m", "benchmarks.calls", "--floor", str(size))
            with started(folder, *command) as (_, line):
                floor_port = int(line)
                for connections in (1, 32):
                    row = Figures(
                        f"{method}, {connections} connection(s)",
                        "calls/s",
                        goal=f"≥ {UPSTREAM[method, connections]}",
                    )
                    for _ in range(chosen.rounds):
                        before = rate(floor_port, request, connections, seconds)
                        ours = rate(proxy.port, request, connections, seconds)
                        after = rate(floor_port, request, connections, seconds)
                        row.add(ours, statistics.mean((before, after)))
                    rows.append(row)
    return rows


def one_answer(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(request)
        answer = b""
        while not complete(answer):
            answer += sock.recv(65536)
    return answer


def complete(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    name = b"content-length: "
    start = head.lower().index(name) + len(name)
    return len(body) >= int(head[start:].split(b"\r\n", 1)[0])


def rate(port: int, request: bytes, connections: int, seconds: float) -> float:
    """Calls a second, from a process of its own that only moves bytes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (port, request, connections, seconds))


def _load(port: int, request: bytes, connections: int, seconds: float) -> float:
    size = len(one_answer(port, request))
    socks = {}
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        socks[sock.fileno()] = sock
    left = dict.fromkeys(socks, size)
    poll = select.epoll()
    for number in socks:
        poll.register(number, select.EPOLLIN)
    done = 0
    for sock in socks.values():
        sock.sendall(request)
    began = time.perf_counter()
    until = began + seconds
    while time.perf_counter() < until:
        for number, _ in poll.poll():
            received = len(socks[number].recv(65536))
            if not received:
                raise RuntimeError("the server closed a connection")
            left[number] -= received
            if left[number] <= 0:  # every answer is as long as the first
                left[number] = size
                done += 1
                socks[number].sendall(request)
    return done / (time.perf_counter() - began)


# -- the floor ----------------------------------------------------------------------------------


async def serve_floor(size: int) -> None:
    """Answer ``size`` bytes to every request, for ever; prints the port."""

    async def handle(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # the client left
            await answer(stream)

    async def answer(stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await stream.receive_some(65536)
                if not data:
                    return
                connection.receive_data(bytes(data))
            elif isinstance(event, h11.EndOfMessage):
                headers = [(b"content-type", b"application/json"), (b"content-length", length)]
                head = connection.send(h11.Response(status_code=200, headers=headers)) or b""
                data = connection.send(h11.Data(data=body)) or b""
                connection.send(h11.EndOfMessage())
                await stream.send_all(head + data)
                connection.start_next_cycle()

    head = len(b"HTTP/1.1 200 \r\ncontent-type: application/json\r\ncontent-length: 000\r\n\r\n")
    body = b"x" * max(1, size - head)
    length = str(len(body)).encode()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listeners[0].socket.getsockname()[1], flush=True)
    await trio.serve_listeners(handle, listeners)


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--floor", type=int)
    known, _ = parser.parse_known_args(arguments)
    if known.floor is None:
        main(__doc__ or "", measure)
    else:
        trio.run(serve_floor, known.floor)


if __name__ == "__main__":
    _main()
