"""GET and PUT /pool/xmldbdump: the pool's database as XML, out and in.

A restore answers 200 before it reads anything; only the task tells whether the database was
taken.  From the last byte on nothing stops it, neither ``task.cancel`` nor the client.  With
``dry_run=true`` everything is looked at and nothing done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import trio

from proxy.errors import XapiError
from proxy.simulator.http import Gone, head
from proxy.simulator.records import SCHEMA
from proxy.simulator.transfers import Inlet, Outlet, Refusal, Transfer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.simulator.http import Head, Wire
    from proxy.simulator.pool import SimulatedPool

SCHEMA_VERSION = "5.603"
_PIECE = 64 * 1024
_STUB = (
    b"<database><manifest>"
    b'<pair key="schema_major_vsn" value="5"/><pair key="schema_minor_vsn" value="35"/>'
    b'</manifest><table name="SR" /><table name="pool" /><table name="VM" /></database>'
)
"""What a master in the middle of a pool upgrade sends."""


async def export_database(
    pool: SimulatedPool, wire: Wire, request: Head, transfer: Transfer
) -> None:
    """GET: the whole database, without a length."""
    del request
    await wire.send(head(200, headers={"task-id": transfer.task}, length=False))
    outlet = Outlet(pool, wire, transfer)
    document = _STUB if pool.is_upgrading else b"".join(_document(pool))
    for start in range(0, len(document), _PIECE):
        await outlet.send(document[start : start + _PIECE])
    await outlet.finish()
    pool.tasks.succeed(transfer.task)
    transfer.ended = "complete"


def _document(pool: SimulatedPool) -> Iterator[bytes]:
    major, minor = SCHEMA_VERSION.split(".")
    yield b'<?xml version="1.0" encoding="UTF-8"?>\n<database><manifest>'
    yield f'<pair key="schema_major_vsn" value="{major}"/>'.encode()
    yield f'<pair key="schema_minor_vsn" value="{minor}"/></manifest>'.encode()
    for kind in sorted(SCHEMA):
        rows = "".join(
            f"<row ref={quoteattr(ref)} _ref={quoteattr(ref)}"
            f" uuid={quoteattr(str(record['uuid']))}"
            f" name__label={quoteattr(str(record.get('name_label', '')))}/>"
            for ref, record in pool.store.all(kind)
        )
        yield f'<table name="{kind}">{rows}</table>'.encode()
    yield b'<table name="blob">'
    for number in range(pool.database_filler // 64):
        yield f'<row ref="OpaqueRef:{number:032}"/>       '.encode()
    yield b"</table></database>"


async def import_database(
    pool: SimulatedPool, wire: Wire, request: Head, transfer: Transfer
) -> None:
    """PUT: read up to the announced length, look at it, keep it and reboot."""
    if "content-length" not in request.headers:
        raise Refusal(400)
    await wire.send(head(200, headers={"task-id": transfer.task}, length=False))
    inlet = Inlet(pool, wire, transfer)
    left = int(request.headers["content-length"])
    received = bytearray()
    try:
        while left > 0 and (data := (await wire.read())[:left]):
            left -= len(data)
            await inlet.take(len(data))
            received += data
    except Gone:
        pass  # what a closed connection leaves is a short document, which does not parse
    with trio.CancelScope(shield=True):
        _check(bytes(received))
        dry_run = request.query.get("dry_run") == "true"
        if not dry_run:
            pool.restored.append(bytes(received))
        try:
            await inlet.finish()
        except XapiError:
            if not dry_run:
                pool.restored.pop()
            raise
        if dry_run:
            pool.dry_runs += 1
        pool.tasks.succeed(transfer.task)
        transfer.ended = "complete"


def _check(document: bytes) -> None:
    try:
        root = ElementTree.fromstring(document)  # noqa: S314 - what a test sent to a simulation
    except ElementTree.ParseError as error:
        raise XapiError("INTERNAL_ERROR", [f"Xmlm.Error({error})"]) from error
    pairs = {pair.get("key"): pair.get("value") for pair in root.iterfind("manifest/pair")}
    if f"{pairs.get('schema_major_vsn')}.{pairs.get('schema_minor_vsn')}" != SCHEMA_VERSION:
        raise XapiError("RESTORE_INCOMPATIBLE_VERSION")
