"""The URLs of remotes, as Xen Orchestra stores and sends them: parse and format, no I/O.

The grammar is xo-remote-parser's (packages/xo-remote-parser/src/index.js), which is one
grammar per type and not RFC 3986.  What it would silently cut off (text after a second
``://``, a ``:`` in an NFS path) is refused here: the remainder would name another place.
What it cannot read at all (IPv6 hosts of NFS, ``://`` in an SMB password) is read.

All have a query in which each value is JSON: ``?useVhdDirectory=true&encryptionKey=%22…%22``;
unknown keys are kept.  Everything that is wrong raises ``Refused`` (``EINVAL``) with
``data.part`` naming the part; messages never quote a password or a key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping  # noqa: TC003 (dataclass fields are read at run time)
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, quote, unquote

from proxy.errors import Refused
from proxy.runtime.secrets import HIDDEN, remember, remember_in, scrub

_LONGEST = 64 * 1024
_UNRESERVED = "-_.!~*'()"
"""What JavaScript's encodeURIComponent leaves alone, besides letters and digits."""

PLACEHOLDER = "obfuscated-q3oi6d9X8uenGvdLnHk2"
"""What Xen Orchestra shows in place of a secret (@vates/obfuscate)."""

SUPPORTED_TYPES = ("file", "nfs", "smb", "s3", "s3+http", "azure", "azurite", "azurite+http")


@dataclass(frozen=True, kw_only=True, repr=False)
class RemoteUrl:
    """What all types have; ``options`` is the decoded query.

    ``str()`` and ``repr()`` hide credentials; :meth:`format` does not.
    """

    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def type(self) -> str:
        """Upstream's name of the kind: ``file nfs smb s3 azure azurite``."""
        raise NotImplementedError

    @property
    def is_immutable(self) -> bool:
        """Only JSON ``true`` counts, as upstream."""
        return self.options.get("immutable") is True

    @property
    def use_vhd_directory(self) -> bool:
        return bool(self.options.get("useVhdDirectory"))

    @property
    def encryption_key(self) -> str | None:
        """``None`` without one; a key that is not a string is ``Refused``."""
        key = self.options.get("encryptionKey")
        if not key:
            return None
        if not isinstance(key, str):
            raise _wrong("encryptionKey", "must be a JSON string")
        return key

    def format(self) -> str:
        """The URL with its credentials; parsing it gives the same again."""
        return self._format(hide=False)

    @property
    def public(self) -> str:
        """The URL without credentials, for messages."""
        return self._format(hide=True)

    def _format(self, *, hide: bool) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.public

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.public}>"


@dataclass(frozen=True, kw_only=True, repr=False)
class FileUrl(RemoteUrl):
    """``path`` is absolute and as written: the kernel, not we, resolves ``//`` and links."""

    path: str

    @property
    def type(self) -> str:
        return "file"

    def _format(self, *, hide: bool) -> str:
        return f"file://{_clean(self.path)}{_query(self.options, hide=hide)}"


@dataclass(frozen=True, kw_only=True, repr=False)
class NfsUrl(RemoteUrl):
    """``host`` without the brackets of IPv6; ``port`` as written (upstream keeps the text)."""

    host: str
    port: str | None = None
    path: str

    @property
    def type(self) -> str:
        return "nfs"

    def _format(self, *, hide: bool) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f"{self.port}:"
        return f"nfs://{host}:{port}{_clean(self.path)}{_query(self.options, hide=hide)}"


@dataclass(frozen=True, kw_only=True, repr=False)
class SmbUrl(RemoteUrl):
    r"""``host`` is ``server\share``; ``path`` has backslashes, ``""`` for the share itself."""

    username: str
    password: str
    domain: str
    host: str
    path: str = ""

    @property
    def type(self) -> str:
        return "smb"

    def _format(self, *, hide: bool) -> str:
        path = _clean(self.path.replace("\\", "/")).replace("/", "\\")
        path = "" if path == "\\" else path
        password = HIDDEN if hide else self.password
        end = "" if hide and not path else f"\0{path}"
        if hide:
            end = end.replace("\0", "")
        return (
            f"smb://{self.username}:{password}@{self.domain}\\\\{self.host}{end}"
            f"{_query(self.options, hide=hide)}"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class _ObjectStoreUrl(RemoteUrl):
    """``protocol`` is ``https`` or ``http``; ``host`` includes ``:port``; ``path`` is
    ``/<bucket or container>/<prefix>``, not decoded."""

    protocol: Literal["https", "http"]
    host: str
    username: str
    password: str
    path: str

    def _authority(self, *, hide: bool) -> str:
        username, password = quote(self.username, safe=_UNRESERVED), ""
        if self.password:
            password = f":{HIDDEN if hide else quote(self.password, safe=_UNRESERVED)}"
        login = f"{username}{password}@" if username or password else ""
        return f"{login}{self.host}{_clean(self.path)}"


@dataclass(frozen=True, kw_only=True, repr=False)
class S3Url(_ObjectStoreUrl):
    region: str | None = None

    @property
    def type(self) -> str:
        return "s3"

    def _format(self, *, hide: bool) -> str:
        scheme = "s3" if self.protocol == "https" else "s3+http"
        region = "" if self.region is None else f"#{self.region}"
        query = _query(self.options, hide=hide)
        return f"{scheme}://{self._authority(hide=hide)}{query}{region}"


@dataclass(frozen=True, kw_only=True, repr=False)
class AzureUrl(_ObjectStoreUrl):
    """``flavour`` is ``azurite`` for the emulator, which puts the account into the path."""

    flavour: Literal["azure", "azurite"]

    @property
    def type(self) -> str:
        return self.flavour

    def _format(self, *, hide: bool) -> str:
        plain = self.flavour == "azurite" and self.protocol == "http"
        scheme = "azurite+http" if plain else self.flavour
        return f"{scheme}://{self._authority(hide=hide)}{_query(self.options, hide=hide)}"


def parse_url(url: str) -> RemoteUrl:
    """The parts of a remote's URL.  Its secrets are remembered, so that no log shows them.

    Raises ``Refused`` (``EINVAL``); of an unknown type with upstream's message.
    """
    parsed = _parse(url)
    for part in ("username", "password"):
        refuse_placeholder(part, getattr(parsed, part, None))
    refuse_placeholder("query", parsed.options)
    return parsed


def refuse_placeholder(part: str, value: object) -> None:
    """Raise ``Refused`` when ``value`` (JSON) holds :data:`PLACEHOLDER` anywhere.

    With it as a password a remote only fails; with it as a key it would be *encrypted* by a
    key that everybody knows.
    """
    # recursion ends: the JSON that reaches this was decoded by a recursive decoder
    if isinstance(value, dict):
        for key, item in cast("dict[str, object]", value).items():
            refuse_placeholder(str(key), item)
    elif isinstance(value, list):
        for item in cast("list[object]", value):
            refuse_placeholder(part, item)
    elif value == PLACEHOLDER:
        raise _wrong(
            part[:64],
            "is what Xen Orchestra shows in place of a secret, not the secret: "
            "enter it again in the settings of the remote",
        )


def _parse(url: str) -> RemoteUrl:
    if len(url) > _LONGEST:
        raise _wrong("url", f"is longer than {_LONGEST} characters")
    try:
        url.encode()
    except UnicodeEncodeError:
        raise _wrong("url", "holds a code point that is no character") from None
    scheme, separator, rest = url.partition("://")
    parsers = {
        "file": _parse_file,
        "nfs": _parse_nfs,
        "smb": _parse_smb,
        "s3": _parse_s3,
        "s3+http": _parse_s3,
        "azure": _parse_azure,
        "azurite": _parse_azure,
        "azurite+http": _parse_azure,
    }
    if not separator or scheme not in parsers:
        raise Refused("Unhandled remote type", code="EINVAL", data={"part": "type"})
    return parsers[scheme](scheme, rest)


def _parse_file(_scheme: str, rest: str) -> FileUrl:
    path, _, query = rest.partition("?")
    _refuse_nul(path)
    if "://" in path:
        raise _wrong("path", "holds '://', which Xen Orchestra would cut off")
    path = "/" + path.lstrip("/")
    _refuse_climbing(path)
    return FileUrl(path=path, options=_options(query, {"path"}))


_NFS = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%a-z]+)\]|(?P<host>[^:\[\]/?]+)):(?:(?P<port>\d+):)?(?P<path>[^:?]*)"
)


def _parse_nfs(_scheme: str, rest: str) -> NfsUrl:
    location, _, query = rest.partition("?")
    _refuse_nul(location)
    match = _NFS.fullmatch(location)
    if match is None:
        if location.count(":") == 0:
            raise _wrong("host", "is not followed by ':' and the exported path")
        if not re.match(r"[^:\[\]/?]+:|\[[^\]]+\]:", location):
            raise _wrong("host", "is missing or malformed (IPv6 stands in brackets)")
        raise _wrong("path", "holds ':', which an NFS path cannot")
    path = "/" + match["path"].lstrip("/")
    _refuse_climbing(path)
    return NfsUrl(
        host=match["ipv6"] or match["host"],
        port=match["port"],
        path=path,
        options=_options(query, {"host", "port", "path"}),
    )


_SMB_TARGET = re.compile(r"(?P<host>[^\0?]*)(?:\0(?P<path>[^?]*))?(?:\?(?P<query>.*))?", re.DOTALL)


def _parse_smb(_scheme: str, rest: str) -> SmbUrl:
    # the query may hold '@' too, so the login ends at the last '@' that a domain and two
    # backslashes follow
    match = re.fullmatch(r"(?P<login>.*)@(?P<domain>[^@]*?)\\\\(?P<target>.*)", rest, re.DOTALL)
    if match is None:
        raise _wrong("url", r"must be smb://user:password@domain\\server\share")
    username, colon, password = match["login"].partition(":")
    if not username or not colon:
        raise _wrong("username", "is missing")
    # before anything else can fail
    remember(password)
    if not match["domain"]:
        raise _wrong("domain", "is missing (WORKGROUP is the usual one)")
    target = _SMB_TARGET.fullmatch(match["target"])
    if target is None or not target["host"]:
        raise _wrong("host", r"must be server\share")
    path = target["path"] or ""
    _refuse_nul(path)
    for part, text in (("host", target["host"]), ("path", path)):
        if ".." in re.split(r"[\\/]", text):
            raise _wrong(part, "must not hold '..'")
    return SmbUrl(
        username=username,
        password=password,
        domain=match["domain"],
        host=target["host"],
        path=path,
        options=_options(target["query"] or "", {"username", "password", "domain", "host", "path"}),
    )


def _parse_s3(scheme: str, rest: str) -> S3Url:
    rest, _, region = rest.partition("#")
    parts = _object_store(rest, {"protocol", "region"})
    protocol: Literal["https", "http"] = "http" if scheme == "s3+http" else "https"
    return S3Url(protocol=protocol, region=region or None, **parts)


def _parse_azure(scheme: str, rest: str) -> AzureUrl:
    rest, _, _ = rest.partition("#")
    parts = _object_store(rest, {"protocol", "port"})
    protocol: Literal["https", "http"] = "http" if scheme == "azurite+http" else "https"
    flavour: Literal["azure", "azurite"] = "azure" if scheme == "azure" else "azurite"
    return AzureUrl(protocol=protocol, flavour=flavour, **parts)


def _object_store(rest: str, own: set[str]) -> dict[str, Any]:
    location, _, query = rest.partition("?")
    _refuse_nul(location)
    authority, slash, path = location.partition("/")
    login, _, host = authority.rpartition("@")
    username, _, password = login.partition(":")
    remember(password)
    if not login and "@" in path:
        remember(path.partition("@")[0].lstrip("/"))
        remember(authority.partition(":")[2])
        raise _wrong("password", "holds a '/', which must be written as %2F")
    decoded = _percent_decoded("password", password)
    remember(decoded)
    if not host:
        raise _wrong("host", "is missing")
    path = slash + path
    _refuse_climbing(path)
    return {
        "host": host.lower(),
        "username": _percent_decoded("username", username),
        "password": decoded,
        "path": path,
        "options": _options(query, own | {"host", "username", "password", "path"}),
    }


def _percent_decoded(part: str, text: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise _wrong(part, "has a '%' that is not followed by two hexadecimal digits")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _wrong(part, "does not decode to UTF-8") from None


def _options(query: str, explicit: set[str]) -> dict[str, Any]:
    """The decoded query less what the URL itself says, which cannot be overridden."""
    options: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict")
    except ValueError:
        raise _wrong("query", "does not decode to UTF-8") from None
    for key, text in pairs:
        shown = f"query key {key[:64]!r}"
        if key in options:
            raise _wrong(shown, "is given twice")
        try:
            options[key] = _decoded(text) if text else False
        except (ValueError, RecursionError):
            raise _wrong(shown, "is not JSON (a text needs quotes)") from None
    remember_in(options)
    return {key: value for key, value in options.items() if key not in explicit | {"type"}}


def _decoded(text: str) -> Any:
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _query(options: Mapping[str, Any], *, hide: bool) -> str:
    shown: Mapping[str, Any] = scrub(dict(options)) if hide else options
    pairs = [
        f"{quote(key, safe=_UNRESERVED)}={quote(_json(value), safe=_UNRESERVED)}"
        for key, value in shown.items()
    ]
    return f"?{'&'.join(pairs)}" if pairs else ""


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text


def _clean(path: str) -> str:
    """As upstream's format: trimmed segments, empty ones dropped, one leading slash."""
    names = (segment.strip() for segment in path.split("/"))
    return "/" + "/".join(segment for segment in names if segment)


def _refuse_climbing(path: str) -> None:
    if ".." in path.split("/"):
        raise _wrong("path", "must not hold '..'")


def _refuse_nul(text: str) -> None:
    if "\0" in text:
        raise _wrong("path", "holds a NUL byte")


def _wrong(part: str, what: str) -> Refused:
    return Refused(f"remote URL: {part} {what}", code="EINVAL", data={"part": part})
