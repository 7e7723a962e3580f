"""Where an undo that failed is told.

An undo runs while another error or a cancel is on its way, which it must not replace.  What
goes wrong in it belongs into the log of the task it runs for, however deep in the house it
happens, and into the daemon's log.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

_log = structlog.get_logger("undo")

listener: ContextVar[Callable[[str, dict[str, Any]], None] | None] = ContextVar(
    "trouble", default=None
)
"""Set by a task for its own work and everything that it starts."""


def tell_trouble(message: str, error: BaseException, **data: Any) -> None:
    """Say that ``message`` (what could not be done) and why; never raises."""
    told = {**data, "error": str(error)}
    _log.error(message, **told)
    hear = listener.get()
    if hear is not None:
        hear(message, told)
