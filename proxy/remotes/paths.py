"""Paths inside a remote: pure text, no file system.

A normalised path has no leading slash, no ``.``, no ``..`` and no empty segment; the remote's
root is ``""``.  ``..`` at the root stays at the root, as in a file system, so that no
path can name anything outside of the remote.
"""

from __future__ import annotations

import posixpath

from proxy.errors import Refused

_LONGEST_NAME = 255
"""Bytes in one name on every file system in use."""


def normalise(path: str) -> str:
    """``path`` from the remote's root; ``Refused`` (``EINVAL``) for a NUL byte."""
    if "\0" in path:
        raise Refused(
            f"the path {path!r} holds a NUL byte", code="EINVAL", data={"path": repr(path)}
        )
    return posixpath.normpath("/" + path).lstrip("/")


def segments(path: str) -> list[str]:
    """The names on the way to ``path``, none for the root."""
    normal = normalise(path)
    return normal.split("/") if normal else []


def parent(path: str) -> str:
    return posixpath.dirname(normalise(path))


def name(path: str) -> str:
    return posixpath.basename(normalise(path))


def join(directory: str, *names: str) -> str:
    """``names`` below ``directory``, normalised."""
    return normalise("/".join((directory, *names)))


def temporary_name(final_name: str, milliseconds: int) -> str:
    """The hidden name beside ``final_name`` that its bytes have until they are complete.

    Xen Orchestra uses ``.<ms>.<name>``, and its clean then takes an unfinished
    ``.….vhd`` or ``.….json`` for a real one: ours ends in ``.tmp``.
    """
    ending = ".tmp"
    head = f".{milliseconds:013d}."
    room = _LONGEST_NAME - len(head) - len(ending)
    kept = final_name.encode(errors="surrogateescape")[:room]
    return f"{head}{kept.decode(errors='surrogateescape')}{ending}"
