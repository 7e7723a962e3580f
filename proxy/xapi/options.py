"""How to reach a pool: the part of a call's parameters that names one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, unquote

from proxy.errors import Refused
from proxy.runtime import secrets
from proxy.xapi.shapes import is_map

if TYPE_CHECKING:
    from collections.abc import Mapping

_URL = re.compile(
    r"(?:(?P<scheme>https?):)?(?://)?"
    r"(?:(?P<user>[^:@/?#]*)(?::(?P<password>[^@/?#]*))?@)?"
    r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\[\]:@/?#\s]+)"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#\s]*)?",
    re.IGNORECASE,
)


def _no_host_url() -> Refused:
    return Refused("the pool's url is not the URL of a host", code="EINVAL", data={"part": "url"})


@dataclass(frozen=True)
class Address:
    """Where a host listens.  ``host`` is a name or an address, IPv6 without brackets."""

    scheme: str
    host: str
    port: int
    path: str = "/"

    @property
    def secure(self) -> bool:
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """``host:port`` as a URL and a ``Host`` header write it; no port if it is the default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.secure else 80
        return host if self.port == default else f"{host}:{self.port}"

    def at(self, host: str, port: int | None = None) -> Address:
        """The same service on another host."""
        return replace(self, host=host.strip("[]"), port=self.port if port is None else port)

    def url(self, path: str) -> str:
        """``path`` resolved against this address."""
        return f"{self.scheme}://{self.authority}{self.path.rsplit('/', 1)[0]}/{path.lstrip('/')}"


@dataclass(frozen=True)
class XapiOptions:
    """One pool and how patient to be with it.  Times are in seconds, 0 means no bound.

    ``inactivity_timeout`` bounds the silence of a read-only call and of a transfer;
    ``call_timeout`` a call that changes something, in total.  ``max_uncoalesced_vdis`` is the
    tolerance of the chain check before a snapshot, ``concurrency`` how many calls may be in
    flight (waits for events do not count).
    """

    url: str
    username: str
    password: str = field(repr=False)
    allow_unauthorized: bool = False
    http_proxy: str | None = field(default=None, repr=False)
    inactivity_timeout: float = 300
    call_timeout: float = 3600
    max_uncoalesced_vdis: int = 1
    concurrency: int = 20
    hook_secret: str | None = field(default=None, repr=False)
    """Bearer token for the hook in the guest around snapshots."""
    hook_timeout: float = 60

    @classmethod
    def from_record(cls, record: Mapping[str, Any], defaults: Mapping[str, Any]) -> Self:
        """Read XO's ``{url, credentials: {username, password}, allowUnauthorized, httpProxy}``.

        ``defaults`` holds this class's fields as the configuration names them; other names
        are not looked at.  The password is remembered as a secret.  Raises ``Refused``
        (``EINVAL``).
        """
        given = record.get("credentials")
        credentials = given if is_map(given) else {}
        url = record.get("url")
        username = credentials.get("username")
        password = credentials.get("password")
        if not isinstance(url, str):
            raise Refused("the pool has no url", code="EINVAL", data={"part": "url"})
        match = _URL.fullmatch(url)
        if match is None:
            raise _no_host_url()
        if username is None and match["user"]:
            username = unquote(match["user"])
            password = unquote(match["password"] or "")
        if not isinstance(username, str) or not isinstance(password, str):
            raise Refused("missing credentials", code="EINVAL", data={"part": "credentials"})
        secrets.remember(password)
        proxy = record.get("httpProxy") or defaults.get("http_proxy")
        if proxy:
            secrets.remember_in(
                {"password": unquote(str(proxy).rpartition("@")[0].rpartition(":")[2])}
            )
        known = {f.name for f in fields(cls)} - {"url", "username", "password"}
        chosen = {name: value for name, value in defaults.items() if name in known}
        chosen["allow_unauthorized"] = bool(
            record.get("allowUnauthorized", defaults.get("allow_unauthorized", False))
        )
        chosen["http_proxy"] = str(proxy) if proxy else None
        # The credentials leave the URL: what is left may stand in messages.
        plain = f"{match['scheme'] or 'https'}://{match['host']}"
        plain += f":{match['port']}" if match["port"] else ""
        return cls(plain + (match["path"] or ""), username, password, **chosen)

    @property
    def address(self) -> Address:
        """Where the pool's master is expected.  Raises ``InvalidParams`` on a broken URL."""
        match = _URL.fullmatch(self.url)
        if match is None or int(match["port"] or 1) not in range(1, 65536):
            raise _no_host_url()
        scheme = (match["scheme"] or "https").lower()
        port = int(match["port"] or (443 if scheme == "https" else 80))
        path = quote(match["path"] or "/", safe="/%:@!$&'()*+,;=-._~")
        return Address(scheme, match["host"].strip("[]"), port, path)
