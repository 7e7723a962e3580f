"""Tasks as the API answers them, read into types."""

from __future__ import annotations

from typing import Any

import msgspec


class Note(msgspec.Struct):
    message: str = ""


class Transferred(msgspec.Struct):
    """Bytes, bytes a second, seconds; what is unknown is absent."""

    done: int = 0
    total: int | None = None
    estimated: bool = False
    rate: int | None = None
    eta: int | None = None
    bottleneck: str | None = None


class TaskData(msgspec.Struct, rename="camel"):
    name: str = ""
    name_label: str | None = msgspec.field(default=None, name="name_label")
    job_name: str | None = None
    id: str | None = None
    progress: float = 0
    transfer: Transferred | None = None
    error: Note | None = None
    warnings: list[Note] = []

    @property
    def about(self) -> str:
        """What the task works on."""
        return self.name_label or self.job_name or self.id or ""


class TaskView(msgspec.Struct):
    id: str
    start: int
    status: str
    data: TaskData
    end: int | None = None
    tasks: list[TaskView] = []

    @classmethod
    def read(cls, value: Any) -> TaskView:
        return msgspec.convert(value, cls)

    @property
    def title(self) -> str:
        return " ".join(part for part in (self.data.name, self.data.about) if part)

    @property
    def duration(self) -> str:
        """How long it took; '' while it runs."""
        if self.end is None:
            return ""
        seconds = (self.end - self.start) / 1000
        if seconds < 60:
            return f"{seconds:.1f} s"
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

    @property
    def standing(self) -> str:
        """One line: what, and how it stands."""
        line = f"{self.title}: {self.status} {self.duration}".rstrip()
        if self.status == "pending" and self.data.transfer is not None:
            line += f" {self.data.progress:.0f} %"
        return line

    @property
    def summary(self) -> str:
        """One line: what, how it stands, why it failed."""
        line = self.standing
        return f"{line} ({self.data.error.message})" if self.data.error else line
