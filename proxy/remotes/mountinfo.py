"""What is mounted where, as ``/proc/self/mountinfo`` tells.  No I/O but :func:`mounted_at`.

Reading it asks no server, so it answers also when a mount hangs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.remotes.mount_command import MountRequest

FILE_SYSTEMS: Final[dict[str, tuple[str, ...]]] = {
    "nfs": ("nfs", "nfs4"),
    "cifs": ("cifs", "smb3"),
}
"""How the kernel calls what was mounted as that type."""
_OPPOSITE: Final = {"ro": "rw", "rw": "ro", "soft": "hard", "hard": "soft"}
_SAME_NAME: Final = {"nfsvers": "vers", "workgroup": "domain", "dom": "domain"}


@dataclass(frozen=True, slots=True)
class Mounted:
    """``id`` names the mount as long as it exists; ``options`` are those of the file system
    and of the mount together."""

    id: int
    directory: str
    type: str
    source: str
    options: tuple[str, ...]


def parse(text: str) -> Iterator[Mounted]:
    """In the order of the kernel: of several at one place the last is seen (proc(5))."""
    for line in text.splitlines():
        head, separator, tail = line.partition(" - ")
        fields, rest = head.split(" "), tail.split(" ")
        if not separator or len(fields) < 6 or len(rest) < 3 or not fields[0].isdigit():
            continue
        yield Mounted(
            id=int(fields[0]),
            directory=_decoded(fields[4]),
            type=rest[0],
            source=_decoded(rest[1]),
            options=tuple(f"{fields[5]},{' '.join(rest[2:])}".split(",")),
        )


def _decoded(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8) & 0xFF), text)


def mounted_at(directory: str) -> Mounted | None:
    """The mount that is seen at ``directory``, an absolute path without links."""
    text = Path("/proc/self/mountinfo").read_bytes().decode("latin-1")
    place = directory.encode().decode("latin-1")
    found = [mounted for mounted in parse(text) if mounted.directory == place]
    return found[-1] if found else None


def mount_id_of(descriptor: int) -> int | None:
    """The mount on which an open file lies; ``None`` where the kernel does not tell."""
    text = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
    match = re.search(r"^mnt_id:\s*(\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else None


def serves(mounted: Mounted, request: MountRequest) -> bool:
    """Whether ``mounted`` is what ``request`` would mount, as far as the kernel tells.

    Options that it shows must not contradict; many it does not show, or shows resolved
    (``vers=4`` as ``vers=4.2``).
    """
    if mounted.type not in FILE_SYSTEMS[request.type]:
        return False
    if _place(mounted.source) != _place(request.device):
        return False
    shown = dict(_pairs(mounted.options))
    for name, value in _pairs(request.options.split(",")):
        if value is None:
            if _OPPOSITE.get(name) in shown:
                return False
        elif shown.get(name, value) not in (value, None):
            seen = shown[name] or ""
            if name != "vers" or not seen.startswith(f"{value}."):
                return False
    return True


def _place(device: str) -> str:
    return re.sub(r"[\\/]+", "/", device).rstrip("/")


def _pairs(options: tuple[str, ...] | list[str]) -> Iterator[tuple[str, str | None]]:
    for option in options:
        name, equals, value = option.partition("=")
        yield _SAME_NAME.get(name, name), value if equals else None
