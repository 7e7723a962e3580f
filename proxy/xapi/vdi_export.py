"""The content of a VDI as a :class:`~proxy.disks.disk.Disk`, by the best way that works.

With NBD: the changed blocks from CBT or, where that fails, from the tables at the start of an
export stream; the data from the NBD server.  Without: the stream itself.  Every step down is
told with its reason; none is silent.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from proxy.disks.qcow2_stream import open_qcow2_stream
from proxy.disks.vhd_stream import open_vhd_stream
from proxy.errors import ProxyError, Refused
from proxy.formats.vhd import MAX_VIRTUAL_SIZE
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble
from proxy.xapi import vms
from proxy.xapi.cbt import changed_blocks
from proxy.xapi.nbd_client import NbdDisk, nbd_candidates, open_nbd
from proxy.xapi.transfer import download

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.disks.disk import Blocks, Disk
    from proxy.xapi import Xapi

Way = Literal["nbd+cbt", "nbd", "stream"]

_UNDO_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class StepDown:
    """A way that did not work, and why."""

    way: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class VdiExport:
    """An open VDI.  ``disk.is_differencing`` tells whether a delta was to be had."""

    disk: Disk
    way: Way
    steps_down: list[StepDown] = field(default_factory=list[StepDown])


@dataclass(frozen=True, slots=True)
class ExportOptions:
    prefer_nbd: bool = False
    nbd_connections: int = 1


@contextlib.asynccontextmanager
async def export_vdi(
    xapi: Xapi, vdi_ref: str, vdi: dict[str, Any], base_ref: str | None, options: ExportOptions
) -> AsyncIterator[VdiExport]:
    """Open the VDI's content, as the difference to ``base_ref`` where one is given.

    A difference that cannot be had becomes the whole content.  Raises what the last way
    raises: ``XapiError``, ``Unreachable``, ``Corrupt``.  On leaving nothing of ours holds the
    disk: connections are closed, and after a failure or a cancel the control domain has let
    go of it, shielded and bounded.
    """
    ladder = _Ladder(xapi, vdi_ref, vdi, options)
    try:
        async with contextlib.AsyncExitStack() as stack:
            yield await ladder.open(stack, base_ref)
    except BaseException:
        await _let_go(xapi, vdi_ref)
        raise


async def _let_go(xapi: Xapi, vdi_ref: str) -> None:
    try:
        with undo_within("disconnecting a disk from the control domain", _UNDO_SECONDS):
            await vms.disconnect_from_control_domain(xapi, vdi_ref)
    except ProxyError as error:
        tell_trouble("could not disconnect a disk from the control domain", error, vdi=vdi_ref)


class _Ladder:
    def __init__(
        self, xapi: Xapi, vdi_ref: str, vdi: dict[str, Any], options: ExportOptions
    ) -> None:
        self._xapi = xapi
        self._ref = vdi_ref
        self._vdi = vdi
        self._options = options
        self._steps: list[StepDown] = []

    async def open(self, stack: contextlib.AsyncExitStack, base_ref: str | None) -> VdiExport:
        if self._options.prefer_nbd:
            opened = await self._with_nbd(stack, base_ref)
            if opened is not None:
                return opened
        if base_ref is not None:
            try:
                disk = await stack.enter_async_context(self._stream(base_ref))
                return VdiExport(disk, "stream", self._steps)
            except ProxyError as error:
                self._down("delta", error)
        disk = await stack.enter_async_context(self._stream(None))
        return VdiExport(disk, "stream", self._steps)

    async def _with_nbd(
        self, stack: contextlib.AsyncExitStack, base_ref: str | None
    ) -> VdiExport | None:
        try:
            await nbd_candidates(self._xapi, self._ref)
        except ProxyError as error:
            self._down("nbd", error)
            return None
        way: Way = "nbd"
        blocks: Blocks | None = None
        differencing = False
        if base_ref is not None:
            try:
                blocks = await changed_blocks(self._xapi, self._ref, base_ref)
                way, differencing = "nbd+cbt", True
            except ProxyError as error:
                self._down("cbt", error)
        if blocks is None:
            blocks, differencing = await self._blocks_of_stream(base_ref)
        try:
            export = await stack.enter_async_context(
                open_nbd(self._xapi, self._ref, connections=self._options.nbd_connections)
            )
        except ProxyError as error:
            self._down("nbd", error)
            return None
        disk = NbdDisk(export, blocks, is_differencing=differencing)
        return VdiExport(disk, way, self._steps)

    async def _blocks_of_stream(self, base_ref: str | None) -> tuple[Blocks, bool]:
        """Which blocks an export would send: its tables come first; the rest is not read."""
        if base_ref is not None:
            try:
                async with self._stream(base_ref) as disk:
                    return disk.blocks, True
            except ProxyError as error:
                self._down("delta", error)
        async with self._stream(None) as disk:
            return disk.blocks, False

    @contextlib.asynccontextmanager
    async def _stream(self, base_ref: str | None) -> AsyncIterator[Disk]:
        kind = await self._format()
        query = {"format": kind, "vdi": self._ref}
        if base_ref is not None:
            query["base"] = base_ref
        label = self._vdi.get("name_label", "")
        name = f"Exporting content of VDI {label} as {kind} stream"
        async with download(self._xapi, "/export_raw_vdi/", query, name=name) as body:
            disk: Disk
            if kind == "vhd":
                disk = await open_vhd_stream(body)
                if disk.is_differencing != (base_ref is not None):
                    raise Refused(
                        "the host sent another kind of export than it was asked for",
                        code="WRONG_EXPORT",
                        data={"differencing": disk.is_differencing},
                    )
            else:
                disk = await open_qcow2_stream(body, is_differencing=base_ref is not None)
            yield disk

    async def _format(self) -> Literal["vhd", "qcow2"]:
        """What the disk is made of: XAPI converts neither."""
        found = _image_format(self._vdi)
        if found is None and vms.is_ref(self._vdi.get("snapshot_of")):
            live = await vms.record_or_none(self._xapi, "VDI", self._vdi["snapshot_of"])
            found = None if live is None else _image_format(live)
        if found in ("vhd", "qcow2"):
            return "qcow2" if found == "qcow2" else "vhd"
        if found is not None:
            raise Refused(
                f"{found} is not in the allowed export format [vhd, qcow2]", code="ENOTSUP"
            )
        return "qcow2" if int(self._vdi["virtual_size"]) > MAX_VIRTUAL_SIZE else "vhd"

    def _down(self, way: str, error: ProxyError) -> None:
        self._steps.append(StepDown(way, error.code, error.message))


def _image_format(vdi: dict[str, Any]) -> str | None:
    config: dict[str, str] = vdi.get("sm_config") or {}
    return config.get("image-format")
