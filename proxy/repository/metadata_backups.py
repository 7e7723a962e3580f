"""Which backups of pools and of Xen Orchestra's configuration a remote holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec
import structlog

from proxy.errors import Corrupt, NotFound, ProxyError, Unreachable
from proxy.repository.metadata_backup_paths import (
    CONFIG_ROOT,
    METADATA_NAME,
    POOL_ROOT,
    is_folder_name,
)
from proxy.repository.paths import DATE_NAME, timestamp_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.remotes.interface import Remote

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_LIMIT = 16 * 1024 * 1024
"""Bytes of the largest metadata accepted; the usual ones have 2 to 10 kB."""
_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Dated:
    """The dated directories in one directory, by what stands in them."""

    complete: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Backups: the metadata by name."""
    unreadable: dict[str, ProxyError] = field(default_factory=dict[str, ProxyError])
    """There is metadata, or there may be, but it cannot be used."""
    incomplete: list[str] = field(default_factory=list[str])
    """Certainly without metadata: being written, or left by a run that died."""


async def read_dated(remote: Remote, directory: str) -> Dated:
    """What ``directory`` holds; nothing when it is missing.  Its own errors pass through."""
    names = [name for name in await folders(remote, directory) if DATE_NAME.fullmatch(name)]
    found = Dated()
    contents = await remote.read_files(
        [f"{directory}/{name}/{METADATA_NAME}" for name in names], limit=_LIMIT
    )
    for name, content in zip(names, contents, strict=True):
        if isinstance(content, bytes):
            try:
                found.complete[name] = _metadata(content, f"{directory}/{name}")
            except Corrupt as error:
                found.unreadable[name] = error
        elif isinstance(content, NotFound) and content.code == "ENOENT":
            found.incomplete.append(name)
        else:
            found.unreadable[name] = content
    return found


async def folders(remote: Remote, directory: str) -> list[str]:
    """The names of the directories in ``directory``, sorted; none when it is missing."""
    try:
        entries = await remote.list(directory)
    except NotFound as error:
        if error.code != "ENOENT":
            raise
        return []
    return [entry.name for entry in entries if entry.is_dir and is_folder_name(entry.name)]


def _metadata(content: bytes, path: str) -> dict[str, Any]:
    try:
        value = _decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(path, f"it is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise _corrupt(path, "it is not a JSON object")
    return cast("dict[str, Any]", value)


def _corrupt(path: str, reason: str) -> Corrupt:
    return Corrupt(f"the metadata of '{path}' cannot be used: {reason}", data={"path": path})


async def read_metadata_backup(remote: Remote, path: str) -> dict[str, Any]:
    """The metadata of the backup at the normalised ``path``; ``NotFound``, ``Corrupt``."""
    content = await remote.read_file(f"{path}/{METADATA_NAME}", limit=_LIMIT)
    return _metadata(content, path)


async def list_config_backups(remote: Remote) -> list[dict[str, Any]]:
    """Every backup of a configuration, oldest first: ``id`` and the fields of its metadata.

    One that cannot be read is left out and logged, as is a schedule that is not ours to read; a
    remote that stops answering fails the whole list (``Unreachable``).
    """
    found: list[dict[str, Any]] = []
    for schedule in await folders(remote, CONFIG_ROOT):
        found += await _backups_in(remote, f"{CONFIG_ROOT}/{schedule}")
    return sorted(found, key=_time)


async def list_pool_backups(remote: Remote) -> dict[str, list[dict[str, Any]]]:
    """Every backup of a pool, by its uuid, each list as of :func:`list_config_backups`.

    Pools without a backup are left out.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for schedule in await folders(remote, POOL_ROOT):
        directory = f"{POOL_ROOT}/{schedule}"
        for pool in await _tolerantly(folders, remote, directory) or []:
            found.setdefault(pool, []).extend(await _backups_in(remote, f"{directory}/{pool}"))
    return {pool: sorted(found[pool], key=_time) for pool in sorted(found) if found[pool]}


async def _backups_in(remote: Remote, directory: str) -> list[dict[str, Any]]:
    dated = await _tolerantly(read_dated, remote, directory) or Dated()
    for name, error in dated.unreadable.items():
        if isinstance(error, Unreachable):
            raise error
        path = f"{directory}/{name}"
        _log.warning("a metadata backup is not listed", path=path, error=error.message)
    return [
        {"id": f"{directory}/{name}", **{k: v for k, v in metadata.items() if k != "id"}}
        for name, metadata in dated.complete.items()
    ]


async def _tolerantly(
    read: Callable[[Remote, str], Awaitable[T]], remote: Remote, directory: str
) -> T | None:
    try:
        return await read(remote, directory)
    except Unreachable:
        raise
    except ProxyError as error:
        _log.warning("metadata backups are not listed", path=directory, error=error.message)
        return None


def _time(entry: dict[str, Any]) -> float:
    given = entry.get("timestamp")
    if isinstance(given, int | float) and not isinstance(given, bool):
        return given
    return timestamp_of(str(entry["id"]).rpartition("/")[2]) or 0
