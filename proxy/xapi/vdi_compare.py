"""Whether a disk still holds what one of its snapshots holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from proxy.errors import ProxyError
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble
from proxy.xapi import vms
from proxy.xapi.cbt import changed_blocks
from proxy.xapi.vdi_export import ExportOptions, export_vdi

if TYPE_CHECKING:
    from proxy.xapi.client import Xapi

_RELEASE_SECONDS: Final = 120.0


async def is_unchanged(xapi: Xapi, vdi_ref: str, vdi: dict[str, Any], snapshot_ref: str) -> bool:
    """Whether nothing was written to a disk that nobody uses since its snapshot was taken.

    By changed block tracking or, without that, by the tables at the start of a differencing
    export.  What the host cannot tell counts as changed.  Raises ``XapiError`` and
    ``Unreachable`` when it does not even send the whole disk.
    """
    try:
        return not len(await changed_blocks(xapi, vdi_ref, snapshot_ref))
    except ProxyError:
        pass  # not tracked: the tables tell
    try:
        async with export_vdi(xapi, vdi_ref, vdi, snapshot_ref, ExportOptions()) as opened:
            return opened.disk.is_differencing and not len(opened.disk.blocks)
    finally:
        try:
            with undo_within("releasing the compared disks", _RELEASE_SECONDS):
                for ref in (vdi_ref, snapshot_ref):
                    await vms.disconnect_from_control_domain(xapi, ref)
        except ProxyError as error:
            tell_trouble("could not release a compared disk", error, vdi=vdi_ref)
