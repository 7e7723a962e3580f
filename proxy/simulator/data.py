"""Which data request goes where, and what is decided before any handler: 401, 302, refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from proxy.errors import XapiError
from proxy.simulator.database import export_database, import_database
from proxy.simulator.disk_transfers import export_disk, import_disk
from proxy.simulator.exports import export_vm
from proxy.simulator.http import error_page
from proxy.simulator.imports import import_vm
from proxy.simulator.transfers import Transfer, guarded

if TYPE_CHECKING:
    from proxy.simulator.faults import Fault
    from proxy.simulator.http import Head, Wire
    from proxy.simulator.pool import SimulatedPool

_HANDLERS = {
    ("GET", "/export"): export_vm,
    ("GET", "/export_raw_vdi"): export_disk,
    ("GET", "/pool/xmldbdump"): export_database,
    ("PUT", "/import"): import_vm,
    ("PUT", "/import_raw_vdi"): import_disk,
    ("PUT", "/pool/xmldbdump"): import_database,
}


async def serve_data(pool: SimulatedPool, wire: Wire, request: Head) -> None:
    """Answer a GET or PUT of data.  The connection is over afterwards."""
    handler = _HANDLERS.get((request.method, request.path))
    if handler is None:
        await wire.respond(403 if request.method == "PUT" else 404)
        return
    try:
        pool.sessions.check(request.common("session_id"))
    except XapiError:
        await wire.respond(401, headers={"www-authenticate": 'Basic realm="xapi"'})
        return
    fault = pool.faults.take(request.path)
    if fault is not None:
        await trio.sleep(fault.delay)
        if fault.redirect:
            location = fault.redirect.rstrip("/") + request.target
            await wire.respond(302, headers={"location": location})
            return
        if fault.drop == "before":
            await wire.reset()
            return
        if fault.status is not None:
            await _refuse(pool, wire, request, fault)
            return
    given = request.common("task_id")
    if given and pool.store.find("task", given) is None:
        await wire.respond(500, error_page(f"HANDLE_INVALID: [ task; {given} ]"))
        return
    task = given or pool.tasks.create(f"VM {request.path.strip('/')}")
    transfer = Transfer(request.path, task, not given, fault)
    await guarded(pool, wire, request, transfer, handler)


async def _refuse(pool: SimulatedPool, wire: Wire, request: Head, fault: Fault) -> None:
    task = request.common("task_id")
    if task and fault.error:
        pool.tasks.fail(task, XapiError(fault.error[0], list(fault.error[1:])))
    await wire.respond(fault.status or 500, error_page("refused"))
