"""The listing cache of a VM directory, ``cache.json.gz``.

A gzipped JSON object, shared with Xen Orchestra: key ``/xo-vm-backups/<vm>/<TS>.json``,
value the whole metadata plus ``_filename`` and ``id``, both equal to the key.

The cache only saves time.  It is believed for what the directory listing confirms: a name
that is gone is dropped, a name that is new is read.  A cache that cannot be read or
written never fails the operation that needed it.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from proxy.errors import Corrupt, NotFound, ProxyError
from proxy.repository.metadata import LIMIT, Backup, decode_backup, located
from proxy.repository.paths import CACHE_NAME, is_metadata_name, vm_directory
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from proxy.remotes.interface import Remote

_log = structlog.get_logger(__name__)

_LARGEST = 64 * 1024 * 1024
"""Bytes of an unpacked cache: 6,000 to 12,000 backups of one VM.  A larger one is neither
written nor believed, so that the memory of a listing does not depend on the storage."""
_USUAL = 256 * 1024
"""Bytes up to which metadata files are read many at once; larger ones go one by one."""
_BATCH = 128
"""Metadata files read in one go."""

_entries = msgspec.json.Decoder(dict[str, msgspec.Raw])
_backups = msgspec.json.Decoder(dict[str, Backup])


class _Gate:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.users = 0


_gates: trio.lowlevel.RunVar[dict[tuple[str, str], _Gate]] = trio.lowlevel.RunVar("cache gates")


@contextlib.asynccontextmanager
async def _updating(remote: Remote, vm_uuid: str) -> AsyncIterator[None]:
    """One update of a cache at a time, whatever object stands for the remote."""
    try:
        gates = _gates.get()
    except LookupError:
        gates = dict[tuple[str, str], _Gate]()
        _gates.set(gates)
    key = (remote.url, vm_uuid)
    gate = gates.setdefault(key, _Gate())
    gate.users += 1
    try:
        async with gate.lock:
            yield
    finally:
        gate.users -= 1
        if gate.users == 0:
            del gates[key]


def _unpack(packed: bytes) -> bytes:
    """Blocking.  ``ValueError`` when it is no gzip, cut, or larger than a cache can be."""
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        data = inflater.decompress(packed, _LARGEST)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflater.eof:
        raise ValueError("the compressed data is cut or too large")
    return data


def _pack(entries: Mapping[str, msgspec.Raw]) -> bytes:
    """Blocking.  Level 1: a listing waits for this, and the content is very repetitive."""
    return gzip.compress(msgspec.json.encode(entries), compresslevel=1, mtime=0)


def entry_of(path: str, raw: bytes, *, is_immutable: bool | None = None) -> msgspec.Raw:
    """The cache's value for the metadata file ``path`` with the content ``raw``.

    The fields are appended to the text, so that the rest stays as it is in the file.
    """
    extra: dict[str, object] = {}
    if is_immutable is not None:
        extra["isImmutable"] = is_immutable
    extra |= {"_filename": path, "id": path}
    body = raw.rstrip()
    if not body.endswith(b"}"):
        raise ValueError("not a JSON object")
    body = body[:-1].rstrip()
    separator = b"" if body.endswith(b"{") else b","
    return msgspec.Raw(body + separator + msgspec.json.encode(extra)[1:])


class Directory:
    """What one look at a VM directory found."""

    __slots__ = ("backups", "names", "unreadable")

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.backups: list[Backup] = []
        self.unreadable: dict[str, ProxyError] = {}
        """Metadata names that exist and cannot be used, with the reason."""


async def _metadata_paths(remote: Remote, directory: str) -> tuple[list[str], list[str]] | None:
    """``(all names, paths of metadata files)``; ``None`` when there is no such directory."""
    try:
        entries = await remote.list(directory)
    except NotFound:
        return None
    names = [entry.name for entry in entries]
    paths = [
        f"{directory}/{entry.name}"
        for entry in entries
        if not entry.is_dir and is_metadata_name(entry.name)
    ]
    return names, paths


async def _read_packed(remote: Remote, path: str) -> bytes | None:
    """The unpacked JSON of the cache, ``None`` when there is none that can be used."""
    try:
        packed = await remote.read_file(path, limit=_LARGEST)
        return await in_thread(Work.CPU, _unpack, packed)
    except NotFound:
        return None
    except (ProxyError, ValueError) as error:
        _log.warning("the listing cache cannot be read and is made anew", path=path, error=error)
        return None


async def read_directory(remote: Remote, vm_uuid: str, *, use_cache: bool = True) -> Directory:
    """Every backup of ``vm_uuid`` that the directory holds now, ordered by timestamp.

    Heals the cache on the way when it does not say what the directory says.  A metadata
    file that cannot be read is in ``unreadable`` and logged; it is never removed.  An error
    of the directory itself passes through, except that a missing one is empty.
    """
    directory = vm_directory(vm_uuid)
    listed = await _metadata_paths(remote, directory)
    if listed is None:
        return Directory([])
    names, paths = listed
    if remote.is_immutable or not use_cache:
        found = Directory(names)
        await _read_missing(remote, paths, found)
    else:
        cached = await _from_cache(remote, directory, names, paths)
        if cached is None:
            found = await refresh_cache(remote, vm_uuid)
        else:
            found = Directory(names)
            found.backups = cached
    found.backups.sort(key=lambda backup: (backup.timestamp, backup.id))
    return found


async def _from_cache(
    remote: Remote, directory: str, names: Sequence[str], paths: Sequence[str]
) -> list[Backup] | None:
    """The cached backups when they are exactly those of the directory, else ``None``."""
    if CACHE_NAME not in names:
        return None
    data = await _read_packed(remote, f"{directory}/{CACHE_NAME}")
    if data is None:
        return None
    try:
        backups = _backups.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # One odd entry: the careful way decodes each alone and keeps the others.
        return None
    if backups.keys() != set(paths):
        return None
    return [located(backup, path) for path, backup in backups.items()]


async def refresh_cache(
    remote: Remote, vm_uuid: str, changed: Mapping[str, bytes] | None = None
) -> Directory:
    """Make the cache say what the directory says; returns what that is.

    ``changed`` gives the new content of metadata files just written, by path.  Called after
    each write and each removal.  Updates of one directory wait for each other.  A failed
    write of the cache is logged and leaves the old one, which the next listing corrects.
    """
    directory = vm_directory(vm_uuid)
    cache_path = f"{directory}/{CACHE_NAME}"
    async with _updating(remote, vm_uuid):
        listed = await _metadata_paths(remote, directory)
        if listed is None:
            return Directory([])
        names, paths = listed
        found = Directory(names)
        if remote.is_immutable:
            await _read_missing(remote, paths, found)
            return found
        before = await _cached_entries(remote, cache_path) if CACHE_NAME in names else None
        entries: dict[str, msgspec.Raw] = {}
        for path, raw in (changed or {}).items():
            if path in paths:
                entries[path] = entry_of(path, raw)
        for path in paths:
            if path not in entries and before is not None and path in before:
                entries[path] = before[path]
        missing = _decode_entries(entries, paths, found)
        room = _LARGEST - sum(map(_size, entries.values()))
        for path, raw in (await _read_missing(remote, missing, found, keep=room)).items():
            entries[path] = entry_of(path, raw, is_immutable=False)
        ordered = {path: entries[path] for path in paths if path in entries}
        if sum(map(_size, ordered.values())) > _LARGEST or len(ordered) < len(found.backups):
            _log.warning("too many backups for a listing cache", path=cache_path)
        elif before != ordered and (ordered or CACHE_NAME in names):
            await _write(remote, cache_path, ordered)
        return found


def _decode_entries(
    entries: dict[str, msgspec.Raw], paths: Iterable[str], found: Directory
) -> list[str]:
    """Decode what is known; the paths to read are returned, bad entries among them."""
    missing: list[str] = []
    for path in paths:
        if path not in entries:
            missing.append(path)
            continue
        try:
            found.backups.append(decode_backup(entries[path], path))
        except ProxyError:
            del entries[path]
            missing.append(path)
    return missing


async def cached_count(remote: Remote, vm_uuid: str) -> int | None:
    """How many backups the cache speaks of; ``None`` when there is no usable cache."""
    entries = await _cached_entries(remote, f"{vm_directory(vm_uuid)}/{CACHE_NAME}")
    return None if entries is None else len(entries)


async def _cached_entries(remote: Remote, path: str) -> dict[str, msgspec.Raw] | None:
    data = await _read_packed(remote, path)
    if data is None:
        return None
    try:
        return _entries.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        _log.warning("the listing cache is damaged and is made anew", path=path, error=error)
        return None


def _size(entry: msgspec.Raw) -> int:
    return memoryview(entry).nbytes


async def _read_missing(
    remote: Remote, paths: Sequence[str], found: Directory, *, keep: int = 0
) -> dict[str, bytes]:
    """Read and decode metadata files into ``found``; their contents up to ``keep`` bytes."""
    kept: dict[str, bytes] = {}
    for start in range(0, len(paths), _BATCH):
        batch = paths[start : start + _BATCH]
        contents = await remote.read_files(batch, limit=_USUAL)
        for path, content in zip(batch, contents, strict=True):
            try:
                raw = await _whole(remote, path, content)
                backup = decode_backup(raw, path)
            except NotFound:
                continue  # removed since the directory was listed
            except ProxyError as error:
                _log.warning("a backup is not listed", path=path, error=error.message)
                found.unreadable[path.rpartition("/")[2]] = error
            else:
                found.backups.append(msgspec.structs.replace(backup, is_immutable=False))
                keep -= len(raw)
                if keep >= 0:
                    kept[path] = raw
    return kept


async def _whole(remote: Remote, path: str, content: bytes | ProxyError) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, Corrupt):  # larger than usual
        return await remote.read_file(path, limit=LIMIT)
    raise content


async def _write(remote: Remote, path: str, entries: Mapping[str, msgspec.Raw]) -> None:
    try:
        await remote.write_file(path, await in_thread(Work.CPU, _pack, entries))
    except ProxyError as error:
        _log.warning("the listing cache cannot be written", path=path, error=error.message)
