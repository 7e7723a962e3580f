"""What is asked of ``mount`` and ``umount``, and what their answers mean.  No I/O.

The arguments are those of Xen Orchestra (``@xen-orchestra/fs``, ``_mount.js``), in its order, so
that a remote gives the same mount under either; but no ``-o`` without options.  Nothing is added
to them: no ``soft``, which would turn an outage into lost writes, as :mod:`proxy.remotes.lane`
bounds what a hard mount holds up.

The password of SMB travels in the environment of ``mount.cifs`` and nowhere else: what would
put one on the command line is refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from collections.abc import Mapping  # noqa: TC003 (dataclass fields are read at run time)
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from proxy.errors import NotFound, ProxyError, Refused, Unreachable, from_os_error
from proxy.runtime.secrets import HIDDEN, scrub_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.remotes.url import NfsUrl, SmbUrl

_LONGEST_OPTIONS: Final = 4000
"""The kernel takes one page."""
_LONGEST_SHOWN: Final = 500
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_FORBIDDEN_OPTIONS: Final = {
    # they would mount something else than the remote
    **dict.fromkeys(("bind", "rbind", "move", "remount", "loop"), "mounts no remote"),
    **dict.fromkeys(
        ("pass", "password", "pass2", "password2"), "belongs into the URL of the remote"
    ),
}
PACKAGES: Final = {"nfs": "nfs-common", "cifs": "cifs-utils"}
"""Debian's package with the helper that ``mount`` needs."""


@dataclass(frozen=True, slots=True)
class MountRequest:
    """One file system of a server, and how it is to be mounted."""

    type: Literal["nfs", "cifs"]
    device: str
    options: str
    """Separated by commas; ``""`` for none."""
    credentials: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """Variables for the environment of ``mount``."""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for requests that one mount can serve."""
        return self.type, self.device, self.options, tuple(sorted(self.credentials.items()))

    def mount(self, directory: str, *, sudo: bool = False) -> list[str]:
        """The arguments; they hold no secret."""
        options = ["-o", self.options] if self.options else []
        command = ["mount", *options, "-t", self.type, self.device, directory]
        # sudo empties the environment unless its policy (SETENV) allows to keep these
        kept = ",".join(["LANG", *self.credentials])
        return ["sudo", "-n", f"--preserve-env={kept}", *command] if sudo else command

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """For :meth:`mount`; of ``base`` only what a helper needs, which holds no secret."""
        return {**plain_environment(base), **self.credentials}

    def names(self, remote_id: object) -> Iterator[str]:
        """Names for the directory, in the order in which they are to be tried.

        The first is the remote's id where it can be one, as Xen Orchestra does.  Else, and
        when that is taken, it is made from what is mounted and how: the same each time.
        """
        told = (self.type, self.device, self.options, self.credentials.get("USER", ""))
        digest = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        stem = digest
        if isinstance(remote_id, str) and _SAFE_NAME.fullmatch(remote_id):
            yield remote_id
            stem = f"{remote_id}.{digest}"
        yield stem
        for number in range(2, 9):
            yield f"{stem}.{number}"


def plain_environment(base: Mapping[str, str]) -> dict[str, str]:
    """``LANG=C``, as messages are read; the path; where Kerberos is configured."""
    kept = {name: base[name] for name in base if name == "PATH" or name.startswith("KRB5")}
    return {**kept, "LANG": "C"}


def unmount(directory: str, *, sudo: bool = False, lazy: bool = False) -> list[str]:
    """``lazy`` takes the mount away from all who use it, whenever they let go of it."""
    command = ["umount", *(["-l"] if lazy else []), directory]
    return ["sudo", "-n", *command] if sudo else command


def nfs_request(url: NfsUrl, options: object) -> MountRequest:
    """``options`` is the field of XO's record: a comma list, ``None`` or absent."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    _refuse_unsafe("host", host)
    _refuse_unsafe("path", url.path)
    port = [] if url.port is None else [f"port={url.port}"]
    return MountRequest("nfs", f"{host}:{url.path}", _joined(port, options))


def smb_request(url: SmbUrl, options: object) -> MountRequest:
    r"""The device is ``//server\share/`` with the path behind it, as upstream writes it."""
    for part, text in (("host", url.host), ("path", url.path), ("domain", url.domain)):
        _refuse_unsafe(part, text)
    if "," in url.domain:
        raise _wrong("domain", "holds a ',', which would begin another mount option")
    for part, text in (("username", url.username), ("password", url.password)):
        if "\0" in text or "\n" in text:
            raise _wrong(part, "holds a character that mount.cifs cannot take")
    path = posixpath.normpath(f"/{url.path}")
    return MountRequest(
        "cifs",
        f"//{url.host}/{path.lstrip('/')}",
        _joined([f"domain={url.domain}"], options),
        {"USER": url.username, "PASSWD": url.password},
    )


def _joined(own: list[str], options: object) -> str:
    if options is None:
        options = ""
    if not isinstance(options, str):
        raise _wrong("options", "must be a text of mount options, separated by ','")
    if any(ord(character) < 32 or ord(character) == 127 for character in options):
        raise _wrong("options", "holds a control character")
    given = [option for option in map(str.strip, options.split(",")) if option]
    for option in given:
        name = option.partition("=")[0].strip().lower()
        if name in _FORBIDDEN_OPTIONS:
            raise _wrong("options", f"holds '{name}', which {_FORBIDDEN_OPTIONS[name]}")
    joined = ",".join([*own, *given])
    if len(joined.encode()) > _LONGEST_OPTIONS:
        raise _wrong("options", f"is longer than {_LONGEST_OPTIONS} bytes")
    return joined


def _refuse_unsafe(part: str, text: str) -> None:
    if text.startswith("-"):
        raise _wrong(part, "begins with '-', which mount would take for an option")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise _wrong(part, "holds a control character")


def _wrong(part: str, what: str) -> Refused:
    return Refused(f"remote: {part} {what}", code="EINVAL", data={"part": part})


# -- answers

_NUMBER: Final = re.compile(r"mount error\((\d+)\)")
_TEXTS: Final[tuple[tuple[str, str], ...]] = (
    # mount.nfs tells the reason in the words of strerror, mount.cifs by its number
    ("access denied by server", "EACCES"),
    ("no route to host", "EHOSTUNREACH"),
    ("host is down", "EHOSTUNREACH"),
    ("connection refused", "ECONNREFUSED"),
    ("connection timed out", "ETIMEDOUT"),
    ("connection reset", "ECONNREFUSED"),
    ("network is unreachable", "ENETUNREACH"),
    ("transport endpoint is not connected", "ENOTCONN"),
    ("stale file handle", "ESTALE"),
    ("failed to resolve server", "ENOTFOUND"),
    ("could not resolve address", "ENOTFOUND"),
    ("no such file or directory", "ENOENT"),
    ("permission denied", "EACCES"),
    ("rpc.statd is not running", "ENOLCK"),
    ("protocol not supported", "EPROTONOSUPPORT"),
    ("protocol is not supported", "EPROTONOSUPPORT"),
    ("not supported by the system", "ENODEV"),
    ("no such device", "ENODEV"),
    ("unknown filesystem type", "ENODEV"),
    ("incorrect mount option", "EINVAL"),
    ("invalid argument", "EINVAL"),
    ("bad option", "EINVAL"),
    ("wrong fs type", "EINVAL"),
    ("must be superuser", "EPERM"),
    ("only root can", "EPERM"),
    ("a password is required", "EPERM"),
    ("not allowed to", "EPERM"),
    ("operation not permitted", "EPERM"),
    ("already mounted or mount point busy", "EBUSY"),
)
_SAME: Final = {"EHOSTDOWN": "EHOSTUNREACH", "EINPROGRESS": "ETIMEDOUT", "ENXIO": "ENOENT"}
_UNREACHABLE: Final = frozenset(
    (
        *("ECONNREFUSED", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "ENOTCONN", "ESTALE"),
        *("ENOTFOUND", "EIO", "ECONNRESET", "EAGAIN"),
    )
)
_WAYS_OUT: Final = {
    "EACCES": {
        "nfs": "the server must export this path to this proxy's address",
        "cifs": "check user, password and domain, and the rights on the share",
    },
    "ENOENT": {
        "nfs": "the server exports no such path",
        "cifs": "the server has no such share or folder",
    },
    "ENOLCK": {"nfs": "start rpc.statd here or add the mount option 'nolock'"},
    "ENODEV": {
        "nfs": "this system's kernel has no NFS client",
        "cifs": "this system's kernel has no SMB client",
    },
    "EPERM": dict.fromkeys(
        ("nfs", "cifs"),
        "mounting needs root: run the daemon as root or set remoteOptions.useSudo, with a rule "
        "for mount and umount that needs no password (and SETENV, for the password of SMB)",
    ),
    "EINVAL": dict.fromkeys(("nfs", "cifs"), "look at the remote's mount options"),
}


def explain(text: str, code: int, request: MountRequest, *, has_helper: bool = True) -> ProxyError:
    """The error for what ``mount`` wrote and its exit ``code``.

    ``has_helper``: whether ``mount.<type>`` is installed.
    """
    shown = _shown(text, request) or f"mount ended with code {code}"
    if not has_helper or f"/sbin/mount.{request.type} helper" in text:
        package = PACKAGES[request.type]
        return Refused(
            f"ENOENT: mount.{request.type} is missing: install the package {package}: {shown}",
            code="EMOUNTHELPER",
            data={"package": package},
        )
    name = _code_of(text)
    way_out = _WAYS_OUT.get(name, {}).get(request.type)
    message = f"{name}: {shown}" + (f": {way_out}" if way_out else "")
    data = {"device": request.device, "exitCode": code}
    if name in _UNREACHABLE:
        return Unreachable(message, code=name, data=data)
    if name == "ENOENT":
        return NotFound(message, code=name, data=data)
    return Refused(message, code=name, data=data)


def _code_of(text: str) -> str:
    number = _NUMBER.search(text)
    if number is not None:
        name = errno.errorcode.get(int(number[1]), "EIO")
        return _SAME.get(name, name)
    lower = text.lower()
    for part, name in _TEXTS:
        if part in lower:
            return name
    return "EIO"


def _shown(text: str, request: MountRequest) -> str:
    password = request.credentials.get("PASSWD")
    if password:
        text = text.replace(password, HIDDEN)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Refer to the", "dmesg(1)"))]
    return scrub_text("; ".join(told))[:_LONGEST_SHOWN].rstrip(".")


def is_busy(text: str) -> bool:
    """Whether ``umount`` says that somebody uses the mount."""
    return "busy" in text.lower()


def probe_error(number: int, doing: str, request: MountRequest) -> ProxyError:
    """What the probe of a fresh mount met while ``doing`` something at its root."""
    error = from_os_error(OSError(number, os.strerror(number)), doing, "/")
    way_out = {
        "EROFS": "the server lets nobody write there; to restore from it all the same, add the "
        "mount option 'ro'",
        "EACCES": "this proxy's user may not write there (on NFS: no_root_squash, or the rights "
        "of the exported directory)",
    }.get(error.code)
    if way_out is None:
        return error
    return type(error)(f"{error.message}: {way_out}", code=error.code, data=error.data)
