"""Backup metadata: ``<TS>.json`` and what listings say of it.

Two views of one file.  :class:`Backup` is the small one that listing, retention and
deletion need; thousands are held at once, so only its fields are decoded.
:class:`BackupRecord` is the whole content, read for one backup when it is restored.

Field names and their order are those of the files that Xen Orchestra writes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import msgspec

from proxy.errors import Corrupt
from proxy.repository.paths import timestamp_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from proxy.remotes.interface import Remote

LIMIT = 16 * 1024 * 1024
"""Bytes of the largest metadata file accepted; the usual ones have 5 to 50 kB."""


class VmSummary(msgspec.Struct, frozen=True):
    """What a listing shows of the VM; ``None`` where the file does not say."""

    uuid: str | None = None
    name_description: str | None = None
    name_label: str | None = None
    tags: list[str] | None = None


class _Snapshot(msgspec.Struct, frozen=True):
    suspend_VDI: str | None = None  # noqa: N815  # XAPI's name, read from the file


class _DiskSummary(msgspec.Struct, frozen=True):
    uuid: str | None = None
    name_label: str | None = None


class Backup(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One backup of one VM, as far as listing, retention and deletion need it.

    ``id`` is the path of its metadata with a leading slash.  ``timestamp`` is milliseconds
    since the epoch.  ``mode`` is ``full`` or ``delta``; anything else is kept and shown,
    and never deleted.
    """

    id: str = ""
    mode: str | None = None
    job_id: str | None = None
    schedule_id: str | None = None
    timestamp: int | float = 0
    size: int | float | None = None
    on_disk: int | float | None = None
    """Bytes on the remote where they differ from ``size``; Xen Orchestra reads it too."""
    tags: list[str] = []
    vm: VmSummary
    vm_snapshot: _Snapshot | None = None
    xva: str | None = None
    vhds: dict[str, str] | list[str] | None = None
    vdis: dict[str, _DiskSummary] | None = None
    is_vhd_differencing: dict[str, bool] | None = None
    is_immutable: bool | None = None
    """Known only where a listing found out; the field is then part of the answer."""

    @property
    def with_memory(self) -> bool:
        """Whether the memory of the VM is part of the backup."""
        return self.vm_snapshot is not None and self.vm_snapshot.suspend_VDI != "OpaqueRef:NULL"

    @property
    def bytes_on_disk(self) -> int:
        size = self.on_disk if self.on_disk is not None else self.size
        return int(size or 0)


class BackupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A backup with its whole metadata.

    ``metadata`` is every field of the file in the file's order, with the numeric booleans
    of XenServer before 7.1 made real ones; ``raw`` the bytes as stored.
    """

    backup: Backup
    metadata: dict[str, Any]
    raw: bytes


_strict = msgspec.json.Decoder(Backup)
_any = msgspec.json.Decoder()


def decode_backup(raw: bytes | memoryview | msgspec.Raw, path: str) -> Backup:
    """The small view of the metadata file ``path``.

    Tolerant: a field of an unexpected type counts as absent.  ``Corrupt`` when it is no
    JSON object or has no ``vm``.
    """
    try:
        backup = _strict.decode(raw)
    except msgspec.ValidationError:
        backup = _lenient(_object(raw, path), path)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(path, f"it is not valid JSON ({error})") from error
    return located(backup, path)


def located(backup: Backup, path: str) -> Backup:
    """``backup`` with its id, and the time of its name when the file has none."""
    timestamp = backup.timestamp or timestamp_of(path.rpartition("/")[2]) or 0
    return msgspec.structs.replace(backup, id=path, timestamp=timestamp)


def _object(raw: bytes | memoryview | msgspec.Raw, path: str) -> dict[str, Any]:
    try:
        value = _any.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(path, f"it is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise _corrupt(path, "it is not a JSON object")
    return cast("dict[str, Any]", value)


def _corrupt(path: str, reason: str) -> Corrupt:
    return Corrupt(f"the backup metadata '{path}' cannot be used: {reason}", data={"path": path})


def _lenient(value: Mapping[str, Any], path: str) -> Backup:
    """Keep each field that converts on its own, forget the others."""
    if not isinstance(value.get("vm"), dict):
        raise _corrupt(path, "it has no VM record")
    fields = _convertible(Backup, value)
    fields["vm"] = VmSummary(**_convertible(VmSummary, value["vm"]))
    snapshot = value.get("vmSnapshot")
    if isinstance(snapshot, dict):
        record = cast("dict[str, Any]", snapshot)
        fields["vm_snapshot"] = _Snapshot(**_convertible(_Snapshot, record))
    return Backup(**fields)


def _convertible(kind: type[msgspec.Struct], value: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if field.encode_name in value:
            with contextlib.suppress(msgspec.ValidationError):
                fields[field.name] = msgspec.convert(value[field.encode_name], field.type)
    return fields


async def read_backup(remote: Remote, path: str) -> BackupRecord:
    """Read the whole metadata of the backup ``path`` (see ``paths.backup_path``).

    ``NotFound`` when there is no such backup, ``Corrupt`` when its metadata is unusable.
    """
    raw = await remote.read_file(path, limit=LIMIT)
    metadata = _object(raw, path)
    backup = decode_backup(raw, path)
    _repair_booleans(metadata)
    return BackupRecord(backup=backup, metadata=metadata, raw=raw)


# XenServer before 7.1 gave booleans as 0 and 1 and old backups keep them that way.
_VM_BOOLEANS = ("is_a_template", "is_control_domain", "ha_always_run", "is_snapshot_from_vmpp")
_BOOLEANS = {
    "vbds": ("bootable", "unpluggable", "storage_lock", "empty", "currently_attached"),
    "vdis": (
        "sharable",
        "read_only",
        "storage_lock",
        "managed",
        "missing",
        "is_a_snapshot",
        "allow_caching",
        "metadata_latest",
    ),
    "vifs": ("currently_attached", "MAC_autogenerated"),
    "vm": (*_VM_BOOLEANS, "is_a_snapshot"),
    "vmSnapshot": _VM_BOOLEANS,
}


def _repair_booleans(metadata: dict[str, Any]) -> None:
    template = metadata["vm"].get("is_a_template")
    if isinstance(template, bool) or not isinstance(template, int | float):
        return
    for field, names in _BOOLEANS.items():
        for record in _records(metadata.get(field)):
            for name in names:
                value = record.get(name)
                if isinstance(value, int | float):
                    record[name] = value == 1


def _records(value: Any) -> Iterable[dict[str, Any]]:
    """``value`` itself when it is a record, its values when it is a collection by reference."""
    if not isinstance(value, dict):
        return []
    mapping = cast("dict[str, Any]", value)
    if any(key.startswith("OpaqueRef:") for key in mapping):
        return [
            cast("dict[str, Any]", record)
            for record in mapping.values()
            if isinstance(record, dict)
        ]
    return [mapping]


def encode_full(metadata: Mapping[str, Any], *, xva: str, size: int) -> bytes:
    """The content of ``<TS>.json`` of a full backup: compact, in the order of today's files.

    ``metadata`` brings ``jobId``, ``scheduleId``, ``timestamp`` (ms), ``vm`` and where there
    is one ``vmSnapshot``, and ``tags``; other fields are kept, at the end.  ``xva`` is the
    file's name, ``size`` its bytes before encryption.
    """
    record: dict[str, Any] = {
        "jobId": metadata["jobId"],
        "mode": "full",
        "scheduleId": metadata["scheduleId"],
        "timestamp": metadata["timestamp"],
        "version": "2.0.0",
        "vm": metadata["vm"],
    }
    if metadata.get("vmSnapshot") is not None:
        record["vmSnapshot"] = metadata["vmSnapshot"]
    record |= {"xva": f"./{xva}", "size": size, "tags": list(metadata.get("tags") or ())}
    record |= {
        key: value
        for key, value in metadata.items()
        if key not in record and key != "vmSnapshot"  # here: None, which the file leaves out
    }
    return msgspec.json.encode(record)


_DELTA_FIELDS = (
    "includeNonNbdQcow2Fix",
    "isVhdDifferencing",
    "jobId",
    "mode",
    "scheduleId",
    "timestamp",
    "vbds",
    "vdis",
    "version",
    "vifs",
    "vhds",
    "vm",
    "vmSnapshot",
    "vtpms",
    "tags",
    "size",
)


def encode_delta(metadata: Mapping[str, Any], *, vhds: Mapping[str, str], size: int) -> bytes:
    """The content of ``<TS>.json`` of an incremental backup, in the order of today's files.

    ``metadata`` brings every other field but ``mode`` and ``version``; a field that is ``None``
    is left out.  ``vhds`` gives each disk's path relative to the VM's directory by the
    reference of its VDI, ``size`` the sum of their bytes as VHD streams.
    """
    record = {**metadata, "mode": "delta", "version": "2.0.0", "vhds": dict(vhds), "size": size}
    known = {key: record[key] for key in _DELTA_FIELDS if record.get(key) is not None}
    more = {key: value for key, value in record.items() if key not in _DELTA_FIELDS}
    return msgspec.json.encode(known | more)


def with_disks(raw: bytes, *, size: int | None, differencing: Mapping[str, bool]) -> bytes:
    """The metadata file ``raw`` of a delta backup whose disks have been merged.

    ``size`` is the sum of all disks of the backup, ``None`` leaves it; ``differencing`` tells by
    the disk's reference which have a parent.  Everything else stays, in its order.
    """
    record = _object(raw, "")
    if size is not None:
        record["size"] = size
    known = record.get("isVhdDifferencing")
    merged = {**(cast("dict[str, Any]", known) if isinstance(known, dict) else {}), **differencing}
    if merged:
        record["isVhdDifferencing"] = merged
    return msgspec.json.encode(record)


def format_listing(backup: Backup, remote_id: str) -> dict[str, Any]:
    """One entry of ``backup.listVmBackups``: fields and order as Xen Orchestra expects.

    A disk without VDI record is shown without name and uuid instead of failing the list.
    """
    entry: dict[str, Any] = {
        "type": "xo-vm-backup",
        "backupRepository": remote_id,
        "disks": _disks(backup),
        "id": backup.id,
    }
    if backup.is_immutable is not None:
        entry["isImmutable"] = backup.is_immutable
    entry |= _present(
        jobId=backup.job_id,
        mode=backup.mode,
        scheduleId=backup.schedule_id,
        size=backup.size,
        timestamp=backup.timestamp,
        vm=_present(
            uuid=backup.vm.uuid,
            name_description=backup.vm.name_description,
            name_label=backup.vm.name_label,
            tags=backup.vm.tags,
        ),
    )
    entry["tags"] = backup.tags
    if backup.is_vhd_differencing is not None:
        differencing = sum(backup.is_vhd_differencing.values())
        entry["differencingVhds"] = differencing
        # The memory is stored as one more key disk, which is not shown as a disk.
        entry["dynamicVhds"] = (
            len(backup.is_vhd_differencing) - differencing - int(backup.with_memory)
        )
    entry["withMemory"] = backup.with_memory
    return entry


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _disks(backup: Backup) -> list[dict[str, Any]]:
    if backup.vhds is None:
        return []
    directory = backup.id.rpartition("/")[0]
    disks = backup.vdis or {}
    references: Iterable[tuple[str | None, str]]
    if isinstance(backup.vhds, dict):
        references = backup.vhds.items()
    else:
        references = ((None, path) for path in backup.vhds)
    result: list[dict[str, Any]] = []
    for reference, path in references:
        disk = disks.get(reference) if reference is not None else None
        entry: dict[str, Any] = {"id": f"{directory}/{path.removeprefix('./')}"}
        if disk is not None:
            entry |= _present(name=disk.name_label, uuid=disk.uuid)
        result.append(entry)
    return result
