"""The ``options`` of an SMB remote, as Xen Orchestra stores them for ``mount.cifs``.  No I/O.

Without a mount there is no kernel that would take them, so each is one of three: honoured;
satisfied by what this client does anyway, or without meaning where there is no mount point; or
``Refused`` by its name.  None is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Callable  # noqa: TC003 (the dataclass's fields are read at run time)
from dataclasses import dataclass, replace
from typing import Any, Final

from proxy.errors import Refused
from proxy.runtime.secrets import remember

SMALLEST_DIALECT: Final = 0x0300
_MOST: Final = 8 * 1024 * 1024
_LONGEST: Final = 4096

_DIALECTS: Final[dict[str, int | None]] = {
    "2.0": 0x0202,
    "2.0.2": 0x0202,
    "2.1": 0x0210,
    "3.0": 0x0300,
    "3.0.2": 0x0302,
    "3.02": 0x0302,
    "3.1.1": 0x0311,
    "3.11": 0x0311,
    "3": None,
    "default": None,
}


@dataclass(frozen=True, slots=True, repr=False)
class SmbOptions:
    """What the options ask for; ``None`` where the URL or a default decides."""

    dialect: int | None = None
    """Exactly this one; without it the best that both know, 3.0 at least."""
    seal: bool = False
    """Encrypt everything, also where the server does not ask for it."""
    port: int = 445
    address: str | None = None
    """Where to connect to instead of looking up the URL's host."""
    username: str | None = None
    password: str | None = None
    domain: str | None = None
    guest: bool = False
    """Take it when the server lets us in as a guest: unsigned, unencrypted, anybody's."""
    read_only: bool = False
    read_size: int = 1024 * 1024
    write_size: int = 1024 * 1024
    """Bytes in one request; the server's own limits come on top."""


def parse_options(text: str | None) -> SmbOptions:
    """Raises ``Refused``: ``EINVAL`` for a malformed value or an option that is given twice,
    ``ENOTSUP`` for one that cannot be honoured; ``data.option`` is its name."""
    wanted = SmbOptions()
    if not text:
        return wanted
    if len(text) > _LONGEST:
        raise Refused(
            f"SMB options: longer than {_LONGEST} characters",
            code="EINVAL",
            data={"option": "options"},
        )
    seen: set[str] = set()
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        name = name.strip().lower()
        if not name and not equals:
            continue
        known = _ALIASES.get(name, name)
        if known in seen:
            raise _wrong(name, "is given twice")
        seen.add(known)
        wanted = _apply(wanted, known, value if equals else None)
    if wanted.guest and wanted.seal:
        raise _wrong("seal", "cannot be had as a guest, who has no key")
    if wanted.seal and wanted.dialect is not None and wanted.dialect < SMALLEST_DIALECT:
        raise _wrong("seal", "needs SMB 3.0 at least")
    return wanted


def _apply(wanted: SmbOptions, name: str, value: str | None) -> SmbOptions:
    if name in _VALUES:
        if not value:
            raise _wrong(name, "needs a value")
        return replace(wanted, **_VALUES[name](name, value))
    if name in _FLAGS:
        if value is not None:
            raise _wrong(name, "takes no value")
        return replace(wanted, **_FLAGS[name])
    if name in _SATISFIED and (_SATISFIED[name] is None or value in _SATISFIED[name]):
        return wanted
    if name.startswith("x-"):  # for systemd and other readers of fstab
        return wanted
    shown = name[:64] if value is None or name in _UNSHOWN else f"{name[:64]}={value[:64]}"
    raise Refused(
        f"SMB option '{shown}' cannot be honoured without a kernel mount",
        code="ENOTSUP",
        data={"option": name[:64]},
    )


def _dialect(name: str, value: str) -> dict[str, Any]:
    if value in ("1", "1.0"):
        raise Refused(
            "SMB option 'vers=1.0': SMB 1 is not supported, it neither signs nor encrypts reliably",
            code="ENOTSUP",
            data={"option": name},
        )
    if value not in _DIALECTS:
        raise _wrong(name, f"knows {', '.join(_DIALECTS)}")
    return {"dialect": _DIALECTS[value]}


def _security(name: str, value: str) -> dict[str, Any]:
    if value == "none":
        return {"guest": True}
    if value in ("ntlmssp", "ntlmsspi"):
        return {}
    raise Refused(
        f"SMB option 'sec={value[:64]}' is not supported: ntlmssp, ntlmsspi and none are",
        code="ENOTSUP",
        data={"option": name},
    )


def _number(field: str, low: int, high: int) -> Callable[[str, str], dict[str, Any]]:
    def parse(name: str, value: str) -> dict[str, Any]:
        if not (value.isascii() and value.isdigit() and len(value) < 12):
            raise _wrong(name, "is not a number")
        number = int(value)
        if not low <= number <= high:
            raise _wrong(name, f"must be from {low} to {high}")
        return {field: number}

    return parse


def _text(field: str) -> Callable[[str, str], dict[str, Any]]:
    def parse(name: str, value: str) -> dict[str, Any]:
        if any(ord(sign) < 0x20 for sign in value):
            raise _wrong(name, "holds a control character")
        return {field: value}

    return parse


def _password(name: str, value: str) -> dict[str, Any]:
    del name
    remember(value)
    return {"password": value}


_VALUES: Final[dict[str, Callable[[str, str], dict[str, Any]]]] = {
    "vers": _dialect,
    "sec": _security,
    "port": _number("port", 1, 65535),
    "ip": _text("address"),
    "username": _text("username"),
    "password": _password,
    "domain": _text("domain"),
    "rsize": _number("read_size", 4096, 1 << 30),
    "wsize": _number("write_size", 4096, 1 << 30),
}
_FLAGS: Final[dict[str, dict[str, Any]]] = {
    "seal": {"seal": True},
    "guest": {"guest": True},
    "ro": {"read_only": True},
}
_SATISFIED: Final[dict[str, Any]] = {
    # what this client does anyway
    **dict.fromkeys(("rw", "sign", "soft", "nobrl", "nolease", "nodfs", "serverino"), (None,)),
    "cache": ("none", "strict"),
    "iocharset": ("utf8",),
    # the looks of a mount point, where there is none
    **dict.fromkeys(("uid", "gid", "file_mode", "dir_mode"), None),
    **dict.fromkeys(
        ("_netdev", "noatime", "nodev", "noexec", "nofail", "noperm", "nosuid", "nounix"), (None,)
    ),
    "defaults": (None,),
}
_ALIASES: Final = {
    "user": "username",
    "pass": "password",
    "dom": "domain",
    "workgroup": "domain",
    "addr": "ip",
}
_UNSHOWN: Final = frozenset({"credentials", "cred", "password2"})


def _wrong(name: str, what: str) -> Refused:
    return Refused(f"SMB option '{name[:64]}' {what}", code="EINVAL", data={"option": name[:64]})


def limited(size: int) -> int:
    """A request's size as asked for, within what one message carries."""
    return min(size, _MOST)
