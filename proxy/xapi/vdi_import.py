"""Writing the content of a disk into a VDI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.disks.qcow2_stream import qcow2_length, send_qcow2
from proxy.disks.vhd_stream import send_vhd, vhd_length
from proxy.formats.vhd import MAX_VIRTUAL_SIZE
from proxy.runtime.deadlines import undo_within
from proxy.xapi.transfer import upload

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from proxy.disks.disk import Disk
    from proxy.runtime.buffers import BufferPool
    from proxy.xapi.client import Xapi

RECEIVING: Final = "[Importing] "
"""In front of the name of a disk whose content is on its way."""
_RENAME_SECONDS: Final = 30.0


async def import_vdi(
    xapi: Xapi,
    vdi_ref: str,
    disk: Disk,
    pool: BufferPool,
    *,
    uuid: UUID,
    progress: Callable[[int], None],
) -> None:
    """Send the blocks of ``disk`` into a VDI that is at least as large, and see them arrive.

    Blocks that the disk lacks keep what the VDI holds.  As VHD, above its largest size as
    qcow2.  ``progress`` hears of the bytes of each piece that was sent.  Raises the host's
    error; after an error or a cancel the VDI holds anything and has its own name again.
    """
    vdi = await xapi.record("VDI", vdi_ref)
    sr = await xapi.record("SR", vdi["SR"])
    label = str(vdi["name_label"])
    as_qcow2 = disk.virtual_size > MAX_VIRTUAL_SIZE
    length = qcow2_length(disk) if as_qcow2 else vhd_length(disk)
    query = {"vdi": vdi_ref, "format": "qcow2" if as_qcow2 else "vhd"}
    name = f"Importing content into VDI {RECEIVING}{label} on SR {sr['name_label']}"
    await xapi.call("VDI.set_name_label", vdi_ref, f"{RECEIVING}{label}")
    try:
        async with upload(xapi, "/import_raw_vdi/", query, length=length, name=name) as body:

            async def sink(view: memoryview) -> None:
                await body.write(view)
                progress(len(view))

            if as_qcow2:
                await send_qcow2(disk, pool, sink)
            else:
                await send_vhd(disk, pool, sink, uuid=uuid, timestamp=0)
            await body.finish()
    finally:
        with undo_within("VDI: its own name", _RENAME_SECONDS):
            await xapi.call("VDI.set_name_label", vdi_ref, label)
