"""What a merge has done so far: the file ``.<oldest disk>.merge.json`` beside the disks.

Shared with Xen Orchestra, of today and of the years before: either side reads, resumes and
finishes what the other one began.  While the file exists its chain is one disk in the making,
and whoever reads the chain reads through it (:mod:`proxy.disks.opening`).

Names in a state are names of the directory that it lies in; anything else is ``Corrupt``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import UUID

import msgspec

from proxy.errors import Corrupt, ProxyError
from proxy.remotes import paths

if TYPE_CHECKING:
    from collections.abc import Iterable

    from proxy.remotes.interface import Remote

LIMIT: Final = 1024 * 1024
"""Bytes of the largest state that is read: a chain of thousands of disks."""

CUT: Final = "merge state cut"
"""``data["what"]`` of a state that a crash of its writer cut: Xen Orchestra writes it in place."""

_NAME = re.compile(r"\.(.+)\.merge\.json")


class Step(StrEnum):
    """How far a merge is."""

    BLOCKS = "mergeBlocks"
    """Blocks are moved into the oldest disk; everything is still needed."""
    CLEANUP = "cleanup"
    """The oldest disk has it all; it takes the newest one's name and the others go."""


_STEPS: Final = {
    "mergeBlocks": Step.BLOCKS,
    "cleanup": Step.CLEANUP,
    "cleanupVhds": Step.CLEANUP,  # until 2026
}


class Phase(Enum):
    """Where an interrupted merge goes on: what the disks show, whatever the step says."""

    BLOCKS = "blocks"
    """Move what is not yet moved; then as the next."""
    RENAME = "rename"
    """The oldest disk has everything: give it the newest one's name; then as the next."""
    REST = "rest"
    """It has the name: remove the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeState:
    """``chain`` holds the names of the disks, oldest first; ``None`` in very old states."""

    chain: tuple[str, ...] | None
    step: Step = Step.BLOCKS
    next_block: int = 0
    """Blocks with a lower index are in the oldest disk; this one and later ones may be."""
    merged_size: int = 0
    """Bytes of the blocks moved so far."""
    final_size: int = 0
    """Bytes of the merged disk as a VHD stream, once known."""
    child_uuid: UUID | None = None
    """Of the newest disk: the merged disk's uuid as soon as its footer is written."""
    parent_uuid: UUID | None = None
    """Of the oldest disk, before."""

    def encode(self) -> bytes:
        """As Xen Orchestra writes it."""
        record: dict[str, Any] = {}
        if self.child_uuid is not None:
            record["child"] = {"uuid": str(self.child_uuid)}
        if self.parent_uuid is not None:
            record["parent"] = {"uuid": str(self.parent_uuid)}
        if self.chain is not None:
            record["chain"] = list(self.chain)
        record |= {
            "currentBlock": self.next_block,
            "mergedDataSize": self.merged_size,
            "step": self.step.value,
            "diskSize": self.final_size,
        }
        return msgspec.json.encode(record)

    @classmethod
    def parse(cls, data: bytes, path: str) -> MergeState:
        """``Corrupt`` unless it is a state whose step and chain we know."""
        try:
            value = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _corrupt(path, f"it is not valid JSON ({error})", what=CUT) from error
        if not isinstance(value, dict):
            raise _corrupt(path, "it is not a JSON object")
        record = cast("dict[str, Any]", value)
        written = record.get("step", Step.BLOCKS.value)
        step = _STEPS.get(written) if isinstance(written, str) else None
        if step is None:
            raise _corrupt(path, f"its step {written!r} is unknown")
        return cls(
            chain=_chain(record.get("chain"), path),
            step=step,
            next_block=_count(record.get("currentBlock")),
            merged_size=_count(record.get("mergedDataSize")),
            final_size=_count(record.get("diskSize", record.get("vhdSize"))),
            child_uuid=_uuid(record.get("child")),
            parent_uuid=_uuid(record.get("parent")),
        )


def _corrupt(path: str, reason: str, *, what: str = "merge state") -> Corrupt:
    message = f"the merge state '{path}' cannot be used: {reason}"
    return Corrupt(message, data={"what": what, "path": path})


def _chain(value: Any, path: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    try:
        names = [name.removeprefix("./") for name in msgspec.convert(value, list[str])]
    except msgspec.ValidationError as error:
        raise _corrupt(path, "its chain is no list of names") from error
    for name in names:
        if not is_disk_name(name):
            raise _corrupt(path, f"its chain names {name!r}")
    if len(names) < 2 or len(set(names)) < len(names):
        raise _corrupt(path, "its chain is no list of two disks or more")
    if names[0] != disk_of_state(paths.name(path)):
        raise _corrupt(path, f"its chain begins with '{names[0]}'")
    return tuple(names)


def _count(value: Any) -> int:
    """Missing, null and negative counts are 0, as for Xen Orchestra."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return max(0, int(value))


def _uuid(value: Any) -> UUID | None:
    text = cast("dict[str, Any]", value).get("uuid") if isinstance(value, dict) else None
    try:
        return UUID(text) if isinstance(text, str) else None
    except ValueError:
        return None


def is_disk_name(name: str) -> bool:
    """Whether a name in a VDI directory is a disk: hidden ones are unfinished files."""
    return name.endswith(".vhd") and not name.startswith(".") and "/" not in name


def state_path(disk: str) -> str:
    """Where the state of a merge is whose oldest disk is ``disk``."""
    return paths.join(paths.parent(disk), f".{paths.name(disk)}.merge.json")


def disk_of_state(name: str) -> str | None:
    """The oldest disk's name, when ``name`` is that of a state."""
    match = _NAME.fullmatch(name)
    return match[1] if match is not None and is_disk_name(match[1]) else None


async def read_states(
    remote: Remote, directory: str, names: Iterable[str]
) -> dict[str, MergeState | ProxyError]:
    """The merges under way in ``directory``, of which ``names`` is the listing.

    By the oldest disk's path; of a state that cannot be read or used what is wrong with it,
    also ``NotFound`` when it has gone since the listing.
    """
    disks = [disk for name in sorted(names) if (disk := disk_of_state(name)) is not None]
    files = {paths.join(directory, disk): state_path(paths.join(directory, disk)) for disk in disks}
    contents = await remote.read_files(list(files.values()), limit=LIMIT) if files else ()
    return {
        disk: _parsed(content, path)
        for (disk, path), content in zip(files.items(), contents, strict=True)
    }


def _parsed(content: bytes | ProxyError, path: str) -> MergeState | ProxyError:
    try:
        return content if isinstance(content, ProxyError) else MergeState.parse(content, path)
    except Corrupt as error:
        return error


async def write_state(remote: Remote, disk: str, state: MergeState) -> None:
    """Atomic and durable on return."""
    await remote.write_file(state_path(disk), state.encode())


async def remove_state(remote: Remote, disk: str) -> None:
    await remote.unlink(state_path(disk))
