"""XAPI tasks: records that clients poll or watch, and the work behind them."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from proxy.formats.xmlrpc import date, dump_value

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

    from proxy.errors import XapiError
    from proxy.simulator.store import Store

SETTLED = ("success", "failure", "cancelled")


class Work:
    """What runs behind a task: its cancel scope and whether it listens to ``task.cancel``."""

    def __init__(self, scope: trio.CancelScope, *, cancellable: bool = True) -> None:
        self.scope = scope
        self.cancellable = cancellable
        self.canceled = False


class Tasks:
    """Creates and settles task records; server rules: only a pending task is settled."""

    def __init__(self, store: Store, host: Callable[[], str]) -> None:
        self._store = store
        self._host = host
        self._work: dict[str, Work] = {}

    def create(self, label: str, description: str = "") -> str:
        return self._store.create(
            "task",
            name_label=label,
            name_description=description,
            created=now(),
            resident_on=self._host(),
            allowed_operations=["cancel", "destroy"],
        )

    def attach(self, ref: str, work: Work) -> None:
        """``task.cancel`` and ``task.destroy`` reach ``work`` from now on."""
        self._work[ref] = work

    def detach(self, ref: str) -> None:
        self._work.pop(ref, None)

    def progress(self, ref: str, share: float) -> None:
        record = self._store.find("task", ref)
        if record is not None and record["status"] not in SETTLED:
            self._store.update("task", ref, progress=share)

    def succeed(self, ref: str, result: Any = None) -> None:
        """``result`` becomes XML, as xapi stores it; None an empty result."""
        text = "" if result is None or result == "" else dump_value(result)
        self._settle(ref, "success", progress=1.0, result=text)

    def fail(self, ref: str, error: XapiError) -> None:
        self._settle(ref, "failure", progress=1.0, error_info=[error.code, *error.params])

    def cancelled(self, ref: str) -> None:
        self._settle(ref, "cancelled", progress=1.0, error_info=["TASK_CANCELLED", ref])

    def _settle(self, ref: str, status: str, **fields: Any) -> None:
        record = self._store.find("task", ref)
        if record is None or record["status"] in SETTLED:
            return
        self._store.update("task", ref, status=status, finished=now(), **fields)
        if "destroy" in record["current_operations"].values():
            self._store.destroy("task", ref)

    def cancel(self, ref: str) -> None:
        """Ask the work to stop; the status says ``cancelling`` until it did."""
        record = self._store.get("task", ref)
        if record["status"] in SETTLED:
            return
        self._store.update("task", ref, status="cancelling")
        work = self._work.get(ref)
        if work is None:
            # xapi leaves it to a client that owns the task to react; nothing else will
            return
        work.canceled = True
        if work.cancellable:
            work.scope.cancel()

    def destroy(self, ref: str) -> None:
        """Remove a settled task; a pending one goes when its work ends."""
        record = self._store.get("task", ref)
        if record["status"] in SETTLED or ref not in self._work:
            self._store.destroy("task", ref)
        else:
            self._store.update("task", ref, current_operations={ref: "destroy"})


def now() -> str:
    """The present as XAPI writes it."""
    return date(datetime.datetime.now(datetime.UTC))
