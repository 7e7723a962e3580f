"""From a remote's paths to names on a share.  No I/O.

Windows keeps names as they were written and finds them in any case: ``A`` and ``a`` are one
file there and on a Samba share with its defaults.  Nothing that this daemon or Xen Orchestra
writes differs in case only.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.errors import Refused
from proxy.remotes import paths

_LONGEST_NAME: Final = 255
_LONGEST_PATH: Final = 32_000
"""UTF-16 units; the server's own limit is 32,767."""
_FORBIDDEN: Final = re.compile(r'[\x00-\x1f"*:<>?\\|]')


class Place:
    """The directory of a share that a remote lives in: ``""`` or ``dir\\sub``."""

    def __init__(self, path: str) -> None:
        parts = [part for part in re.split(r"[\\/]", path) if part not in ("", ".")]
        for part in parts:
            _check(part, path)
        self.parts = tuple(parts)

    def name(self, path: str) -> str:
        """``path`` of the remote from the share's root, with backslashes.

        Raises ``Refused`` (``EINVAL``) naming the segment that no share can hold.  ``:`` would
        name a hidden stream of another file, a dot or a space at the end another file.
        """
        parts = paths.segments(path)
        for part in parts:
            _check(part, path)
        full = "\\".join((*self.parts, *parts))
        if len(full) > _LONGEST_PATH:
            raise Refused(
                f"ENAMETOOLONG: the path is longer than {_LONGEST_PATH} characters",
                code="ENAMETOOLONG",
                data={"path": path[:_LONGEST_NAME]},
            )
        return full


def _check(part: str, path: str) -> None:
    found = _FORBIDDEN.search(part)
    if found is not None:
        raise _impossible(part, path, f"holds {found[0]!r}, which SMB does not allow")
    if part.endswith((".", " ")):
        raise _impossible(part, path, "ends in a dot or a space, which Windows cuts off")
    if any("\udc80" <= sign <= "\udcff" for sign in part):
        raise _impossible(part, path, "is not UTF-8")
    if len(part.encode("utf-16-le", errors="surrogatepass")) > 2 * _LONGEST_NAME:
        raise Refused(
            f"ENAMETOOLONG: the name {part[:40]!r}… is longer than {_LONGEST_NAME} characters",
            code="ENAMETOOLONG",
            data={"path": path[:4096], "part": part[:_LONGEST_NAME]},
        )


def _impossible(part: str, path: str, why: str) -> Refused:
    return Refused(
        f"EINVAL: the name {part[:_LONGEST_NAME]!r} {why}",
        code="EINVAL",
        data={"path": repr(path[:4096]), "part": repr(part[:_LONGEST_NAME])},
    )
