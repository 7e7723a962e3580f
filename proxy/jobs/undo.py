"""Undo steps of a run: they run to their end, bounded, and a failing one is told."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

UNDO_SECONDS: Final = 600.0
"""What one step of :class:`Undo` may take: destroying the disks of a large VM."""


@contextlib.asynccontextmanager
async def undo_step(name: str, seconds: float) -> AsyncIterator[None]:
    """The block undoes something: shielded from cancel, at most ``seconds`` long.

    Its failure is told in the task's log (see :mod:`proxy.runtime.trouble`) and does not
    replace the error that made the undo necessary.
    """
    try:
        with undo_within(name, seconds):
            yield
    except Exception as error:  # noqa: BLE001  told; the run's own error goes on
        tell_trouble(f"could not {name}", error)


class Undo:
    """What is to be undone should the work fail, noted where each thing is made."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], Awaitable[object]]]] = []

    def add(self, name: str, action: Callable[[], Awaitable[object]]) -> None:
        """``action`` undoes one thing, whether it came to be or not; ``name`` is for the log."""
        self._steps.append((name, action))

    def keep(self) -> None:
        """The work is done and stays: nothing noted so far will be undone."""
        self._steps.clear()

    async def run(self) -> None:
        """Undo all, the last first, each step by itself; never raises."""
        while self._steps:
            name, action = self._steps.pop()
            async with undo_step(name, UNDO_SECONDS):
                await action()


@contextlib.asynccontextmanager
async def undone_on_failure() -> AsyncIterator[Undo]:
    """Undo what the block noted when it fails or is cancelled."""
    undo = Undo()
    try:
        yield undo
    except BaseException:
        await undo.run()
        raise
