"""Backups to an object store, beside plain parallel PUTs of objects of the same sizes.

The store is a program of its own that throws the bytes away.  The floor sends prepared bodies from
threads over kept connections, without hashes or signatures.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import trio

from benchmarks.incremental import SHARE, backed_up, change, changing_pool
from benchmarks.lab import (
    MIB,
    PIECE,
    Figures,
    Options,
    Program,
    after_head,
    daemon,
    job,
    main,
    run,
    scratch,
    settle,
    started,
)
from proxy.remotes import RemoteOptions, opened_remote

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AT_ONCE = 4
"""Blocks that a backup stores at once."""


@contextlib.contextmanager
def sink(folder: Path) -> Iterator[tuple[Program, int]]:
    with started(folder, "-m", "benchmarks.object_sink") as (program, line):
        yield program, int(line)


def spec_of(port: int, folder: str = "backups") -> dict[str, str]:
    url = f"s3+http://key:secretsecret@127.0.0.1:{port}/bucket/{folder}"
    return {"id": "bench", "name": "bench", "url": url}


def measure(chosen: Options) -> list[Figures]:
    size = (32 if chosen.quick else 1024) * MIB
    alone = Figures("objects of 2 MiB through the S3 remote, 4 at a time", "MB/s")
    read = Figures("an object of 128 KiB read through the S3 remote", "ms")
    key = Figures("key backup to S3: transfer", "MB/s")
    delta = Figures("delta of 25 % to S3: transfer", "MB/s")
    full = Figures("full backup to S3: transfer", "MB/s")
    peak = Figures("backups to S3: daemon's peak RSS", "MiB", goal="≤ 128 MiB of parts + 200")
    with (
        scratch(chosen) as folder,
        sink(folder) as (_, port),
        changing_pool(folder, size=size) as pool,
        daemon(folder) as proxy,
    ):
        spec = spec_of(port)
        backed_up(proxy, pool, spec)  # the first one opens connections and loads code
        for number in range(chosen.rounds):
            floor = plain_puts(port, size)
            alone.add(through_remote(port, size), floor)
            read.add(reads(port))
            settle()
            done = backed_up(proxy, pool, spec, fullInterval=1)
            key.add(size / done.spans("transfer")[0] / 1e6, floor)
            change(pool, SHARE)
            floor = plain_puts(port, round(size * SHARE))
            done = backed_up(proxy, pool, spec, exportRetention=9)
            delta.add(size * SHARE / done.spans("transfer")[0] / 1e6, floor)
            floor = plain_puts(port, size)
            # a place of its own: nobody can look at archives that were not kept
            place = spec_of(port, f"full{number}")
            done = run(proxy, "backup.run", job(pool, place, pool.vms, retention=9))
            full.add(size / done.spans("transfer")[0] / 1e6, floor)
        peak.add(proxy.program.peak_memory / MIB)
    return [alone, read, key, delta, full, peak]


def plain_puts(port: int, size: int) -> float:
    """MB/s."""
    body = os.urandom(PIECE)
    count = max(size // PIECE, AT_ONCE)

    def send(worker: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            for number in range(worker, count, AT_ONCE):
                head = f"PUT /bucket/floor/{number} HTTP/1.1\r\nHost: x\r\nContent-Length: {PIECE}"
                sock.sendall(head.encode() + b"\r\n\r\n")
                sock.sendall(body)
                after_head(sock)

    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as workers:
        list(workers.map(send, range(AT_ONCE)))
    return count * PIECE / (time.perf_counter() - began) / 1e6


def through_remote(port: int, size: int) -> float:
    """MB/s of the same through our remote alone, without pool and disks."""
    body = os.urandom(PIECE)
    count = max(size // PIECE, AT_ONCE)

    async def work() -> float:
        async with (
            opened_remote(spec_of(port), options=RemoteOptions()) as remote,
            remote.batch() as batch,
        ):
            left = iter(range(count))

            async def send() -> None:
                for number in left:
                    await batch.write(f"remote/{number}", body)

            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(send)
            await batch.commit()
            return count * PIECE / (time.perf_counter() - began) / 1e6

    return trio.run(work)


def reads(port: int) -> float:
    """Milliseconds."""
    rounds = 50

    async def work() -> float:
        async with opened_remote(spec_of(port), options=RemoteOptions()) as remote:
            await remote.write_file("read", bytes(128 * 1024))
            began = time.perf_counter()
            for _ in range(rounds):
                await remote.read_file("read")
            return 1000 * (time.perf_counter() - began) / rounds

    result: Any = trio.run(work)
    return float(result)


if __name__ == "__main__":
    main(__doc__ or "", measure)
