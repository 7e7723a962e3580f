"""How a call passes through the pool: name, session, faults, gates, effect, answer, log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import trio

from proxy.errors import ProxyError, XapiError
from proxy.simulator import generic
from proxy.simulator.events import wait_events
from proxy.simulator.operations import OPERATIONS, Operation, method_names
from proxy.simulator.records import SCHEMA
from proxy.simulator.tasks import Work

if TYPE_CHECKING:
    from proxy.simulator.faults import Fault
    from proxy.simulator.pool import SimulatedPool

_BY_LENGTH = sorted([*SCHEMA, "session", "event", "system"], key=len, reverse=True)


class Dropped(Exception):
    """A fault demands that the connection ends without an answer."""


@dataclass(slots=True)
class CallRecord:
    """A call that the pool received; ``params`` without session and password."""

    at: float
    method: str
    params: list[Any]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """Which host of the pool a connection reached."""

    host: str
    is_master: bool = True


def canonical(method: str) -> tuple[str, bool]:
    """The dotted name without ``Async.``, and whether it was there."""
    asynchronous = method.startswith(("Async.", "Async_"))
    name = method[6:] if asynchronous else method
    if "." not in name:
        for kind in _BY_LENGTH:
            if name.startswith(f"{kind}_"):
                return f"{kind}.{name[len(kind) + 1 :]}", asynchronous
    return name, asynchronous


class Calls:
    """The dispatcher.  One per pool; calls run concurrently."""

    def __init__(self, pool: SimulatedPool) -> None:
        self._pool = pool
        self.log: list[CallRecord] = []

    async def handle(self, peer: Peer, method: str, params: list[Any]) -> Any:
        """Answer a call from the wire; raises ``XapiError`` or :class:`Dropped`."""
        name, asynchronous = canonical(method)
        record = CallRecord(trio.current_time(), method, _presentable(name, params))
        self.log.append(record)
        try:
            return await self._handle(peer, name, params, asynchronous=asynchronous)
        except XapiError as error:
            record.error = error.code
            raise
        except ProxyError as error:
            record.error = "INTERNAL_ERROR"
            raise XapiError("INTERNAL_ERROR", [error.message]) from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            record.error = "INTERNAL_ERROR"
            raise XapiError("INTERNAL_ERROR", [repr(error)]) from error

    async def _handle(self, peer: Peer, name: str, params: list[Any], *, asynchronous: bool) -> Any:
        pool = self._pool
        if name == "system.listMethods":
            return method_names()
        if name in ("session.login_with_password", "session.slave_local_login_with_password"):
            return await self._login(peer, name, params)
        if not params:
            raise XapiError("MESSAGE_PARAMETER_COUNT_MISMATCH", [name, "1", "0"])
        session = pool.sessions.check(params[0])
        rest = params[1:]
        if not peer.is_master:
            raise XapiError("HOST_IS_SLAVE", [pool.store.get("host", pool.master)["address"]])
        if asynchronous:
            return await self._start(name, rest)
        fault = pool.faults.take(name)
        await self._before(name, fault)
        if name == "session.logout":
            pool.sessions.logout(session)
            value: Any = None
        elif name == "event.from":
            value = await self._event_from(session, rest)
        else:
            if fault and fault.error:
                _raise(fault)
            await self._latency(name)
            value = self.perform(name, rest, session=session)
        await pool.gates.pass_by(name, "after")
        if fault and fault.hang:
            await trio.sleep_forever()
        if fault and fault.drop == "after":
            raise Dropped
        return "" if value is None else value

    async def _login(self, peer: Peer, name: str, params: list[Any]) -> str:
        if not 2 <= len(params) <= 4:
            raise XapiError("MESSAGE_PARAMETER_COUNT_MISMATCH", [name, "2", str(len(params))])
        fault = self._pool.faults.take(name)
        await self._before(name, fault)
        if fault and fault.error:
            _raise(fault)
        if not peer.is_master:
            master = self._pool.store.get("host", self._pool.master)
            raise XapiError("HOST_IS_SLAVE", [master["address"]])
        session = self._pool.sessions.login(str(params[0]), str(params[1]))
        await self._pool.gates.pass_by(name, "after")
        if fault and fault.drop == "after":
            raise Dropped
        return session

    async def _before(self, name: str, fault: Fault | None) -> None:
        if fault is not None:
            await trio.sleep(fault.delay)
            if fault.drop == "before":
                raise Dropped
        await self._pool.gates.pass_by(name, "before")

    async def _event_from(self, session: str, params: list[Any]) -> Any:
        if len(params) != 3:
            raise XapiError(
                "MESSAGE_PARAMETER_COUNT_MISMATCH", ["event.from", "3", str(len(params))]
            )
        pool = self._pool
        classes, token, timeout = params
        return await wait_events(
            pool.store, pool.sessions, session, list(classes), str(token), float(timeout)
        )

    def perform(self, name: str, params: list[Any], *, session: str = "") -> Any:
        """The effect of a call, at once: no check of the session, no fault, no gate."""
        operation = OPERATIONS.get(name)
        if operation is None:
            return generic.call(self._pool.store, name, params)
        self._check(name, operation, params)
        if operation.vm_operation is not None:
            self._pool.vms.guard(params[0], operation.vm_operation)
        if operation.with_session:
            return operation.function(self._pool, session, *params)
        return operation.function(self._pool, *params)

    def _check(self, name: str, operation: Operation, params: list[Any]) -> None:
        if name == "VM.snapshot" and len(params) > 2 and self._pool.is_old:
            raise XapiError("MESSAGE_PARAMETER_COUNT_MISMATCH", [name, "2", str(len(params))])
        operation.check_count(name, params)

    # Async calls

    async def _start(self, name: str, params: list[Any]) -> str:
        """Check what xapi checks before it makes a task, then work in the pool's nursery."""
        pool = self._pool
        operation = OPERATIONS.get(name)
        if operation is None or operation.with_session:
            raise XapiError("MESSAGE_METHOD_UNKNOWN", [f"Async.{name}"])
        fault = pool.faults.take(name)
        if fault is not None and fault.drop == "before":
            raise Dropped
        if fault is not None and fault.at_call and fault.error:
            _raise(fault)
        self._check(name, operation, params)
        task = pool.tasks.create(f"Async.{name}")
        pool.spawn(self._work, name, operation, params, task, fault)
        if fault is not None and fault.drop == "after":
            raise Dropped
        await trio.lowlevel.checkpoint()
        return task

    async def _work(
        self, name: str, operation: Operation, params: list[Any], task: str, fault: Fault | None
    ) -> None:
        pool = self._pool
        work = Work(trio.CancelScope(), cancellable=not (fault and fault.ignore_cancel))
        pool.tasks.attach(task, work)
        vm = params[0] if operation.vm_operation else None
        try:
            with work.scope:
                value = await self._effect(name, operation, params, task, fault)
                await pool.gates.pass_by(name, "after")
                if fault and fault.hang:
                    await trio.sleep_forever()
                pool.tasks.succeed(task, value)
            if work.scope.cancelled_caught:
                pool.tasks.cancelled(task)
        except XapiError as error:
            pool.tasks.fail(task, error)
        except (TypeError, ValueError, KeyError) as error:
            pool.tasks.fail(task, XapiError("INTERNAL_ERROR", [repr(error)]))
        finally:
            pool.tasks.detach(task)
            if vm is not None:
                pool.vms.end(vm, task)

    async def _effect(
        self, name: str, operation: Operation, params: list[Any], task: str, fault: Fault | None
    ) -> Any:
        pool = self._pool
        if operation.vm_operation:
            pool.vms.begin(params[0], task, operation.vm_operation)
        await trio.sleep(fault.delay if fault else 0)
        await pool.gates.pass_by(name, "before")
        await self._latency(name)
        if fault and fault.error:
            _raise(fault)
        if operation.vm_operation and pool.store.find("VM", params[0]):
            pool.vms.end(params[0], task)
        return operation.function(pool, *params)

    async def _latency(self, name: str) -> None:
        seconds = self._pool.latencies.get(name, 0.0)
        if seconds:
            await trio.sleep(seconds)
        else:
            await trio.lowlevel.checkpoint()


def _raise(fault: Fault) -> NoReturn:
    assert fault.error
    raise XapiError(fault.error[0], list(fault.error[1:]))


def _presentable(name: str, params: list[Any]) -> list[Any]:
    if name.startswith("session."):
        return params[:1] if "login" in name else []
    return params[1:]
