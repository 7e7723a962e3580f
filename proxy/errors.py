"""The few errors of the daemon, each with one meaning and a stable code.

Foreign exceptions (``OSError``, ``httpx``, ``ssl``, ``msgspec``, …) are translated once,
at the edge where they occur, with ``raise … from``.  What crosses a room's border is one
of these.

``code`` is the *stable name* on which callers decide (``ENOENT``, ``ELOCKED``,
``VDI_IN_USE``); ``rpc_code`` is the number of the JSON-RPC error.  The numbers below 100
are Xen Orchestra's own (packages/xo-common/api-errors); everything else is -32000.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ProxyError(Exception):
    """Base of every error that the daemon raises on purpose.

    ``message`` is one sentence that says what happened and, where there is one, the way
    out.  ``data`` holds JSON values and never a secret.
    """

    default_code: ClassVar[str] = "EFAILED"
    rpc_code: ClassVar[int] = -32000

    def __init__(
        self, message: str, *, code: str | None = None, data: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.data: dict[str, Any] = dict(data or {})


class NotFound(ProxyError):
    """The named thing does not exist."""

    default_code = "ENOENT"


class NoSuchObject(NotFound):
    """An id given by the client names nothing (XO's error 1)."""

    rpc_code = 1

    def __init__(self, kind: str, identifier: str) -> None:
        super().__init__(f"no such {kind} {identifier}", data={"id": identifier, "type": kind})


class Conflict(ProxyError):
    """The thing exists already, or its state contradicts the request."""

    default_code = "EEXIST"


class Busy(ProxyError):
    """Somebody else holds it; the error names the holder when it is known."""

    default_code = "ELOCKED"


class Refused(ProxyError):
    """A rule, a permission or a full disk forbids the operation."""

    default_code = "EPERM"


class Corrupt(ProxyError):
    """Bytes are not what their format or their record says: ``data`` tells what and where."""

    default_code = "ECORRUPT"


class Unreachable(ProxyError):
    """A peer or a remote does not answer, or stopped answering."""

    default_code = "ECONNREFUSED"


class Unauthorized(ProxyError):
    """Credentials, token or key are wrong."""

    default_code = "EAUTH"


class InvalidParams(ProxyError):
    """The call's parameters do not match the method's schema (XO's error 10).

    Nothing else may use the number 10: XO answers it by repeating the call without logs.
    """

    default_code = "EINVAL"
    rpc_code = 10

    def __init__(self, errors: Sequence[Mapping[str, Any]]) -> None:
        super().__init__("invalid parameters", data={"errors": list(errors)})


class Canceled(ProxyError):
    """The task was cancelled; in effects the same as a failure."""

    default_code = "ECANCELED"


class XapiError(ProxyError):
    """XAPI answered an error; ``code`` is XAPI's own, ``params`` its arguments (strings)."""

    def __init__(self, code: str, params: Sequence[str] = (), *, method: str | None = None) -> None:
        data: dict[str, Any] = {"params": list(params)}
        if method is not None:
            data["method"] = method
        super().__init__(f"{code}({', '.join(params)})", code=code, data=data)
        self.params = list(params)


_BY_ERRNO: dict[int, type[ProxyError]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.EEXIST: Conflict,
    errno.ENOTEMPTY: Conflict,
    errno.EISDIR: Conflict,
    errno.EACCES: Refused,
    errno.EPERM: Refused,
    errno.EROFS: Refused,
    errno.ENOSPC: Refused,
    errno.EDQUOT: Refused,
    errno.EFBIG: Refused,
    errno.ELOOP: Refused,
    errno.ENAMETOOLONG: Refused,
    errno.EXDEV: Refused,
    errno.EINVAL: Refused,
    errno.EIO: Unreachable,
    errno.ESTALE: Unreachable,
    errno.ENOTCONN: Unreachable,
    errno.ECONNREFUSED: Unreachable,
    errno.ECONNRESET: Unreachable,
    errno.EPIPE: Unreachable,
    errno.ETIMEDOUT: Unreachable,
    errno.EHOSTUNREACH: Unreachable,
    errno.ENETUNREACH: Unreachable,
}


def from_os_error(error: OSError, doing: str, path: str) -> ProxyError:
    """Translate an ``OSError`` met while ``doing`` something to ``path``.

    The code keeps the errno's symbolic name (``ENOSPC``), which XO knows.  ``path`` is
    relative to its remote: absolute paths of the appliance stay inside.
    """
    number = error.errno or 0
    name = errno.errorcode.get(number, "EIO")
    kind = _BY_ERRNO.get(number, Unreachable)
    text = (error.strerror or "input/output error").lower()
    return kind(f"{name}: {text}, {doing} '{path}'", code=name, data={"path": path})


class Many(ProxyError):
    """Several targets failed in one step; ``errors`` holds each."""

    default_code = "EFAILED"

    def __init__(self, message: str, errors: Sequence[BaseException]) -> None:
        super().__init__(message)
        self.errors = list(errors)
        self.canceled: frozenset[str] = frozenset()
        """Ids of the targets that somebody cancelled: they are not worth another attempt."""

    @classmethod
    def all_targets(cls, step: str, errors: Sequence[BaseException]) -> Self:
        """Upstream's message when no target is left, which XO shows."""
        return cls(f"all targets have failed, step: {step}", errors)
