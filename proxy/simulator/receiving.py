"""Images that come in pieces of any size, read by generators that ask for what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Generator

Wanted = memoryview | int
"""Memory to fill, or how many bytes to skip."""


class SteppedReceiver:
    """Takes a stream apart by :meth:`steps`, which a format writes."""

    def __init__(self) -> None:
        self._position = 0
        self._steps = self.steps()
        self._wanted: Wanted | None = next(self._steps)

    def steps(self) -> Generator[Wanted]:
        """What is wanted, in the order of the stream; raises ``Corrupt``."""
        raise NotImplementedError

    def feed(self, data: bytes) -> None:
        view = memoryview(data)
        while view and self._wanted is not None:
            wanted = self._wanted
            if isinstance(wanted, int):
                taken = min(len(view), wanted)
                left: Wanted = wanted - taken
            else:
                taken = min(len(view), len(wanted))
                wanted[:taken] = view[:taken]
                left = wanted[taken:]
            self._position += taken
            view = view[taken:]
            self._wanted = left or self._next()

    def _next(self) -> Wanted | None:
        """What to fill or to skip next; None after the end."""
        for wanted in self._steps:
            if wanted:
                return wanted
        return None

    def finish(self) -> None:
        if self._wanted is not None:
            raise Corrupt(f"the stream ends at byte {self._position}")

    def gap(self, to: int) -> int:
        """Bytes to skip to that place."""
        if to < self._position:
            raise Corrupt(f"byte {to} is wanted when byte {self._position} was read")
        return to - self._position
