"""What a sweep says: of a run, whether it is dead; of each thing, why it went or stayed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.errors import ProxyError

    Fates = Callable[[str], Awaitable["Fate"]]
    """Of a run, by its id."""

    Entry = dict[str, str]
    """``type``, ``uuid`` or ``path``, ``name``, ``run`` where it is known, ``reason``."""


class Fate(StrEnum):
    """What became of a run; the value says why something of it stays.

    A run ended well when every attempt in it did: one that had to try again may have left what its
    first attempt could not undo, and counts as dead.
    """

    DEAD = "its run ended, and not well"
    LIVE = "its run is at work"
    WELL = "its run ended well, so that it is finished"
    UNKNOWN = "no run that this daemon remembers made it"


@dataclass(slots=True)
class Report:
    """The outcome of one sweep of one pool or remote."""

    swept: list[Entry] = field(default_factory=list["Entry"])
    """What was removed or undone, in a dry run what would be."""
    left: list[Entry] = field(default_factory=list["Entry"])
    """What looks as if it were to be swept, and why it was not."""
    errors: list[ProxyError] = field(default_factory=list["ProxyError"])
    """Why something that is to go is still there."""

    def failed(self, entry: Entry, error: ProxyError) -> None:
        self.errors.append(error)
        self.left.append({**entry, "reason": f"{entry['reason']}; it failed: {error.message}"})

    def as_data(self) -> dict[str, list[Entry]]:
        return {"swept": self.swept, "left": self.left}
