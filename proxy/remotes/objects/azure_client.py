"""Signed requests to one container of an Azure storage account, or of azurite.

The protocol's version is pinned, because the service keeps old ones for good and changes answers
only in new ones.  2021-12-02 is the oldest that has all that is used here: blocks of 4,000 MiB
(2019-12-12), batches within one container (2020-04-08) and names in listings that XML cannot hold
(2021-02-12).
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from proxy.errors import Refused
from proxy.formats.azure_signing import Account, authorization, query_string, quoted
from proxy.remotes.objects.azure_errors import store_error, unclear
from proxy.runtime.http_pool import Exchange, HttpPool
from proxy.runtime.transport import client_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.errors import ProxyError
    from proxy.remotes.url import AzureUrl

VERSION: Final = "2021-12-02"
_LARGEST_REFUSAL: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a URL points to: ``origin`` is ``https://host[:port]``, ``base`` what stands before
    the container in every path, ``prefix`` the directory in the container, without slashes at
    its ends."""

    origin: str
    base: str
    container: str
    prefix: str

    @classmethod
    def of(cls, url: AzureUrl) -> Place:
        """Raises ``Refused`` (``EINVAL``) when the path names no container.

        The emulator is addressed by an IP, so the account stands in the path there.
        """
        container, *names = [name for name in url.path.split("/") if name not in ("", ".")] or [""]
        allowed = container.replace("-", "").isalnum() and container == container.lower()
        if not (allowed and container.isascii() and 3 <= len(container) <= 63):
            raise Refused(
                "the first name in the path of the remote must be a container: 3 to 63 lower"
                " case letters, digits and hyphens",
                code="EINVAL",
                data={"part": "path"},
            )
        base = f"/{quoted(url.username)}" if url.flavour == "azurite" else ""
        return cls(f"{url.protocol}://{url.host}", base, container, "/".join(names))


class AzureClient:
    """What all operations share; safe for concurrent use.  It tries nothing twice."""

    def __init__(self, place: Place, account: Account, pool: HttpPool) -> None:
        self.place = place
        self.account = account
        self.counts: Counter[str] = Counter()
        self._pool = pool

    @classmethod
    def of(
        cls, url: AzureUrl, *, allow_unauthorized: bool = False, seconds: float = 600
    ) -> AzureClient:
        """Nothing is sent yet.  ``seconds``: how long the service may be silent.

        ``allow_unauthorized`` takes any TLS certificate.  Raises ``Refused`` (``EINVAL``) with
        ``data.part``.
        """
        place = Place.of(url)
        account = Account.of(url.username, url.password)
        try:
            parts = urlsplit(place.origin)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            host, port = "", None
        if not host:
            raise Refused(
                "the host of the remote is malformed", code="EINVAL", data={"part": "host"}
            )
        context = None
        if url.protocol == "https":
            context = client_context(allow_unauthorized=allow_unauthorized)
        usual = 80 if context is None else 443
        return cls(place, account, HttpPool(host, port or usual, context=context, seconds=seconds))

    def path(self, key: str | None = None) -> str:
        """Of a blob, or of the container; percent-encoded."""
        path = f"{self.place.base}/{self.place.container}"
        return path if key is None else f"{path}/{quoted(key)}"

    def signed(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> dict[str, str]:
        """``headers`` and what authorises the request."""
        complete = {"x-ms-date": formatdate(time.time(), usegmt=True), **headers}
        complete["Authorization"] = authorization(self.account, method, path, query, complete)
        return complete

    @contextlib.asynccontextmanager
    async def exchange(
        self,
        verb: str,
        method: str,
        key: str | None = None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | memoryview = b"",
    ) -> AsyncIterator[Exchange]:
        """Send a request, counted under ``verb``; the block reads the answer of any status."""
        self.counts[verb] += 1
        path = self.path(key)
        length = {"Content-Length": str(len(body))} if body else {}
        signed = self.signed(
            method, path, query or {}, {"x-ms-version": VERSION, **(headers or {}), **length}
        )
        if body:
            del signed["Content-Length"]  # the connection says it itself
        async with self._pool.request(
            method, path + query_string(query or {}), [*signed.items()], body
        ) as exchange:
            yield exchange

    async def ask(
        self,
        verb: str,
        method: str,
        key: str | None = None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | memoryview = b"",
        limit: int = _LARGEST_REFUSAL,
    ) -> Answer:
        """A whole answer of any status; ``Unreachable`` when it is longer than ``limit`` bytes."""
        async with self.exchange(
            verb, method, key, query=query, headers=headers, body=body
        ) as exchange:
            # the length that a HEAD tells is that of the blob
            content = b"" if method == "HEAD" else await exchange.read_all(limit)
            if content is None:
                raise unclear(f"the answer is longer than {limit} bytes", verb, key or "")
            return Answer(exchange.status, exchange.headers, content)

    async def failure(self, exchange: Exchange, doing: str, key: str) -> ProxyError:
        """The error that the rest of an answer tells."""
        body = await exchange.read_all(_LARGEST_REFUSAL)
        return self.error(Answer(exchange.status, exchange.headers, body or b""), doing, key)

    def error(self, answer: Answer, doing: str, path: str) -> ProxyError:
        return store_error(answer.status, answer.headers, answer.body, doing, path, now=time.time())

    def expect(self, answer: Answer, status: int, doing: str, path: str) -> None:
        """Raise what ``answer`` means unless it has the one ``status`` of success.

        Another success is no confirmation: ``Unreachable`` (``EPROTO``).
        """
        if answer.status == status:
            return
        if answer.status < 300:
            raise unclear(f"the store answered {answer.status} and not {status}", doing, path)
        raise self.error(answer, doing, path)

    def close(self) -> None:
        self._pool.close()
