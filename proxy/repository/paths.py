"""Names and paths of VM backups on a remote.

``xo-vm-backups/<vm>/<TS>.json`` and its neighbours, where ``<TS>`` is a UTC date with
seconds.  Everything that a client or a metadata file names is checked here before it is
used: what does not have the exact shape never reaches the storage.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from proxy.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = "/xo-vm-backups"
"""Where VM backups live; ids given to clients start with it, slash included."""
CACHE_NAME = "cache.json.gz"
DISKS_NAME = "vdis"

DATE_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_SAFE_SEGMENT = re.compile(r"[^/\x00-\x1f\x7f]{1,255}")


def date_name(timestamp_ms: float) -> str:
    """``20261124T015901Z`` of a time in milliseconds since the epoch; milliseconds dropped."""
    try:
        moment = datetime.fromtimestamp(timestamp_ms // 1000, UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise Refused(
            f"{timestamp_ms} is not a time in milliseconds since 1970", code="EINVAL"
        ) from error
    return f"{moment:%Y%m%dT%H%M%SZ}".rjust(16, "0")


def timestamp_of(name: str) -> int | None:
    """Milliseconds since the epoch of a name that starts with a date name, else ``None``."""
    match = DATE_NAME.match(name)
    if match is None:
        return None
    try:
        moment = datetime.strptime(match[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None
    return int(moment.timestamp()) * 1000


def is_vm_name(name: str) -> bool:
    """Whether a name in :data:`ROOT` can be a VM directory.

    Names that start with ``.`` (queue, lock notes) or end with ``.lock`` are not; the rest
    is taken as a VM uuid without looking at its form, as Xen Orchestra does.
    """
    return (
        _SAFE_SEGMENT.fullmatch(name) is not None
        and not name.startswith(".")
        and not name.endswith(".lock")
    )


def vm_directory(vm_uuid: str) -> str:
    """``/xo-vm-backups/<vm>``; ``Refused`` when the uuid is not one safe path segment."""
    if not is_vm_name(vm_uuid):
        raise Refused(f"{vm_uuid!r} cannot be the id of a VM", code="EINVAL")
    return f"{ROOT}/{vm_uuid}"


def is_metadata_name(name: str) -> bool:
    """Whether a name in a VM directory is read as backup metadata."""
    return name.endswith(".json") and not name.startswith(".")


def backup_path(filename: str) -> str:
    """The normalised id ``/xo-vm-backups/<vm>/<TS>.json`` of a client's ``filename``.

    A missing leading slash is added.  Nothing else is repaired: any other shape, so also
    every ``..``, is ``Refused`` (``EINVAL``).
    """
    parts = filename.removeprefix("/").split("/")
    if (
        len(parts) != 3
        or parts[0] != ROOT[1:]
        or not is_vm_name(parts[1])
        or not parts[2].endswith(".json")
        or DATE_NAME.fullmatch(parts[2].removesuffix(".json")) is None
    ):
        raise Refused(
            f"{filename[:300]!r} is not the id of a VM backup: "
            "/xo-vm-backups/<VM uuid>/<YYYYMMDDTHHMMSSZ>.json is expected",
            code="EINVAL",
        )
    return "/" + "/".join(parts)


def split_backup_path(path: str) -> tuple[str, str]:
    """``(vm, name)`` of a normalised backup path."""
    _, _, vm, name = path.split("/")
    return vm, name


def disk_directory(vm_uuid: str, job_id: str, disk_uuid: str) -> str:
    """Where the chain of one disk is: ``/xo-vm-backups/<vm>/vdis/<job>/<disk>``.

    ``Refused`` when a part is not one safe path segment.
    """
    for part, what in ((job_id, "job"), (disk_uuid, "disk")):
        if _SAFE_SEGMENT.fullmatch(part) is None or part.startswith("."):
            raise Refused(f"{part[:100]!r} cannot be the id of a {what}", code="EINVAL")
    return f"{vm_directory(vm_uuid)}/{DISKS_NAME}/{job_id}/{disk_uuid}"


def disk_path(backup_id: str, relative: str) -> str | None:
    """The disk that the metadata ``backup_id`` names; ``None`` when that is no disk of its VM.

    Always ``vdis/<job>/<disk>/<TS>[.alias].vhd``.  A field that points elsewhere is not
    followed: the metadata may come from anybody.
    """
    parts = relative.removeprefix("./").split("/")
    if len(parts) != 4 or parts[0] != DISKS_NAME or not parts[3].endswith(".vhd"):
        return None
    if any(_SAFE_SEGMENT.fullmatch(part) is None or part.startswith(".") for part in parts):
        return None
    return f"{backup_id.rpartition('/')[0]}/{'/'.join(parts)}"


def xva_name(metadata: Mapping[str, object] | str | None) -> str | None:
    """The file name that a full backup's ``xva`` field means, ``None`` when it means none.

    Always ``./<TS>.xva`` today.  Only a plain name ending in ``.xva`` is accepted: a field
    that points out of the VM directory is not followed.
    """
    value = metadata if isinstance(metadata, str) else (metadata or {}).get("xva")
    if not isinstance(value, str):
        return None
    name = value.removeprefix("./")
    if _SAFE_SEGMENT.fullmatch(name) is None or name.startswith(".") or not name.endswith(".xva"):
        return None
    return name
