"""Changed block tracking: which blocks of a disk changed since a snapshot of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from proxy.disks.disk import Blocks
from proxy.errors import Corrupt, Refused, XapiError
from proxy.formats.cbt import changed_flags
from proxy.xapi.vms import call_unless_gone, when_free

if TYPE_CHECKING:
    from proxy.xapi.client import Xapi


async def changed_blocks(xapi: Xapi, vdi_ref: str, base_ref: str) -> Blocks:
    """The blocks of ``vdi_ref`` that changed since its snapshot ``base_ref``.

    The base may have lost its data (:func:`destroy_data`).  Raises ``Refused``
    (``CBT_DISABLED``) when the disk is not tracked, ``XapiError`` when the host cannot tell
    (the caller then reads the blocks from an export), ``Corrupt`` for an answer that is none.
    """
    try:
        tracked = await xapi.call("VDI.get_cbt_enabled", vdi_ref)
    except XapiError as error:
        # A host that does not know the field does not track either.
        raise Refused("changed blocks are not tracked", code="CBT_DISABLED") from error
    if not tracked:
        raise Refused("changed blocks of the disk are not tracked", code="CBT_DISABLED")
    size = int(await xapi.call("VDI.get_virtual_size", vdi_ref))
    bitmap = await xapi.call_async("VDI.list_changed_blocks", base_ref, vdi_ref)
    if not isinstance(bitmap, str):
        raise Corrupt("VDI.list_changed_blocks answered no bitmap", data={"what": "type"})
    return Blocks(changed_flags(bitmap, size))


async def enable_cbt(xapi: Xapi, vdi_ref: str) -> None:
    """Track the changes of a live disk from now on; nothing happens if they are.

    Snapshots tell changes when their disk was tracked as they were taken.  Raises
    ``XapiError``: the disk, its storage or the licence does not allow it.
    """
    await xapi.call_async("VDI.enable_cbt", vdi_ref)


async def destroy_data(xapi: Xapi, vdi_ref: str) -> None:
    """Delete the data of a tracked snapshot; it can still be the base of a difference.

    The snapshot's VM must be destroyed before: a disk with any drive is in use.  ``VDI_IN_USE``
    is then mostly a control domain that has not let go yet: it is disconnected, and the call
    tried again for 50 s.  One without data, or gone, is fine.  Raises ``XapiError``
    (``VDI_NO_CBT_METADATA``, …).  On cancel the data may be there or not.
    """
    await when_free(xapi, [vdi_ref], partial(call_unless_gone, xapi, "VDI.data_destroy", vdi_ref))
