"""Undo steps of a run: they run to their end, bounded, and a failing one is told."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


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
