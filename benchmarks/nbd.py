"""1 GiB over NBD from nbdkit into reused blocks, beside ``nbdcopy`` from it to nowhere.

nbdkit serves zeros from memory and is told to nobody as sparse, so that both clients receive
every byte.  Both use the same connections and requests of 2 MiB.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import trio

from benchmarks.lab import MIB, Figures, Options, main, scratch
from proxy.disks.disk import Blocks, block_count, block_pool
from proxy.xapi.nbd_client import DEPTH, NbdDisk, connect_nbd
from proxy.xapi.nbd_dial import NbdInfo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONNECTIONS = 2


def measure(chosen: Options) -> list[Figures]:
    size = (64 if chosen.quick else 1024) * MIB
    goals = {"NBD": "≥ 70 % of nbdcopy", "NBD over TLS": "≥ 70 % of nbdcopy"}
    rows = {name: Figures(name, "MB/s", goal=goal) for name, goal in goals.items()}
    with scratch(chosen) as folder:
        certify(folder)
        for name, row in rows.items():
            secure = "TLS" in name
            with nbdkit(folder, size, secure=secure) as port:
                for _ in range(chosen.rounds):
                    floor = copied(folder, port, secure=secure)
                    certificate = (folder / "server-cert.pem").read_text() if secure else ""
                    ours = trio.run(read, port, size, certificate)
                    row.add(size / ours / 1e6, size / floor / 1e6)
    return list(rows.values())


def certify(folder: Path) -> None:
    """A certificate where GnuTLS' programs look for it."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(folder / "server-key.pem"), "-out", str(folder / "server-cert.pem")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    shutil.copy(folder / "server-cert.pem", folder / "ca-cert.pem")


@contextlib.contextmanager
def nbdkit(folder: Path, size: int, *, secure: bool) -> Iterator[int]:
    tls = ["--tls=require", f"--tls-certificates={folder}"] if secure else ["--tls=off"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    ready = folder / "nbdkit.pid"
    command = [
        "nbdkit",
        "--foreground",
        "--exit-with-parent",
        f"--port={port}",
        f"--pidfile={ready}",
    ]
    with subprocess.Popen([*command, *tls, "memory", str(size)]) as server:
        try:
            until = time.monotonic() + 10
            while not ready.exists():
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("nbdkit does not start")
                time.sleep(0.01)
            yield port
        finally:
            server.kill()
            ready.unlink(missing_ok=True)


def copied(folder: Path, port: int, *, secure: bool) -> float:
    """Seconds of nbdcopy."""
    uri = f"nbd://127.0.0.1:{port}"
    if secure:
        uri = f"nbds://127.0.0.1:{port}?tls-certificates={folder}"
    options = ["--no-extents", f"--connections={CONNECTIONS}", f"--request-size={2 * MIB}"]
    began = time.perf_counter()
    subprocess.run(["nbdcopy", *options, uri, "null:"], check=True)
    return time.perf_counter() - began


async def read(port: int, size: int, certificate: str) -> float:
    """Seconds of our client, all blocks in order."""
    began = time.perf_counter()
    place = NbdInfo("127.0.0.1", port, "", certificate)
    async with connect_nbd([place], connections=CONNECTIONS) as export:
        blocks = Blocks.everything(block_count(size))
        disk = NbdDisk(export, blocks, is_differencing=False)
        left = len(blocks)
        async with disk.read(block_pool(CONNECTIONS * DEPTH)) as reader:
            while (block := await reader.next()) is not None:
                block.buffer.release()
                left -= 1
    if left or export.size != size:
        raise RuntimeError(f"{left} blocks are missing")
    return time.perf_counter() - began


if __name__ == "__main__":
    main(__doc__, measure)
