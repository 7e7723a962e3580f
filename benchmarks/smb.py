"""A file of 512 MiB over SMB to a Samba on this machine and back, in blocks of 2 MiB.

Beside it the loop that one would write with ``smbprotocol`` alone: one request of 1 MiB after
the other.  Both end with a flush; the server flushes for real.  Needs root, as Samba does.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import TYPE_CHECKING

import trio
from smbprotocol.connection import Connection
from smbprotocol.open import (  # type: ignore[import-untyped]
    CreateDisposition,
    CreateOptions,
    FilePipePrinterAccessMask,
    ImpersonationLevel,
    Open,
    ShareAccess,
)
from smbprotocol.session import Session
from smbprotocol.tree import TreeConnect

from benchmarks.lab import MIB, Figures, Options, main, scratch
from proxy.remotes import RemoteOptions, opened_remote
from tests.remotes.samba import PASSWORD, Samba, started

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 2 * MIB
REQUEST = MIB
PROTECTIONS = {"signed": "", "sealed": "seal"}


def measure(chosen: Options) -> list[Figures]:
    size = (16 if chosen.quick else 512) * MIB
    rows: list[Figures] = []
    with scratch(chosen) as folder, started(folder, strict_sync="yes") as server:
        for protection, options in PROTECTIONS.items():
            names = [f"SMB, {protection}: {what}" for what in ("write", "read")]
            found = [Figures(name, "MB/s") for name in names]
            for _ in range(chosen.rounds):
                floors = plain(server, size, sealed=protection == "sealed")
                ours = trio.run(remote, server, folder, size, options)
                for row, own, floor in zip(found, ours, floors, strict=True):
                    row.add(size / own / 1e6, size / floor / 1e6)
            rows += found
    return rows


async def remote(server: Samba, folder: Path, size: int, options: str) -> tuple[float, float]:
    """Seconds of our remote."""
    block = memoryview(bytearray(os.urandom(BLOCK)))
    spec = {"url": server.url(folder, options=options)}
    async with opened_remote(spec, options=RemoteOptions()) as opened:
        began = time.perf_counter()
        async with opened.create("ours") as file:
            for _ in range(size // BLOCK):
                await file.write(block)
            await file.commit()
        written = time.perf_counter() - began
        began = time.perf_counter()
        async with opened.open_read("ours") as read:
            while await read.read_into(block):
                pass
        return written, time.perf_counter() - began


def plain(server: Samba, size: int, *, sealed: bool) -> tuple[float, float]:
    """Seconds of the library's own calls."""
    data = os.urandom(REQUEST)
    connection = Connection(uuid.uuid4(), "127.0.0.1", server.port, require_signing=True)
    connection.connect()
    try:
        session = Session(connection, server.user, PASSWORD, require_encryption=sealed)
        session.connect()
        tree = TreeConnect(session, r"\\127.0.0.1\share")
        tree.connect()
        connection.echo(sid=session.session_id, credit_request=64)
        file = Open(tree, "plain")
        access = FilePipePrinterAccessMask
        file.create(
            ImpersonationLevel.Impersonation,
            access.GENERIC_READ | access.GENERIC_WRITE,
            0,
            ShareAccess.FILE_SHARE_READ,
            CreateDisposition.FILE_OVERWRITE_IF,
            CreateOptions.FILE_NON_DIRECTORY_FILE,
        )
        began = time.perf_counter()
        for offset in range(0, size, REQUEST):
            file.write(data, offset)
        file.flush()
        written = time.perf_counter() - began
        began = time.perf_counter()
        for offset in range(0, size, REQUEST):
            file.read(offset, REQUEST)
        took = time.perf_counter() - began
        file.close()
    finally:
        connection.disconnect()
    return written, took


if __name__ == "__main__":
    main(__doc__ or "", measure)
