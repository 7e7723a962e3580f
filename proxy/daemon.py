"""The daemon: one Trio run that opens everything, serves, and closes everything again.

Stopping, in this order, each step bounded in time:

1. SIGTERM or SIGINT: no new job starts; running ones have ``stopGrace`` to end.
2. What still runs is cancelled and has ``undoGrace`` to remove what it made.
3. Streams have ended by now with the last record of their run; the listeners close.

The API answers until step 3, so that somebody can look and cancel.  A second signal skips the
waiting: runs are cancelled at once and get a few seconds for their undo, for which sessions
on pools and remotes stay open; what has not ended then is left to the next start, which finds
it in the journal.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from proxy import __version__
from proxy.config.durable import make_private_directory
from proxy.errors import Busy, Refused, from_os_error
from proxy.jobs import open_services
from proxy.listening import drop_privileges, give_to_user, open_all
from proxy.remotes.mounts import mounts
from proxy.rpc import create_app, serve
from proxy.rpc.methods import standard
from proxy.systemd import Notifier
from proxy.tasks import JournalLimits, open_tasks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import TextIO

    from proxy.config import Config
    from proxy.config.live import LiveConfig
    from proxy.jobs import Services
    from proxy.listening import Bound

FORCED_AFTER = 5.0
"""Seconds between the second signal and the end, whatever happens."""
LAST_BYTES = 5.0
"""Seconds for clients to read the end of their answers when all work is done."""

_log = structlog.get_logger("proxy.daemon")


class Orders:
    """How far the wish to stop has gone."""

    def __init__(self) -> None:
        self.stop = trio.Event()
        self.now = trio.Event()
        """A second signal came."""


async def run(
    live: LiveConfig,
    *,
    notifier: Notifier | None = None,
    out: TextIO | None = None,
) -> int:
    """Serve until a signal stops it; the process's exit code.

    Prints ``listening on <url>`` per listener to ``out`` (default: standard output) once
    calls are answered.  Raises the ``ProxyError`` that keeps it from starting.
    """
    notifier = notifier or Notifier()
    orders = Orders()
    async with trio.open_nursery() as root:
        await root.start(_obey_signals, live, orders, root, notifier)
        root.start_soon(notifier.keep_alive)
        await live.ensure_token()
        root.start_soon(live.watch)
        config = live.value
        # Held across all: a second daemon on the journal would call our tasks interrupted.
        with _own(config.datadir, config):
            bound = open_all(config)
            drop_privileges(config)
            try:
                await _serve(live, bound, orders, notifier, out or sys.stdout)
            finally:
                await mounts().aclose()
        root.cancel_scope.cancel("stopped")
    if orders.now.is_set():
        return 1
    _log.info("stopped")
    return 0


async def _serve(
    live: LiveConfig,
    bound: list[Bound],
    orders: Orders,
    notifier: Notifier,
    out: TextIO,
) -> None:
    kept = live.value.tasks
    limits = JournalLimits(kept.max_finished, kept.max_age, kept.keep_deleted)
    journal = str(live.value.datadir / "tasks.sqlite")
    async with trio.open_nursery() as nursery:
        async with (
            open_tasks(journal, nursery, limits) as tasks,
            open_services(lambda: live.value, tasks, nursery) as services,
        ):
            try:
                await _answer_until_stopped(live, services, bound, orders, notifier, out)
            finally:
                # Also after a crash or a second signal: the journal and the connections to
                # pools and remotes stay open until every run has undone what it did.
                services.stop_accepting()
                services.cancel_all("the daemon stops")
                with trio.CancelScope(shield=True):
                    await _idle_within(services, live.value.undo_grace, orders)
        nursery.cancel_scope.cancel("the daemon stops")


async def _answer_until_stopped(
    live: LiveConfig,
    services: Services,
    bound: list[Bound],
    orders: Orders,
    notifier: Notifier,
    out: TextIO,
) -> None:
    closing = trio.Event()
    app = create_app(services, standard(), live, lambda: live.value.api)
    async with trio.open_nursery() as server:
        await server.start(
            partial(
                serve,
                app,
                [each.listener for each in bound],
                settings=lambda: live.value.api,
                stopping=closing,
                now=orders.now,
                grace=LAST_BYTES,
            )
        )
        for each in bound:
            _announce(out, f"listening on {each.url}")
        _log.info("started", version=__version__, token_from=live.token_from)
        notifier.tell(READY=1, STATUS="serving")
        await orders.stop.wait()
        await _end_runs(services, live.value, orders, notifier)
        closing.set()


async def _end_runs(services: Services, config: Config, orders: Orders, notifier: Notifier) -> None:
    """Let running work end, then cancel it and wait for its undo."""
    services.stop_accepting()
    async with trio.open_nursery() as telling:
        telling.start_soon(notifier.ask_for_time, "waiting for running jobs")
        if not await _idle_within(services, config.stop_grace, orders):
            _log.warning("cancelling what still runs")
            services.cancel_all("the daemon stops")
            if not await _idle_within(services, config.undo_grace, orders):
                _log.error("some runs did not clean up in time", seconds=config.undo_grace)
        telling.cancel_scope.cancel("done")


async def _idle_within(services: Services, seconds: float, orders: Orders) -> bool:
    """Whether all runs end within ``seconds``; a second signal leaves them only a few."""
    hurried = orders.now.is_set()
    idle = False
    async with trio.open_nursery() as waiting:
        if not hurried:
            waiting.start_soon(_cancel_when, orders.now, waiting.cancel_scope)
        with trio.move_on_after(min(seconds, FORCED_AFTER - 1) if hurried else seconds):
            await services.wait_idle()
            idle = True
        waiting.cancel_scope.cancel("done")
    return idle


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel("second signal")


async def _obey_signals(
    live: LiveConfig,
    orders: Orders,
    root: trio.Nursery,
    notifier: Notifier,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        task_status.started()
        async for number in received:
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                _log.info("reloading the configuration", signal=name)
                root.start_soon(live.reload)  # a hung disk must not delay the next signal
            elif not orders.stop.is_set():
                _log.info("stopping; a second signal stops at once", signal=name)
                notifier.tell(STOPPING=1, STATUS="stopping")
                config = live.value
                _exit_after(config.stop_grace + config.undo_grace + 2 * LAST_BYTES)
                orders.stop.set()
            else:
                _log.warning("stopping at once", signal=name)
                _exit_after(FORCED_AFTER)
                orders.now.set()


def _exit_after(seconds: float) -> None:
    """End the process by then whatever hangs, such as a thread in a dead NFS mount."""
    if not math.isfinite(seconds):
        return
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _announce(out: TextIO, line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens to us: serve all the same
        print(line, file=out, flush=True)


@contextlib.contextmanager
def _own(datadir: Path, config: Config) -> Iterator[None]:
    """Make the data directory and hold its lock; the lock ends with the process."""
    try:
        fresh = not datadir.exists()
        make_private_directory(datadir)
        if fresh:
            give_to_user(config, datadir)
        descriptor = os.open(datadir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_os_error(error, "preparing the datadir", str(datadir)) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Busy(
                f"another xo-proxy uses {datadir}: stop it, or set another datadir"
            ) from error
        yield
    finally:
        os.close(descriptor)


def refuse_optimised() -> None:
    """Raise ``Refused`` under ``python -O``, which drops the checks of invariants."""
    if not __debug__:
        raise Refused("python -O drops assertions that protect backups: start without it")
