"""One signed S3 request at a time: bytes out, status and bytes in, errors understood."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import time
from collections import Counter
from typing import TYPE_CHECKING

from proxy.errors import Corrupt, Unreachable
from proxy.formats import s3_xml, sigv4
from proxy.remotes.objects.s3_errors import from_answer, from_code
from proxy.runtime.http_pool import HttpPool
from proxy.runtime.threads import Work, in_thread
from proxy.runtime.transport import client_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from proxy.formats.s3_xml import Element
    from proxy.remotes.objects.s3_endpoint import S3Endpoint
    from proxy.runtime.http_pool import Exchange

_WORTH_A_THREAD = 256 * 1024
_LARGEST_ERROR = 256 * 1024
_AGENT = "xo-proxy"


class S3Client:
    """Safe for any number of tasks.  ``allow_unauthorized`` takes any TLS certificate."""

    def __init__(
        self,
        endpoint: S3Endpoint,
        *,
        access_key: str,
        secret_key: str,
        allow_unauthorized: bool = False,
        seconds: float = 600,
    ) -> None:
        self.endpoint = endpoint
        self.requests: Counter[str] = Counter()
        self.content_md5 = False
        """Send Content-MD5 with every body: buckets with object lock demand it."""
        context = client_context(allow_unauthorized=allow_unauthorized) if endpoint.tls else None
        self._pool = HttpPool(endpoint.host, endpoint.port, context=context, seconds=seconds)
        self._signer = sigv4.Signer(access_key, secret_key, endpoint.region)

    def close(self) -> None:
        self._pool.close()

    @contextlib.asynccontextmanager
    async def open(
        self,
        verb: str,
        method: str,
        key: str | None,
        *,
        query: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        body: bytes | memoryview = b"",
        digest: str | None = None,
    ) -> AsyncIterator[Exchange]:
        """Send it; ``verb`` is what it counts as, ``key`` ``None`` the bucket itself.

        ``digest`` is told in place of the body's SHA-256.
        """
        path = f"/{self.endpoint.bucket}" + ("" if key is None else f"/{key}")
        target, asked = sigv4.encode_path(path), sigv4.encode_query(query)
        sent = {"host": self._pool.host_header, "user-agent": _AGENT, **(headers or {})}
        payload = sigv4.EMPTY
        if body or method in ("PUT", "POST"):
            with_md5 = self.content_md5 or "content-md5" in sent
            payload, md5 = await _hashes(body, with_md5=with_md5)
            if with_md5:
                sent["content-md5"] = md5
        if body:
            sent.setdefault("content-type", "application/octet-stream")
        signed = self._signer.sign(
            method, target, asked, sent, payload=digest or payload, now=time.time()
        )
        del signed["host"]
        self.requests[verb] += 1
        async with self._pool.request(
            method, f"{target}?{asked}" if asked else target, [*signed.items()], body
        ) as exchange:
            yield exchange

    async def call(
        self,
        verb: str,
        method: str,
        key: str | None,
        *,
        doing: str,
        query: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        body: bytes | memoryview = b"",
        digest: str | None = None,
    ) -> tuple[Mapping[str, str], bytes]:
        """The headers and the body of a good answer; others raise (:mod:`s3_errors`)."""
        async with self.open(
            verb, method, key, query=query, headers=headers, body=body, digest=digest
        ) as exchange:
            path = self._about(key, query)
            await raise_for(exchange, doing, path)
            content = await exchange.read_all(s3_xml.LARGEST)
            if content is None:
                raise Corrupt(
                    f"the answer has more than {s3_xml.LARGEST} bytes, {doing} '{path}'",
                    data={"path": path, "limit": s3_xml.LARGEST},
                )
            return exchange.headers, content

    def _about(self, key: str | None, query: Sequence[tuple[str, str]]) -> str:
        """What a request is about, for messages."""
        return key or dict(query).get("prefix") or self.endpoint.bucket


async def raise_for(exchange: Exchange, doing: str, path: str) -> None:
    """Raise what an answer that is no success says."""
    if 200 <= exchange.status < 300:
        return
    content = await exchange.read_all(_LARGEST_ERROR)
    raise from_answer(exchange.status, exchange.headers, content or b"", doing, path)


def confirmed(content: bytes, name: str, doing: str, path: str) -> Element:
    """The answer ``<name>`` in ``content``.

    A status of 200 goes out before a long operation ends; how it ended stands in the body.
    ``Corrupt`` when that is neither the answer nor an error.
    """
    try:
        root = s3_xml.parse(content)
    except Corrupt as error:
        raise Unreachable(
            f"EPROTO: the store's answer cannot be understood ({error.message}), {doing} '{path}'",
            code="EPROTO",
            data={"path": path},
        ) from error
    if root.name == "Error":
        raise from_code(root.value("Code") or "", root.value("Message") or "", 200, doing, path)
    if root.name != name:
        raise Unreachable(
            f"EPROTO: the store answers '{root.name[:64]}' for '{name}', {doing} '{path}'",
            code="EPROTO",
            data={"path": path},
        )
    return root


async def _hashes(body: bytes | memoryview, *, with_md5: bool) -> tuple[str, str]:
    def run() -> tuple[str, str]:
        md5 = ""
        if with_md5:
            md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        return hashlib.sha256(body).hexdigest(), md5

    return await in_thread(Work.CPU, run) if len(body) >= _WORTH_A_THREAD else run()
