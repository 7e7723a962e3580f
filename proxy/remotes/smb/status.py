"""What a server says went wrong ([MS-ERREF] 2.3), in the house's words.  No I/O."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from proxy.errors import (
    Busy,
    Conflict,
    Corrupt,
    NotFound,
    ProxyError,
    Refused,
    Unauthorized,
    Unreachable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_MORE_FILES: Final = 0x8000_0006
STOPPED_ON_SYMLINK: Final = 0x8000_002D
NOT_IMPLEMENTED: Final = 0xC000_0002
INVALID_HANDLE: Final = 0xC000_0008
INVALID_PARAMETER: Final = 0xC000_000D
INVALID_DEVICE_REQUEST: Final = 0xC000_0010
END_OF_FILE: Final = 0xC000_0011
NO_SUCH_FILE: Final = 0xC000_000F
ACCESS_DENIED: Final = 0xC000_0022
NAME_NOT_FOUND: Final = 0xC000_0034
NAME_COLLISION: Final = 0xC000_0035
PATH_NOT_FOUND: Final = 0xC000_003A
SHARING_VIOLATION: Final = 0xC000_0043
DELETE_PENDING: Final = 0xC000_0056
IS_A_DIRECTORY: Final = 0xC000_00BA
NOT_SUPPORTED: Final = 0xC000_00BB
DIRECTORY_NOT_EMPTY: Final = 0xC000_0101
NOT_A_DIRECTORY: Final = 0xC000_0103
FILE_CLOSED: Final = 0xC000_0128

MISSING: Final = frozenset({NO_SUCH_FILE, NAME_NOT_FOUND, PATH_NOT_FOUND, DELETE_PENDING})
"""``DELETE_PENDING``: removed, and gone when the last one that has it open closes it."""
UNSUPPORTED: Final = frozenset(
    {
        ACCESS_DENIED,
        INVALID_DEVICE_REQUEST,
        INVALID_HANDLE,
        INVALID_PARAMETER,
        NOT_IMPLEMENTED,
        NOT_SUPPORTED,
    }
)
"""How servers say that a directory cannot be flushed."""
SESSION_LOST: Final = frozenset(
    {
        0xC000_00C9,  # NETWORK_NAME_DELETED
        0xC000_0203,  # USER_SESSION_DELETED
        0xC000_035C,  # NETWORK_SESSION_EXPIRED
        0xC000_020C,  # CONNECTION_DISCONNECTED
    }
)
"""The server forgot us, as after its restart: everything has to be opened again."""

_GONE = (NotFound, "ENOENT", "no such file or directory")
_FULL = (Refused, "ENOSPC", "no space left on the share: free space or lower the retention")
_LOGIN = (Unauthorized, "EAUTH", "the server refuses the user name or the password")
_ACCOUNT = (Unauthorized, "EAUTH", "the account is disabled, locked or expired on the server")
_KNOWN: Final[dict[int, tuple[type[ProxyError], str, str]]] = {
    **dict.fromkeys(MISSING, _GONE),
    STOPPED_ON_SYMLINK: (
        Refused,
        "ELOOP",
        "a symbolic link, which is never followed inside a remote",
    ),
    ACCESS_DENIED: (Refused, "EACCES", "the server denies the access to this user"),
    0xC000_0061: (Refused, "EACCES", "the user lacks a privilege for it"),
    NAME_COLLISION: (Conflict, "EEXIST", "exists already"),
    IS_A_DIRECTORY: (Conflict, "EISDIR", "is a directory"),
    DIRECTORY_NOT_EMPTY: (Conflict, "ENOTEMPTY", "directory not empty"),
    NOT_A_DIRECTORY: (NotFound, "ENOTDIR", "not a directory"),
    SHARING_VIOLATION: (Busy, "EBUSY", "another program has it open and lets nobody else"),
    0xC000_0054: (Busy, "EBUSY", "another program has a part of it locked"),
    0xC000_0121: (Refused, "EPERM", "cannot be removed: it is marked read-only"),
    0xC000_007F: _FULL,
    0xC000_0044: (
        Refused,
        "EDQUOT",
        "the quota of this user is used up: raise it or lower the retention",
    ),
    0xC000_00A2: (Refused, "EROFS", "the share is read-only"),
    0xC000_0904: (Refused, "EFBIG", "the file is too large for the server's file system"),
    0xC000_0033: (Refused, "EINVAL", "the server does not take this name"),
    0xC000_0039: (Refused, "EINVAL", "the server does not take this path"),
    0xC000_003B: (Refused, "EINVAL", "the server does not take this path"),
    0xC000_0106: (Refused, "ENAMETOOLONG", "the server does not take such a long name"),
    0xC000_00D4: (Refused, "EXDEV", "lies on another volume of the server"),
    NOT_SUPPORTED: (Refused, "ENOTSUP", "the server cannot do this"),
    NOT_IMPLEMENTED: (Refused, "ENOTSUP", "the server cannot do this"),
    0xC000_0257: (
        Refused,
        "ENOTSUP",
        "lies on another server (DFS), which is not followed: name that server in the URL",
    ),
    0xC000_006A: _LOGIN,
    0xC000_006D: _LOGIN,
    0xC000_0064: _LOGIN,
    **dict.fromkeys((0xC000_006E, 0xC000_006F, 0xC000_0070, 0xC000_0071, 0xC000_0072), _ACCOUNT),
    **dict.fromkeys((0xC000_0193, 0xC000_0224, 0xC000_0234, 0xC000_015B), _ACCOUNT),
}


class StatusError(Exception):
    """The server refused one message; ``step`` is its place in its compound."""

    def __init__(self, status: int, step: int = 0) -> None:
        super().__init__(f"0x{status:08x}")
        self.status = status
        self.step = step


def from_status(status: int, doing: str, path: str) -> ProxyError:
    """What is not known is ``Unreachable`` (``EIO``) with the status's number."""
    data = {"path": path, "status": f"0x{status:08x}"}
    known = _KNOWN.get(status)
    if known is None:
        return Unreachable(
            f"EIO: the server answers 0x{status:08x}, {doing} '{path}'", code="EIO", data=data
        )
    kind, code, text = known
    return kind(f"{code}: {text}, {doing} '{path}'", code=code, data=data)


@contextlib.contextmanager
def translated(doing: str, path: str) -> Iterator[None]:
    """Turn :class:`StatusError`, and answers that make no sense, into the house's errors."""
    try:
        yield
    except StatusError as error:
        raise from_status(error.status, doing, path) from error
    except ValueError as error:
        raise Corrupt(
            f"the server's answer makes no sense, {doing} '{path}': {error}", data={"path": path}
        ) from error
