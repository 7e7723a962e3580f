"""What a task's status is, given its own outcome and its children's (promise I5)."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Status(enum.StrEnum):
    """The words of ``task.get`` and ``event.from``."""

    PENDING = "pending"
    SUCCESS = "success"
    SKIPPED = "skipped"
    INTERRUPTED = "interrupted"
    CANCELED = "canceled"
    FAILURE = "failure"


_BADNESS = {
    Status.SUCCESS: 0,
    Status.SKIPPED: 1,
    Status.INTERRUPTED: 2,
    Status.CANCELED: 3,
    Status.FAILURE: 4,
}

SKIPPED_MESSAGES = frozenset({"no disks found", "no VMs match this pattern", "unhealthy VDI chain"})
"""A failure with exactly one of these messages is what XO shows as skipped."""


def worst(own: Status, children: Iterable[Status]) -> Status:
    """Status of a *finished* task; a child still pending counts as interrupted."""
    found = own
    for status in children:
        known = Status.INTERRUPTED if status is Status.PENDING else status
        if _BADNESS[known] > _BADNESS[found]:
            found = known
    return found
