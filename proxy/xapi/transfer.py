"""Bulk transfers through XAPI's HTTP handlers, each watched through a task of the pool.

What HTTP says is not what happened: exports carry no length, an error after the head is
appended to the body, and an upload is answered 200 before its first byte is read.  Only the
task tells whether a transfer worked, so ``finish`` waits for it, and leaving without
``finish`` closes the socket at once, cancels the task and waits for its end.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

import trio

from proxy.errors import ProxyError, Refused, Unauthorized, Unreachable, XapiError
from proxy.runtime import transport
from proxy.runtime.deadlines import deadline, inactivity, undo_within
from proxy.runtime.http1 import Answer, Body, read_answer, request_head
from proxy.runtime.trouble import tell_trouble
from proxy.xapi import vms
from proxy.xapi.shapes import is_list

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.runtime.transport import Connection
    from proxy.xapi.client import HostTask, Xapi
    from proxy.xapi.options import Address


FIRST_BYTE_SECONDS: Final = 1800.0
"""A host may prepare an export that long (the limit that XO sets)."""
END_SECONDS: Final = 120.0
"""From the end of an export's body until its task must have ended."""
EXPLAIN_SECONDS: Final = 10.0
EARLY_SECONDS: Final = 20.0
"""How long an upload waits for the answer to its head before it sends its body all the same."""
UNDO_SECONDS: Final = 300.0
UNKNOWN_LENGTH: Final = 2**50
"""Announced for a body whose end only its content tells: XAPI takes no chunked bodies."""
LINGER_SECONDS: Final = 5.0
"""How long a host may need to see the end of such a body by itself."""
_REDIRECTS: Final = 10


class Download:
    """The body of an export.  One task reads it; ``received`` counts bytes."""

    def __init__(
        self, xapi: Xapi, task: HostTask, connection: Connection, body: Body, name: str
    ) -> None:
        self._xapi = xapi
        self._task = task
        self._connection = connection
        self._body = body
        self._name = name
        self._ended = False
        self.received = 0

    async def read_into(self, view: memoryview) -> int:
        """Fill ``view`` with what is there; at least one byte, 0 at the end of the body.

        The end is not yet success: see :meth:`finish`.  Raises the host's reason if it
        tells one, else ``Unreachable`` (``ECONNRESET``, ``ETIMEDOUT``).
        """
        try:
            with inactivity(f"{self._name}: data", self._xapi.options.inactivity_timeout):
                count = await self._body.read_into(view)
        except Unreachable as error:
            raise await _explained(self._xapi, self._task, error) from error
        self.received += count
        self._ended = count == 0 and len(view) > 0
        return count

    async def finish(self) -> None:
        """After the end of the body: wait until the host says that the export succeeded.

        Raises ``XapiError`` when its task failed, ``Unreachable`` when it does not end, and
        ``Unreachable`` (``ECONNRESET``) when the body was not read to its end.
        """
        if not self._ended:
            raise Unreachable(f"{self._name}: not read to its end", code="ECONNRESET")
        self._connection.close()
        with deadline(f"{self._name}: end of the task", END_SECONDS):
            await self._xapi.task_result(self._task, self._name)

    @property
    def peer_lossy(self) -> bool:
        """Whether TCP saw losses: evidence that the network is what slows the transfer."""
        return self._connection.lossy


class Upload:
    """The body of an import, written by one task: ``length`` bytes in total, or as many as come."""

    def __init__(
        self, xapi: Xapi, task: HostTask, connection: Connection, length: int | None, name: str
    ) -> None:
        self._xapi = xapi
        self._task = task
        self._connection = connection
        self._length = length
        self._name = name
        self.sent = 0
        self.finished = False

    async def write(self, view: memoryview) -> None:
        """Send all of ``view``.  Raises the host's reason if it tells one.

        The inactivity timeout runs between two signs that the host takes bytes.
        """
        if self._length is not None and self.sent + len(view) > self._length:
            raise ValueError(f"{self._name}: more than the announced {self._length} bytes")
        offset = 0
        try:
            with inactivity(f"{self._name}: data", self._xapi.options.inactivity_timeout) as alive:
                while offset < len(view):
                    count = await self._connection.send_some(view[offset:])
                    alive.touch()
                    offset += count
                    self.sent += count
        except Unreachable as error:
            raise await _explained(self._xapi, self._task, error) from error

    async def finish(self) -> Any:
        """After the last byte: wait for the task and return its parsed result.

        Raises ``XapiError`` when the import failed.
        """
        if self._length is not None and self.sent != self._length:
            raise ValueError(f"{self._name}: {self.sent} of {self._length} bytes written")
        with deadline(f"{self._name}: end of the task", self._xapi.options.call_timeout):
            if self._length is None:
                # Most hosts know the end when they see it.  Where the archive is compressed,
                # some read on until the connection ends.
                with trio.move_on_after(LINGER_SECONDS):
                    return await self._result()
                self._connection.send_eof()
            return await self._result()

    async def _result(self) -> Any:
        result = await self._xapi.task_result(self._task, self._name)
        self.finished = True
        return result

    async def being_imported(self) -> list[str]:
        """The VMs that the host is making of an archive at this moment."""
        return await _being_imported(self._xapi, self._task.ref)

    def abort(self) -> None:
        """Close the socket at once; what it still holds is thrown away."""
        self._connection.abort()

    @property
    def succeeded(self) -> bool:
        """Whether the host is known to have taken it, also when nobody waited for that."""
        return self._task.succeeded

    @property
    def peer_lossy(self) -> bool:
        """Whether TCP saw losses: evidence that the network is what slows the transfer."""
        return self._connection.lossy


@asynccontextmanager
async def download(
    xapi: Xapi, path: str, query: Mapping[str, str], *, name: str, description: str = ""
) -> AsyncIterator[Download]:
    """GET ``path`` with a task ``[XO] <name>``; entering waits for the first byte of the body.

    Raises ``XapiError`` when the host refuses, ``Unauthorized``, or ``Unreachable``.
    """
    async with xapi.host_task(f"[XO] {name}", description) as task:
        with deadline(f"{name}: first byte", FIRST_BYTE_SECONDS):
            connection, body = await _open(xapi, "GET", path, query, task, name)
            try:
                assert body is not None
                await body.wait()
            except BaseException:
                connection.abort()
                raise
        try:
            yield Download(xapi, task, connection, body, name)
        finally:
            connection.abort()


@asynccontextmanager
async def upload(
    xapi: Xapi,
    path: str,
    query: Mapping[str, str],
    *,
    length: int,
    name: str,
    description: str = "",
) -> AsyncIterator[Upload]:
    """PUT ``length`` bytes to ``path`` with a task ``[XO] <name>``.

    The host answers the head before it reads the body, so a redirect or a refusal is met
    before any byte is sent; no probe request is needed.
    """
    async with xapi.host_task(f"[XO] {name}", description) as task:
        connection, _ = await _open(xapi, "PUT", path, query, task, name, length)
        try:
            yield Upload(xapi, task, connection, length, name)
        finally:
            connection.abort()


@asynccontextmanager
async def export_vm(
    xapi: Xapi, vm_ref: str, *, compression: Literal["none", "native", "zstd"]
) -> AsyncIterator[Download]:
    """The XVA of a halted VM or a snapshot."""
    label = str(await xapi.call("VM.get_name_label", vm_ref))
    wire = {"none": "false", "native": "true", "zstd": "zstd"}[compression]
    query = {"ref": vm_ref, "use_compression": wire}
    async with download(xapi, "/export/", query, name="VM export", description=label) as body:
        yield body


@asynccontextmanager
async def import_vm(xapi: Xapi, sr_ref: str, *, length: int | None) -> AsyncIterator[Upload]:
    """Import an XVA; ``finish`` returns the references of the VMs.

    ``length`` is ``None`` for an archive that is still being made.

    Left without a successful ``finish``, the VMs that the import made are destroyed with
    their disks, shielded and bounded.
    """
    async with xapi.host_task("[XO] VM import", "") as task:
        body: Upload | None = None
        try:
            query = {"sr_id": sr_ref}
            announced = UNKNOWN_LENGTH if length is None else length
            connection, _ = await _open(
                xapi, "PUT", "/import/", query, task, "VM import", announced
            )
            body = Upload(xapi, task, connection, length, "VM import")
            yield body
        finally:
            if body is not None:
                body.abort()
            if task.engaged and not (body is not None and body.finished):
                await _undo_import(xapi, task)


_DATABASE: Final = "/pool/xmldbdump"


@asynccontextmanager
async def export_pool(xapi: Xapi) -> AsyncIterator[Download]:
    """The pool's database as XML."""
    async with download(xapi, _DATABASE, {}, name="Export pool metadata") as body:
        yield body


@asynccontextmanager
async def import_pool(xapi: Xapi, *, length: int, dry_run: bool) -> AsyncIterator[Upload]:
    """Restore a database; the host looks at all of it first and reboots when it took it.

    With ``dry_run`` it only looks.  Left before the last byte was sent, nothing is restored.  Left
    after it, the host goes on: its end is waited for, bounded, and ``succeeded`` tells it when
    the block has been left.
    """
    query = {"dry_run": "true"} if dry_run else {}
    async with upload(xapi, _DATABASE, query, length=length, name="Import pool metadata") as body:
        yield body


async def _undo_import(xapi: Xapi, task: HostTask) -> None:
    """Destroy what an abandoned import made; trouble is logged, never raised."""
    try:
        with undo_within("VM import: undo", UNDO_SECONDS):
            found = set(await _being_imported(xapi, task.ref))
            if task.settled:
                found.update(await _result_of(xapi, task))
            else:
                result = await xapi.settle(task, "VM import")
                found.update(result if is_list(result) else [])
            for ref in sorted(found):
                await vms.destroy_vm(xapi, ref, bypass_blocked=True)
    except ProxyError as error:
        tell_trouble("could not undo a VM import", error, task=task.ref)


async def _result_of(xapi: Xapi, task: HostTask) -> list[str]:
    try:
        result = await xapi.task_result(task, "VM import")
    except XapiError:
        return []
    return [str(ref) for ref in result] if is_list(result) else []


async def _being_imported(xapi: Xapi, task_ref: str) -> list[str]:
    records = await xapi.call("VM.get_all_records")
    return [ref for ref, vm in records.items() if task_ref in (vm.get("current_operations") or {})]


async def _open(
    xapi: Xapi,
    method: Literal["GET", "PUT"],
    path: str,
    query: Mapping[str, str],
    task: HostTask,
    name: str,
    length: int | None = None,
) -> tuple[Connection, Body | None]:
    """Send the request to the host that has the data.

    A 401 is answered by one new login, a 302 is followed to a member of the pool only (the
    URL holds the session).  On success the task is ``engaged``.  For a PUT the body may be
    ``None``: no answer yet.
    """
    address = xapi.session.address
    target: str | None = None
    session = xapi.session.ref
    renewed = False
    redirects = 0
    while True:
        if target is None:
            parameters = {**query, "session_id": session, "task_id": task.ref}
            target = f"{path}?{urlencode(parameters)}"
        connection, answer, body = await _exchange(xapi, method, address, target, task, length)
        if answer is None or 200 <= answer.status < 300:
            return connection, body
        connection.abort()
        if answer.status == 302:
            redirects += 1
            task.engaged = False
            if redirects > _REDIRECTS:
                raise Unreachable(f"{name}: too many redirects", code="EPROTO")
            address, target = await _redirected(xapi, address, answer)
        elif answer.status == 401 and not renewed:
            renewed = True
            task.engaged = False
            await xapi.session.renew(session)
            session, address, target = xapi.session.ref, xapi.session.address, None
        elif answer.status == 401:
            # The session is checked before the task is looked at: nobody will end it.
            task.engaged = False
            raise Unauthorized(f"{name}: {address.authority} refuses the session", code="401")
        else:
            refusal = Refused(
                f"{name}: {address.authority} answered HTTP {answer.status}",
                code="EHTTP",
                data={"status": answer.status},
            )
            reason = await _explained(xapi, task, refusal)
            # The host has refused for good: if its task did not end by now, nobody ends it.
            task.engaged = False
            raise reason


async def _exchange(
    xapi: Xapi,
    method: Literal["GET", "PUT"],
    address: Address,
    target: str,
    task: HostTask,
    length: int | None,
) -> tuple[Connection, Answer | None, Body | None]:
    """One request on a new connection, up to the head of its answer."""
    headers = [] if length is None else [("Content-Length", str(length))]
    head = request_head(method, target, address.authority, headers)
    options = xapi.options
    connection = await transport.connect(
        address.host,
        address.port,
        context=xapi.session.tls if address.secure else None,
        proxy=options.http_proxy,
        seconds=min(options.inactivity_timeout or 60, 60),
    )
    try:
        task.engaged = True  # from here on a host may work on it
        await connection.send_all(memoryview(head))
        if method == "GET":
            answer, body = await read_answer(connection, method)
            return connection, answer, body
        with trio.move_on_after(EARLY_SECONDS):
            answer, body = await read_answer(connection, method)
            return connection, answer, body
        return connection, None, None
    except Unreachable as error:
        connection.abort()
        raise await _explained(xapi, task, error) from error
    except BaseException:
        connection.abort()
        raise


async def _redirected(xapi: Xapi, origin: Address, answer: Answer) -> tuple[Address, str]:
    """Where a 302 leads: host, path and whole query come from ``Location``."""
    parts = urlsplit(answer.headers.get("location", ""))
    host = parts.hostname or origin.host
    if host != origin.host:
        hosts = await xapi.call("host.get_all_records")
        if host not in {str(h.get("address")).lower() for h in hosts.values()}:
            raise Unreachable(f"{origin.authority} redirects to a stranger: {host}", code="EPROTO")
    scheme = parts.scheme or origin.scheme
    if origin.secure and scheme != "https":
        raise Unreachable(f"{origin.authority} redirects to an insecure URL", code="EPROTO")
    secure = scheme == "https"
    default = (
        origin.port if scheme == origin.scheme and not parts.hostname else 443 if secure else 80
    )
    address = type(origin)(scheme, host, parts.port or default)
    query = urlencode(parse_qsl(parts.query, keep_blank_values=True))
    return address, f"{parts.path or '/'}?{query}"


async def _explained(xapi: Xapi, task: HostTask, error: ProxyError) -> ProxyError:
    """The host's own reason of a broken transfer, if its task tells one soon; else ``error``."""
    if error.code == "ETIMEDOUT" or task.settled:
        return error
    with trio.move_on_after(EXPLAIN_SECONDS):
        try:
            await xapi.task_result(task, str(error.data.get("deadline", "transfer")))
        except XapiError as reason:
            return error if reason.code == "TASK_DESTROYED" else reason
        except ProxyError:
            return error
    return error
