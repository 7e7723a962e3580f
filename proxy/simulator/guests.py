"""What runs inside the VMs: the test that a guest does of itself after it has booted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE = "vm-data/xo-backup-health-check"
ERROR = f"{STATE}-error"


@dataclass(frozen=True, slots=True)
class GuestScript:
    """A guest's test: runs at a boot that finds ``planned`` in its part of xenstore."""

    answer: Literal["success", "failure"] | None = "success"
    """What it writes at its end; ``None``: it never ends."""
    error: str = ""
    """Its explanation of a failure."""
    seconds: float = 0.0
    """From ``running`` to its answer."""

    def steps(self) -> Iterator[tuple[float, dict[str, str]]]:
        """How long it waits, and then what it writes."""
        yield 0.0, {STATE: "running"}
        if self.answer is not None:
            told = {ERROR: self.error} if self.error else {}
            yield self.seconds, {**told, STATE: self.answer}
