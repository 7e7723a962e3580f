"""A thousand clients that wait for events, woken by one change."""

from __future__ import annotations

import json
import select
import time
from typing import TYPE_CHECKING

from benchmarks.lab import Figures, Options, daemon, main, scratch

if TYPE_CHECKING:
    import socket

    from benchmarks.lab import Daemon

EVENT = "event.from"
_PATIENCE = 60.0


def measure(chosen: Options) -> list[Figures]:
    count = 50 if chosen.quick else 1000
    last = Figures(f"{count} waiters: change to the last answer", "s", goal="-")
    each = Figures(f"{count} waiters: memory of each", "KiB", goal="-")
    with scratch(chosen) as folder, daemon(folder) as proxy:
        wake(proxy)
        for _ in range(chosen.rounds):
            before = proxy.program.memory
            socks = wait_all(proxy, count)
            each.add((proxy.program.memory - before) / count / 1024)
            began = time.perf_counter()
            wake(proxy)
            last.add(answered(socks) - began)
            for sock in socks:
                sock.close()
            time.sleep(0.2)
    # what the first round took stays with the allocator: later ones need nothing new
    each.values = each.values[:1]
    return [last, each]


def wait_all(proxy: Daemon, count: int) -> list[socket.socket]:
    """Sockets with an ``event.from`` under way each."""
    token = proxy.call(EVENT, token="", timeout=0)["token"]
    request = proxy.request(EVENT, token=token, timeout=50)
    socks = []
    for _ in range(count):
        sock = proxy.connect()
        sock.sendall(request)
        socks.append(sock)
    time.sleep(1.0)
    return socks


def wake(proxy: Daemon) -> None:
    """Make a change: a run over no VMs is a task that begins and ends."""
    proxy.call(
        "backup.run",
        job={
            "id": "d3a0d3a0-0000-4000-8000-000000000001",
            "name": "nothing",
            "type": "backup",
            "mode": "full",
            "vms": {"id": {"__or": []}},
            "remotes": {"id": {"__or": []}},
            "settings": {"": {}},
        },
        schedule={"id": "schedule"},
        remotes={},
    )


def answered(socks: list[socket.socket]) -> float:
    """When the last of them had its whole answer."""
    waiting = {sock.fileno(): sock for sock in socks}
    received = dict.fromkeys(waiting, b"")
    poll = select.epoll()
    for number in waiting:
        poll.register(number, select.EPOLLIN)
    until = time.perf_counter() + _PATIENCE
    while waiting:
        if time.perf_counter() > until:
            raise RuntimeError(f"{len(waiting)} waiters were not woken")
        for number, _ in poll.poll(1):
            received[number] += waiting[number].recv(65536)
            body = received[number].partition(b"\r\n\r\n")[2]
            if body.rstrip().endswith(b"}"):
                if not json.loads(body)["result"]["events"]:
                    raise RuntimeError("a waiter was answered without an event")
                poll.unregister(number)
                del waiting[number]
    return time.perf_counter()


if __name__ == "__main__":
    main(__doc__, measure)
