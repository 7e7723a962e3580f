"""Tasks as the API answers them, read into types."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from proxy.errors import Canceled


class Reason(msgspec.Struct):
    """Of what a note says, if its data tell one."""

    reason: str = ""
    error: str = ""


class Note(msgspec.Struct):
    message: str = ""
    data: Any = None

    @property
    def text(self) -> str:
        known = Reason()
        # another daemon than ours may mean other things by the same words
        with contextlib.suppress(msgspec.ValidationError):
            known = msgspec.convert(self.data, Reason)
        return ": ".join(part for part in (self.message, known.reason or known.error) if part)


class Info(Note):
    @property
    def lines(self) -> list[str]:
        """For people: what a run did to each disk, or the message, with its reason."""
        if self.message == "vms":
            return []  # each has a task of its own
        if self.message == "disks":
            with contextlib.suppress(msgspec.ValidationError):
                return [disk.line for disk in msgspec.convert(self.data, Disks).disks]
        return [f"info: {self.text}"]


class Error(msgspec.Struct):
    """Its code is what the list of error codes explains."""

    message: str = ""
    code: str | int = ""

    @property
    def shown(self) -> str:
        code = str(self.code)
        told = code in self.message or code == Canceled.default_code  # the status says it
        return self.message if told else f"{self.message}; {code}"


class Step(msgspec.Struct):
    """A way to read a disk that did not work."""

    way: str
    code: str | int = ""


class Disk(msgspec.Struct):
    """How one disk was backed up."""

    disk: str
    wanted: str = ""
    got: str = ""
    via: str = ""
    reason: str = ""
    message: str = ""
    steps: list[Step] = []

    @property
    def line(self) -> str:
        kind = self.got or self.wanted
        parts = [f"disk {self.disk}: {kind}" + (f" over {self.via}" if self.via else "")]
        if kind == "full" and self.reason:
            parts.append(f"{self.reason} ({self.message})")
        parts += [f"not {step.way}: {step.code}" for step in self.steps]
        return ", ".join(parts)


class Disks(msgspec.Struct):
    disks: list[Disk]


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
    error: Error | None = None
    warnings: list[Note] = []
    infos: list[Info] = []

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
        return f"{line} ({self.data.error.shown})" if self.data.error else line
