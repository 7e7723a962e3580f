"""Alias files: the name that a VHD directory has for everybody else.

``<date>.alias.vhd`` holds the path of the data, relative to its own folder, normally
``data/<date>.vhd``.  After merges the alias has the newest date and its data the oldest.

An alias is believed only when it names something ending in ``.vhd`` strictly below its own
folder: an empty one, or one that says ``.`` or ``data``, would make a whole VDI directory
the data of one disk, for the next deletion to remove.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Final

from proxy.errors import Corrupt, Refused
from proxy.remotes import paths

if TYPE_CHECKING:
    from proxy.remotes.interface import Remote

SUFFIX: Final = ".alias.vhd"
LONGEST: Final = 1024
"""Bytes of an alias file."""


def is_alias(path: str) -> bool:
    name = posixpath.basename(path)
    return name.endswith(SUFFIX) and name != SUFFIX


def data_path(alias_path: str) -> str:
    """Where the data of a new disk goes: ``<folder>/data/<name>.vhd``."""
    _check_name(alias_path)
    name = paths.name(alias_path).removesuffix(SUFFIX)
    return paths.join(paths.parent(alias_path), "data", f"{name}.vhd")


def parse_alias(alias_path: str, content: bytes) -> str:
    """The path that the alias at ``alias_path`` with this ``content`` names, normalised.

    ``Corrupt`` when it is not what an alias may hold.
    """
    if len(content) > LONGEST:
        raise _corrupt(alias_path, f"is too big ({len(content)} bytes)")
    try:
        target = content.decode().strip()
    except UnicodeDecodeError as error:
        raise _corrupt(alias_path, "is no text") from error
    if not target or not target.isprintable():
        raise _corrupt(alias_path, f"names nothing: {target[:80]!r}")
    folder = paths.parent(alias_path)
    resolved = paths.normalise(posixpath.join("/", folder, target))
    if not _is_below(resolved, folder):
        raise _corrupt(alias_path, f"names {target[:80]!r}, which is not below its folder")
    if is_alias(resolved):
        raise _corrupt(alias_path, f"names another alias, {target[:80]!r}")
    if not resolved.endswith(".vhd") or target.endswith("/"):
        raise _corrupt(alias_path, f"names {target[:80]!r}, which is no disk")
    return resolved


async def read_alias(remote: Remote, path: str) -> str:
    """The normalised path of the data.  ``NotFound``; ``Corrupt`` (see :func:`parse_alias`)."""
    return parse_alias(path, await remote.read_file(path, limit=LONGEST))


async def write_alias(remote: Remote, path: str, target: str, *, exclusive: bool = False) -> None:
    """Make ``path`` name ``target`` (from the remote's root), atomically and durably.

    ``Conflict`` when it exists and the call is ``exclusive``; ``Refused`` for a target that
    :func:`read_alias` would not accept.
    """
    _check_name(path)
    text = posixpath.relpath("/" + paths.normalise(target), "/" + paths.parent(path))
    content = text.encode(errors="surrogateescape")
    try:
        parse_alias(path, content)
    except Corrupt as error:
        raise Refused(error.message, code="EINVAL", data=error.data) from error
    await remote.write_file(path, content, exclusive=exclusive)


def _check_name(path: str) -> None:
    if not is_alias(path):
        raise Refused(
            f"an alias is named *{SUFFIX}, not '{path}'", code="EINVAL", data={"path": path}
        )


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/") if folder else bool(path)


def _corrupt(path: str, message: str) -> Corrupt:
    return Corrupt(f"the alias '{path}' {message}", data={"what": "alias", "path": path})
