"""Tasks that serve one block of code and end with it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled and waited for when the block ends.

    What the block raises comes out as it is, where a plain nursery would wrap it in a group,
    which no ``except Corrupt`` sees.  The tasks must keep their own errors: one that a task
    raises is in a group.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as error:  # noqa: BLE001 (raised below)
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
