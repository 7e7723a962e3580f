"""The face of a pool: calls, records, waits, host tasks and transfers.

No copy of the pool is kept: every record is read when it is needed, and ``event.from`` only
serves to wait for one named object.  A copy is stale exactly when it matters (a snapshot
whose event has not arrived yet is missed by retention).
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog

from proxy.errors import NoSuchObject, ProxyError, Unreachable, XapiError
from proxy.runtime.deadlines import deadline, undo_within
from proxy.runtime.trouble import tell_trouble
from proxy.xapi import ownership, transfer
from proxy.xapi.results import parse_result
from proxy.xapi.session import Session, xapi_error
from proxy.xapi.shapes import is_list, is_map

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from proxy.xapi.options import XapiOptions

_log = structlog.get_logger(__name__)

POLL_SECONDS: Final = 30.0
"""How long one ``event.from`` waits at the host; what an abandoned one costs there."""
SETTLE_SECONDS: Final = 60.0
LABEL_SECONDS: Final = 5.0
_DUPLICATES: Final = 5
_SETTLED: Final = frozenset({"success", "failure", "cancelled"})


class HostTask:
    """A task record on the pool.  ``engaged``: a host works on it and will end it."""

    def __init__(self, ref: str) -> None:
        self.ref = ref
        self.engaged = False
        self.settled = False
        self.succeeded = False
        """It is known to have ended in success, be it in spite of a cancel."""


class Xapi:
    """One logged-in session on a pool (see :func:`connect`); any number of tasks may use it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.options: XapiOptions = session.options
        self.pool_ref = ""

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Call ``method``; the session is prepended (see :meth:`Session.call`).

        Raises ``XapiError``, ``Unreachable``.
        """
        return await self.session.call(method, *args, timeout=timeout)

    async def call_async(
        self,
        method: str,
        *args: Any,
        on_late_success: Callable[[Any], Awaitable[None]] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Run ``Async.<method>`` as a task of the pool and return its parsed result.

        ``timeout`` bounds the task in total (default: ``options.call_timeout``).  The task's
        record is always destroyed.  On cancel or timeout the task is cancelled on the host
        and waited for, shielded and bounded; if it succeeded all the same,
        ``on_late_success(result)`` is awaited so that the caller undoes the effect.

        Raises ``XapiError`` with the task's error; ``TASK_CANCELLED`` when somebody else
        cancelled it on the pool.
        """
        seconds = self.options.call_timeout if timeout is None else timeout
        task = HostTask(await self.session.call(f"Async.{method}", *args))
        task.engaged = True
        try:
            with deadline(f"XAPI: {method}", seconds):
                return await self.task_result(task, method)
        except BaseException:
            if not task.settled:
                await self._give_up(task, method, on_late_success)
            raise
        finally:
            await self._destroy_task(task)

    async def _give_up(
        self,
        task: HostTask,
        method: str,
        on_late_success: Callable[[Any], Awaitable[None]] | None,
    ) -> None:
        """Cancel the task and undo what it did nevertheless; trouble is logged, never raised."""
        try:
            with undo_within(f"XAPI: cancel {method}", SETTLE_SECONDS):
                await self.cancel_task(task)
                result = await self.task_result(task, method)
        except XapiError:
            return  # the task failed or was cancelled: it has no effect to undo
        except ProxyError as error:
            tell_trouble("a XAPI task did not end", error, method=method, task=task.ref)
            return
        if on_late_success is not None:
            try:
                with undo_within(f"XAPI: undo {method}", self.options.call_timeout):
                    await on_late_success(result)
            except ProxyError as error:
                tell_trouble("could not undo a XAPI task", error, method=method)

    async def cancel_task(self, task: HostTask) -> None:
        """Ask the host to cancel; a task that cannot be cancelled, or ended, is no error."""
        try:
            await self.call("task.cancel", task.ref, timeout=15)
        except XapiError as error:
            _log.debug("task.cancel refused", task=task.ref, code=error.code)

    async def task_result(self, task: HostTask, method: str) -> Any:
        """Wait until ``task`` settles; its parsed result, or its error raised.

        A record that vanished first is the error ``TASK_DESTROYED``: whether the operation
        took place is unknown.
        """
        try:
            record = await self.await_record(
                "task", task.ref, lambda fields: fields["status"] in _SETTLED
            )
        except XapiError as error:
            if error.code != "HANDLE_INVALID":
                raise
            task.settled = True
            raise XapiError("TASK_DESTROYED", [task.ref], method=method) from error
        task.settled = True
        match record["status"]:
            case "success":
                task.succeeded = True
                return parse_result(str(record.get("result") or ""))
            case "cancelled":
                raise XapiError("TASK_CANCELLED", [task.ref], method=method)
            case _:
                code, *params = record.get("error_info") or ["UNKNOWN"]
                raise xapi_error(str(code), params, method)

    async def await_record(
        self, cls: str, ref: str, predicate: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        """The record of ``ref`` as soon as ``predicate`` accepts it; no time limit.

        Waits with ``event.from`` on this one object: the first poll, with an empty token,
        answers the present state, so that no change is missed.  A change lost by the host
        (a toolstack restart) is found by reading the record after each silent poll.
        Raises ``XapiError`` ``HANDLE_INVALID`` when the object is gone.
        """
        token = ""
        while True:
            answer = await self._poll(cls, ref, token)
            token = str(answer.get("token", ""))
            events: list[dict[str, Any]] = answer.get("events") or []
            for event in reversed(events):
                if event.get("ref") != ref:
                    continue
                if event.get("operation") == "del":
                    raise XapiError("HANDLE_INVALID", [cls, ref])
                snapshot = event.get("snapshot")
                if is_map(snapshot):
                    if predicate(snapshot):
                        return snapshot
                    break
            else:
                fields = await self.record(cls, ref)
                if predicate(fields):
                    return fields

    async def _poll(self, cls: str, ref: str, token: str) -> dict[str, Any]:
        # Without a token the present state comes at once, unless the object is gone.
        # XAPI takes the timeout as a float; an integral one would arrive as an integer.
        seconds = POLL_SECONDS + 0.1 if token else 1.1
        try:
            answer = await self.call(
                "event.from", [f"{cls.lower()}/{ref}"], token, seconds, timeout=seconds + 30
            )
        except XapiError as error:
            if error.code != "EVENTS_LOST":
                raise
            return {"token": ""}
        return answer if is_map(answer) else {"token": ""}

    async def wait_for(
        self,
        cls: str,
        ref: str,
        predicate: Callable[[dict[str, Any]], bool],
        *,
        name: str,
        timeout: float,
    ) -> dict[str, Any]:
        """The record of ``ref`` once ``predicate`` accepts it.

        ``name`` says in the error what was waited for.  Raises ``Unreachable``
        (``ETIMEDOUT``) after ``timeout`` seconds, ``XapiError`` when the object is gone.
        """
        with deadline(name, timeout):
            return await self.await_record(cls, ref, predicate)

    async def record(self, cls: str, ref: str) -> dict[str, Any]:
        """All fields of one object now.  Raises ``XapiError`` ``HANDLE_INVALID``."""
        fields = await self.call(f"{cls}.get_record", ref)
        if not is_map(fields):
            raise Unreachable(f"{cls}.get_record answered no record", code="EPROTO")
        return fields

    async def by_uuid(self, cls: str, uuid: str) -> str:
        """The reference of an object.  Raises ``NoSuchObject``."""
        try:
            return str(await self.call(f"{cls}.get_by_uuid", uuid))
        except XapiError as error:
            if error.code not in ("UUID_INVALID", "HANDLE_INVALID"):
                raise
            raise NoSuchObject(cls, uuid) from error

    async def records_where(self, cls: str, query: str) -> dict[str, dict[str, Any]]:
        """The records that match XAPI's ``query`` (``field "name__label" = "x"``) by reference."""
        found = await self.call(f"{cls}.get_all_records_where", query)
        if not is_map(found):
            raise Unreachable(f"{cls}.get_all_records_where answered no records", code="EPROTO")
        return found

    async def update_map(
        self, cls: str, ref: str, field: str, changes: Mapping[str, str | None]
    ) -> None:
        """Set the entries of a map field, or remove those whose value is ``None``.

        One entry after the other, so that a cancel or a failure leaves a known prefix done.
        An entry that somebody else adds at the same time is replaced, with a bounded number
        of tries.
        """
        for key, value in changes.items():
            if value is None:
                await self.call(f"{cls}.remove_from_{field}", ref, key)
                continue
            for turn in range(_DUPLICATES + 1):
                try:
                    await self.call(f"{cls}.add_to_{field}", ref, key, value)
                    break
                except XapiError as error:
                    if error.code != "MAP_DUPLICATE_KEY" or turn == _DUPLICATES:
                        raise
                await self.call(f"{cls}.remove_from_{field}", ref, key)

    @asynccontextmanager
    async def task(self, label: str, description: str = "") -> AsyncIterator[str]:
        """A task record that shows our work on the pool (labels start with ``[XO] ``).

        Marked with the run that acts (:func:`ownership.acting_for`).  Destroyed at the end,
        cancelled first if it is still pending.
        """
        async with self.host_task(label, description) as task:
            yield task.ref

    @asynccontextmanager
    async def host_task(self, label: str, description: str) -> AsyncIterator[HostTask]:
        """As :meth:`task`; an ``engaged`` task is waited for after its cancel."""
        task = HostTask(str(await self.call("task.create", label, description)))
        try:
            await self._mark(task)
            yield task
        finally:
            if not task.settled:
                await self.settle(task, label)
            await self._destroy_task(task)

    async def _mark(self, task: HostTask) -> None:
        owner = ownership.present_owner()
        if owner is None:
            return
        try:
            await self.call("task.set_other_config", task.ref, owner.marks)
        except XapiError as error:  # a sweep would not find it: no reason to do no backup
            _log.warning("a XAPI task is not marked", task=task.ref, code=error.code)

    async def settle(self, task: HostTask, label: str) -> Any:
        """Cancel a task that may be pending and wait for its end, shielded and bounded.

        Returns the result if the task succeeded, else ``None``; never raises.
        """
        name = f"XAPI: cancel '{label}'"
        seconds = SETTLE_SECONDS if task.engaged else LABEL_SECONDS
        try:
            with undo_within(name, seconds):
                if not task.engaged:
                    # No host works on it, so no host would ever end it.
                    record = await self.record("task", task.ref)
                    if record["status"] not in _SETTLED:
                        await self.call("task.set_status", task.ref, "cancelled")
                    task.settled = True
                    return None
                await self.cancel_task(task)
                return await self.task_result(task, label)
        except XapiError:
            return None
        except ProxyError as error:
            tell_trouble("a XAPI task did not end", error, task=task.ref, label=label)
            return None

    async def _destroy_task(self, task: HostTask) -> None:
        try:
            with undo_within("XAPI: task.destroy", LABEL_SECONDS):
                await self.call("task.destroy", task.ref)
        except XapiError:
            pass  # gone already
        except ProxyError as error:
            tell_trouble("could not destroy a XAPI task", error, task=task.ref)

    def export_vm(
        self, vm_ref: str, *, compression: Literal["none", "native", "zstd"]
    ) -> AbstractAsyncContextManager[transfer.Download]:
        """Download a halted VM or a snapshot as an XVA archive (see ``transfer.Download``)."""
        return transfer.export_vm(self, vm_ref, compression=compression)

    def import_vm(
        self, sr_ref: str, *, length: int | None
    ) -> AbstractAsyncContextManager[transfer.Upload]:
        """Upload an XVA archive of ``length`` bytes to an SR (see ``transfer.import_vm``)."""
        return transfer.import_vm(self, sr_ref, length=length)

    def export_pool(self) -> AbstractAsyncContextManager[transfer.Download]:
        """Download the pool's database (see ``transfer.Download``)."""
        return transfer.export_pool(self)

    def import_pool(
        self, *, length: int, dry_run: bool
    ) -> AbstractAsyncContextManager[transfer.Upload]:
        """Upload a database of ``length`` bytes over the pool's (see ``transfer.import_pool``)."""
        return transfer.import_pool(self, length=length, dry_run=dry_run)


@asynccontextmanager
async def connect(options: XapiOptions) -> AsyncIterator[Xapi]:
    """Log in to a pool; log out at the end, shielded and bounded.

    Raises ``Unauthorized`` or ``Unreachable`` (see :meth:`Session.open`); nothing is retried
    here, so that a wrong address is told at once.
    """
    session = Session(options)
    try:
        await session.open()
        xapi = Xapi(session)
        pools = await session.call("pool.get_all")
        if not is_list(pools) or not pools:
            raise Unreachable(f"{session.address.authority} names no pool", code="EPROTO")
        xapi.pool_ref = str(pools[0])
        yield xapi
    finally:
        await session.close()
