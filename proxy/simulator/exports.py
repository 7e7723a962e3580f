"""GET /export: a VM as XVA."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import trio
import zstandard

from proxy.errors import XapiError
from proxy.formats.xva import ArchivedDisk, archive
from proxy.runtime.threads import Work, in_thread
from proxy.simulator.disks import UNIT
from proxy.simulator.http import head
from proxy.simulator.transfers import Outlet, Refusal, Transfer
from proxy.simulator.vm_archive import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.simulator.http import Head, Wire
    from proxy.simulator.pool import SimulatedPool

_PROGRESS_SECONDS = 0.1
_BATCH = 4 * 1024 * 1024


async def export_vm(pool: SimulatedPool, wire: Wire, request: Head, transfer: Transfer) -> None:
    """GET /export: the XVA of a halted or suspended VM or snapshot."""
    vm = request.query.get("ref", "")
    if not vm and "uuid" in request.query:
        vm = _lookup(pool, "VM", request.query["uuid"])
    try:
        pool.vms.begin(vm, transfer.task, "export")
    except XapiError as error:
        raise Refusal(500, error) from error
    drives: list[str] = []
    try:
        ova_xml, disks = describe(pool, vm)
        drives = [pool.disks.attach_to_dom0(vdi, task=transfer.task) for vdi, _ in disks]
        sources = [
            ArchivedDisk(name, content.size, content.read, content.xxh64)
            for content, name in ((pool.disks.content(vdi), name) for vdi, name in disks)
        ]
        total = sum(source.size for source in sources) or 1
        await wire.send(
            head(
                200,
                headers={
                    "content-type": "application/octet-stream",
                    "content-disposition": 'attachment; filename="export.xva"',
                    "task-id": transfer.task,
                },
                length=False,
            )
        )
        outlet = Outlet(pool, wire, transfer)
        slow_source = any(pool.disks.contents[vdi].file is not None for vdi, _ in disks)
        await pump(
            pool,
            outlet,
            transfer,
            archive(ova_xml, sources),
            total,
            request.query.get("use_compression", ""),
            threaded=slow_source,
        )
        await outlet.finish()
        pool.tasks.succeed(transfer.task)
        transfer.ended = "complete"
    finally:
        release(pool, drives)
        pool.vms.end(vm, transfer.task)


def _lookup(pool: SimulatedPool, kind: str, identifier: str) -> str:
    try:
        return pool.store.by_uuid(kind, identifier)
    except XapiError as error:
        raise Refusal(500, error) from error


def release(pool: SimulatedPool, drives: list[str]) -> None:
    """Detach what a transfer attached to dom0, after the pool's ``dom0_lag``."""
    if pool.dom0_lag > 0:
        pool.spawn(_release_later, pool, drives)
        return
    for drive in drives:
        pool.disks.detach_from_dom0(drive)


async def _release_later(pool: SimulatedPool, drives: list[str]) -> None:
    await trio.sleep(pool.dom0_lag)
    for drive in drives:
        pool.disks.detach_from_dom0(drive)


async def pump(
    pool: SimulatedPool,
    outlet: Outlet,
    transfer: Transfer,
    pieces: Iterator[memoryview],
    total: int,
    compression: str,
    *,
    threaded: bool,
) -> None:
    """Send all pieces, compressed if asked, and move the task's progress on."""
    compressor = _compressor(compression)
    done = 0
    told = trio.current_time()
    while True:
        if compressor is not None:
            batch, read, more = await in_thread(Work.CPU, _compress, pieces, compressor)
        elif threaded:
            batch, read, more = await in_thread(Work.DISK, _collect, pieces)
        else:
            batch, read, more = _collect(pieces)
        await outlet.send_together(batch)
        if not more:
            return
        done += read
        if trio.current_time() - told > _PROGRESS_SECONDS:
            told = trio.current_time()
            pool.tasks.progress(transfer.task, min(0.99, done / max(total, UNIT)))


def _collect(pieces: Iterator[memoryview]) -> tuple[list[memoryview], int, bool]:
    batch: list[memoryview] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= _BATCH:
            return batch, size, True
    return batch, size, False


def _compressor(name: str) -> Any:
    if name in ("true", "gzip"):
        return zlib.compressobj(1, wbits=31)
    if name == "zstd":
        return zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj()
    return None


def _compress(pieces: Iterator[memoryview], compressor: Any) -> tuple[list[memoryview], int, bool]:
    batch, size, more = _collect(pieces)
    packed = [memoryview(compressor.compress(piece)) for piece in batch]
    if not more:
        packed.append(memoryview(compressor.flush()))
    return [piece for piece in packed if piece], size, more
