"""PUT /import: a VM from an XVA.  The answer 200 says nothing; only the task tells."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import zstandard

from proxy.errors import Corrupt, XapiError
from proxy.formats.xva import CHUNK, ChunkData, ChunkEnd, ChunkStart, OvaXml, Reader, parse_ova_xml
from proxy.runtime.threads import Work, in_thread
from proxy.simulator.http import head
from proxy.simulator.records import is_null
from proxy.simulator.transfers import Inlet, Refusal, Transfer, named_sr
from proxy.simulator.vm_archive import Restoration

if TYPE_CHECKING:
    from proxy.simulator.http import Head, Wire
    from proxy.simulator.pool import SimulatedPool


async def import_vm(pool: SimulatedPool, wire: Wire, request: Head, transfer: Transfer) -> None:
    """Answer 200 before the body, read it up to its length or the archive's end, settle."""
    if "transfer-encoding" in request.headers:
        raise Refusal(403, XapiError("IMPORT_ERROR_CANNOT_HANDLE_CHUNKED"))
    if "content-length" not in request.headers:
        raise Refusal(403, XapiError("INTERNAL_ERROR", ["content-length missing"]))
    sr = _target(pool, request)
    await wire.send(head(200, headers={"task-id": transfer.task}, length=False))
    inlet = Inlet(pool, wire, transfer)
    importer = _Importer(pool, transfer, sr, request)
    done = False
    try:
        left = int(request.headers["content-length"])
        ended = False
        while left > 0 and not ended and (data := (await wire.read())[:left]):
            left -= len(data)
            await inlet.take(len(data))
            ended = await importer.feed(data) and not pool.reads_on
        importer.finish()
        await inlet.finish()
        done = True
    except Corrupt as error:
        raise XapiError(*_translated(error)) from error
    finally:
        if not done:
            importer.undo()
    importer.release()
    pool.tasks.succeed(transfer.task, importer.vms)
    transfer.ended = "complete"


def _target(pool: SimulatedPool, request: Head) -> str:
    sr = named_sr(pool, request) or pool.store.get("pool", pool.ref)["default_SR"]
    if is_null(sr):
        raise Refusal(500, XapiError("DEFAULT_SR_NOT_FOUND", [sr]))
    record = pool.store.find("SR", sr)
    if record is None:
        raise Refusal(500, XapiError("HANDLE_INVALID", ["SR", sr]))
    if record["content_type"] == "iso":
        raise Refusal(400, XapiError("SR_OPERATION_NOT_SUPPORTED", [sr]))
    return sr


def _translated(error: Corrupt) -> tuple[str, list[str]]:
    what = error.data.get("what")
    if what == "truncated":
        return "IMPORT_ERROR_PREMATURE_EOF", []
    if what == "checksums":
        return "IMPORT_ERROR_SOME_CHECKSUMS_FAILED", []
    if what == "unexpected entry":
        return "IMPORT_ERROR_UNEXPECTED_FILE", [error.data["expected"], error.data["actual"]]
    return "IMPORT_ERROR", [error.message]


class _Importer:
    """Turns the archive's bytes into a VM, compressed or not."""

    def __init__(self, pool: SimulatedPool, transfer: Transfer, sr: str, request: Head) -> None:
        self._pool = pool
        self._task = transfer.task
        self._sr = sr
        self._restore = request.query.get("restore") == "true"
        self._force = request.query.get("force") == "true"
        self._reader = Reader()
        self._start = b""
        self._unpack: Any = None
        self._plain = False
        self._made: Restoration | None = None
        self._chunk: ChunkStart | None = None
        self._held = memoryview(bytearray(CHUNK))  # growing one per chunk cost as much as all else
        self._filled = 0
        self._bad_sums = 0

    @property
    def vms(self) -> list[str]:
        return self._made.vms if self._made else []

    async def feed(self, data: bytes) -> bool:
        """Take the next bytes; says whether the archive has ended."""
        if not self._plain and self._unpack is None:
            self._start += data
            if len(self._start) < 4:
                return False
            data, self._start = self._start, b""
            if data[:2] == b"\x1f\x8b":
                self._unpack = zlib.decompressobj(31)
            elif data[:4] == b"\x28\xb5\x2f\xfd":
                self._unpack = zstandard.ZstdDecompressor().decompressobj()
            else:
                self._plain = True
        if self._unpack is not None:
            try:
                data = await in_thread(Work.CPU, self._unpack.decompress, data)
            except (zlib.error, zstandard.ZstdError) as error:
                raise Corrupt("damaged compression") from error
        self._digest(data)
        return self._reader.ended

    def _digest(self, data: bytes) -> None:
        for event in self._reader.feed(data):
            if isinstance(event, OvaXml):
                self._begin(event.document)
            elif isinstance(event, ChunkStart):
                self._chunk = event
                self._filled = 0
            elif isinstance(event, ChunkData):
                end = self._filled + len(event.data)
                self._held[self._filled : end] = event.data
                self._filled = end
            elif isinstance(event, ChunkEnd):
                self._store(event)

    def _begin(self, document: bytes) -> None:
        _, objects = parse_ova_xml(document)
        self._made = Restoration(self._pool, objects, self._sr, restore=self._restore)
        for vm in self._made.vms:
            self._pool.store.update("VM", vm, current_operations={self._task: "import"})

    def _store(self, end: ChunkEnd) -> None:
        assert self._chunk is not None
        assert self._made is not None
        self._bad_sums += not end.intact
        vdi = self._made.disks.get(self._chunk.disk)
        if vdi is None:
            raise Corrupt(
                f"no disk {self._chunk.disk} in ova.xml",
                data={
                    "what": "unexpected entry",
                    "expected": "a disk of ova.xml",
                    "actual": self._chunk.disk,
                },
            )
        if self._pool.store.find("VDI", vdi) is None:
            raise XapiError("IMPORT_ERROR_FAILED_TO_FIND_OBJECT", [vdi])
        content = self._pool.disks.contents[vdi]
        room = content.size - self._chunk.offset
        if room > 0:
            content.write(self._chunk.offset, self._held[: min(room, self._filled)])

    def finish(self) -> None:
        """No more bytes: raises ``Corrupt`` when the archive is cut or its sums are wrong."""
        self._reader.finish()
        if self._bad_sums and not self._force:
            raise Corrupt(f"{self._bad_sums} checksums are wrong", data={"what": "checksums"})

    def release(self) -> None:
        """The VM may be used."""
        assert self._made is not None
        for vdi in self._made.disks.values():
            self._pool.disks.written(vdi)
        for vm in self._made.vms:
            self._pool.vms.end(vm, self._task)

    def undo(self) -> None:
        if self._made is not None:
            self._made.undo()
