"""Named deadlines: a wait that ends says which one it was and how long it lasted."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from proxy.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def deadline(name: str, seconds: float) -> Iterator[trio.CancelScope]:
    """Bound the block in total time; raises ``Unreachable`` (``ETIMEDOUT``) naming itself.

    ``seconds`` of 0 or infinity means no bound.  A cancel from outside passes through.
    """
    with trio.CancelScope() as scope:
        if seconds > 0:
            scope.deadline = trio.current_time() + seconds
        yield scope
    if scope.cancelled_caught:
        raise _expired(name, seconds)


@contextlib.contextmanager
def time_limit(name: str, seconds: float, *, left: float | None = None) -> Iterator[None]:
    """As :func:`deadline`, for a limit of a user's on work that goes on as it should.

    The error says that the limit of ``seconds`` is over, also where only what is ``left`` of it
    bounds this block.
    """
    with trio.CancelScope() as scope:
        if seconds > 0:
            scope.deadline = trio.current_time() + (seconds if left is None else max(0.0, left))
        yield
    if scope.cancelled_caught:
        raise Unreachable(
            f"{name} of {seconds:g} s is over",
            code="ETIMEDOUT",
            data={"deadline": name, "seconds": float(seconds)},
        )


class Inactivity:
    """Bounds the time between two signs of life, not the whole (see :func:`inactivity`)."""

    def __init__(self, scope: trio.CancelScope, seconds: float) -> None:
        self._scope = scope
        self._seconds = seconds
        self.touch()

    def touch(self) -> None:
        """Something moved: start counting again."""
        if self._seconds > 0:
            self._scope.deadline = trio.current_time() + self._seconds


@contextlib.contextmanager
def inactivity(name: str, seconds: float) -> Iterator[Inactivity]:
    """Give up when the block is silent for ``seconds`` (0: never)."""
    with trio.CancelScope() as scope:
        yield Inactivity(scope, seconds)
    if scope.cancelled_caught:
        raise _expired(name, seconds)


def _expired(name: str, seconds: float) -> Unreachable:
    return Unreachable(
        f"{name}: nothing happened for {seconds:g} s",
        code="ETIMEDOUT",
        data={"deadline": name, "seconds": float(seconds)},  # JSON knows no kinds of numbers
    )


@contextlib.contextmanager
def undo_within(name: str, seconds: float) -> Iterator[None]:
    """Run the block to its end even when the task is cancelled, but not longer than ``seconds``."""
    with trio.CancelScope(shield=True), deadline(name, seconds):
        yield
