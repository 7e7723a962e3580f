"""GET /export_raw_vdi and PUT /import_raw_vdi: one disk, in any of the formats.

Both answer 200 before they look at the disk.  What goes wrong after that stands as a second
HTTP answer in the body, and in the task.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from proxy.errors import Corrupt, XapiError
from proxy.runtime.threads import Work, in_thread
from proxy.simulator.exports import pump, release
from proxy.simulator.http import Gone, error_page, head
from proxy.simulator.images import FORMATS, Base, ImageFormat, Sending
from proxy.simulator.transfers import Inlet, Outlet, Refusal, Transfer, named_sr

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.simulator.disks import DiskContent
    from proxy.simulator.http import Head, Wire
    from proxy.simulator.pool import SimulatedPool

_VHD_EPOCH = 946_684_800
"""2000-01-01, from where a VHD counts the time of its parent's file."""


async def export_disk(pool: SimulatedPool, wire: Wire, request: Head, transfer: Transfer) -> None:
    """GET: a disk, or with ``base`` what differs from that one."""
    vdi = _disk(pool, request)
    if vdi is None:
        raise Refusal(500, detail="Failure: Missing vdi query parameter")
    name, chosen = _format(request)
    record = pool.store.get("VDI", vdi)
    await wire.send(
        head(
            200,
            headers={
                "content-type": chosen.content_type,
                "content-disposition": f'attachment; filename="{record["uuid"]}.{name}"',
                "task-id": transfer.task,
            },
            length=False,
        )
    )
    drives: list[str] = []
    outlet = Outlet(pool, wire, transfer)
    try:
        async with _told_in_body(wire):
            if chosen.largest is not None and record["virtual_size"] > chosen.largest:
                raise XapiError("VDI_TOO_LARGE", [vdi, str(chosen.largest)])
            drives.append(pool.disks.attach_to_dom0(vdi, task=transfer.task))
            sending = Sending(
                content=pool.disks.content(vdi).copy(),
                uuid=uuid.UUID(pool.store.new_uuid()),
                base=_base(pool, request, transfer.task, drives),
                damage=transfer.fault.damage if transfer.fault else None,
            )
            pieces, size = await in_thread(Work.DISK, chosen.send, sending)
        threaded = sending.content.file is not None
        await pump(pool, outlet, transfer, pieces, size or 1, "", threaded=threaded)
        await outlet.finish()
        pool.tasks.succeed(transfer.task)
        transfer.ended = "complete"
    finally:
        release(pool, drives)


def _base(pool: SimulatedPool, request: Head, task: str, drives: list[str]) -> Base | None:
    """The disk that ``base`` names, attached too; raises ``XapiError``."""
    identifier = request.query.get("base") or request.cookies.get("base")
    if not identifier:
        return None
    found = pool.store.find("VDI", identifier)
    vdi = identifier if found else pool.store.by_uuid("VDI", identifier)
    record = pool.store.get("VDI", vdi)
    drives.append(pool.disks.attach_to_dom0(vdi, task=task))
    sr = pool.store.get("SR", record["SR"])["uuid"]
    return Base(
        content=pool.disks.content(vdi).copy(),
        uuid=uuid.uuid5(uuid.NAMESPACE_OID, record["uuid"]),
        path=f"/var/run/sr-mount/{sr}/{record['uuid']}.vhd",
        timestamp=int(time.time()) - _VHD_EPOCH,
    )


async def import_disk(pool: SimulatedPool, wire: Wire, request: Head, transfer: Transfer) -> None:
    """PUT: write what comes over a disk, which keeps it also when the transfer fails."""
    vdi = _disk(pool, request)
    sr = named_sr(pool, request)
    if vdi is None and sr is None:
        raise Refusal(400, XapiError("VDI_MISSING"))
    name, chosen = _format(request)
    if "chunked" in request.query or "chunked" in request.cookies:
        raise _internal(404, f"Cannot handle chunked {name.upper()}")
    if "transfer-encoding" in request.headers:
        raise _internal(404, f"Cannot handle encoding: {request.headers['transfer-encoding']}")
    if "content-length" not in request.headers:
        raise _internal(400, "Not enough info supplied to import")
    length = int(request.headers["content-length"])
    if vdi is None:
        if name != "raw":
            raise _internal(
                400, f"Importing a {name.upper()} directly into an SR not yet supported"
            )
        fields = {"SR": sr, "virtual_size": length, "name_label": "Imported VDI"}
        vdi = str(pool.calls.perform("VDI.create", [fields]))
    headers = {"content-type": "application/octet-stream", "task-id": transfer.task}
    await wire.send(head(200, headers=headers, length=False))
    drives: list[str] = []
    inlet = Inlet(pool, wire, transfer)
    try:
        async with _told_in_body(wire):
            drives.append(pool.disks.attach_to_dom0(vdi, write=True, task=transfer.task))
            if length:  # the probe before an upload writes nothing
                pool.disks.unfinished.add(vdi)
            await _receive(wire, inlet, chosen, pool.disks.content(vdi), length)
        await inlet.finish()
        pool.disks.unfinished.discard(vdi)
    finally:
        pool.disks.written(vdi)
        release(pool, drives)
    pool.tasks.succeed(transfer.task, vdi)
    transfer.ended = "complete"


async def _receive(
    wire: Wire, inlet: Inlet, chosen: ImageFormat, content: DiskContent, length: int
) -> None:
    """Read the body into the disk; raises ``XapiError`` ``VDI_IO_ERROR``, as xapi for all."""
    left = length
    try:
        receiver = chosen.receive(content, length)
        while left > 0 and (data := (await wire.read())[:left]):
            left -= len(data)
            await inlet.take(len(data))
            receiver.feed(data)
        receiver.finish()
    except Corrupt as error:
        raise XapiError("VDI_IO_ERROR", ["Device I/O errors"]) from error


@asynccontextmanager
async def _told_in_body(wire: Wire) -> AsyncIterator[None]:
    """Write an error that comes after the answer as a second answer into the body."""
    try:
        yield
    except XapiError as error:
        page = error_page(f"{error.code}: [ {'; '.join(error.params)} ]")
        with contextlib.suppress(Gone):
            await wire.send(head(500, page) + page)
        raise


def _disk(pool: SimulatedPool, request: Head) -> str | None:
    """The disk of a request.  One that is unknown leaves the given task pending."""
    identifier = request.query.get("vdi") or request.cookies.get("vdi")
    if not identifier:
        return None
    if pool.store.find("VDI", identifier) is not None:
        return identifier
    try:
        return pool.store.by_uuid("VDI", identifier)
    except XapiError as error:
        raise Refusal(500, detail=error.message) from error


def _format(request: Head) -> tuple[str, ImageFormat]:
    given = request.query.get("format") or request.cookies.get("format") or "raw"
    found = FORMATS.get(given.lower())
    if found is None:
        raise _internal(404, f"Unknown format {given}")
    return given.lower(), found


def _internal(status: int, message: str) -> Refusal:
    return Refusal(status, XapiError("INTERNAL_ERROR", [message]))
