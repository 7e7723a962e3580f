"""``POST /api/v1``: one JSON-RPC call per request, at the level of ASGI.

A call costs as little as possible here: XO's health checks and listings are many and small.
Whoever serves this must cancel it when its client goes away, as :mod:`proxy.rpc.connection`
does; calls that change something run in the daemon's nursery and are not touched by that.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import structlog
import trio

from proxy.errors import ProxyError, Refused
from proxy.rpc.context import Context
from proxy.rpc.envelope import Malformed, describe, failure, parse
from proxy.rpc.registry import MethodNotFound
from proxy.rpc.replies import Reply, answer_now, answer_when_ready
from proxy.runtime.secrets import remember_in

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from proxy.config import ApiConfig
    from proxy.rpc.auth import Authenticator
    from proxy.rpc.context import Services
    from proxy.rpc.envelope import Call
    from proxy.rpc.registry import Method, Registry
    from proxy.rpc.replies import Headers, Send

    Receive = Callable[[], Awaitable[Any]]

logger = structlog.get_logger(__name__)

_REASONS = {
    200: b"",
    401: b"Unauthorized",
    405: b"Method Not Allowed",
    413: b"Payload Too Large",
    501: b"Not Implemented",
    503: b"Service Unavailable",
}
_WHOLE_BODIES = 2
"""Bodies of the largest size that may be in memory together while they arrive."""
_KNOWN_VERBS = {"GET", "HEAD", "PUT", "PATCH", "DELETE"}


class Endpoint:
    """Answers the API's URL.  Safe for any number of concurrent calls."""

    def __init__(
        self,
        services: Services,
        registry: Registry,
        authenticator: Authenticator,
        settings: Callable[[], ApiConfig],
        stopping: trio.Event,
    ) -> None:
        self._services = services
        self._registry = registry
        self._authenticator = authenticator
        self._settings = settings
        self._stopping = stopping
        self._arriving = 0
        """Bytes of bodies that are not complete."""

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        verb = scope["method"]
        if verb != "POST":
            status = 200 if verb == "OPTIONS" else 405 if verb in _KNOWN_VERBS else 501
            await _plain(send, status, (b"allow", b"POST"))
            return
        headers: Headers = scope["headers"]
        token = self._authenticator.accepts(headers)
        if token is None:
            await _plain(send, 401)
            return
        settings = self._settings()
        body = await self._read(headers, receive, settings)
        if body is None:
            return
        if isinstance(body, int):
            await _plain(send, body, (b"connection", b"close"))
            return
        reply = Reply(send, functools.partial(self._headers, token))
        try:
            call = parse(body)
        except Malformed as error:
            await reply.finish(failure(error.identity, error))
            return
        del body  # it may be XO's whole configuration, and a run takes hours
        method = self._registry.find(call.method)
        if method is None:
            await reply.finish(failure(call.identity, MethodNotFound(call.method)))
            return
        await self._call(call, method, reply, settings)

    async def at_once(self, headers: Headers, body: bytes, send: Send) -> bool:
        """Answer a call of a method that does not wait; false for any other, untouched."""
        token = self._authenticator.accepts(headers)
        settings = self._settings()
        if token is None or len(body) > settings.max_body_size:
            return False
        try:
            call = parse(body)
            method = self._registry[call.method]
        except ProxyError:
            return False
        if method.waits:
            return False
        await self._call(
            call, method, Reply(send, functools.partial(self._headers, token)), settings
        )
        return True

    def _headers(self, token: bytes) -> Headers:
        news = self._authenticator.news_for(token)
        return [] if news is None else [(b"set-cookie", news)]

    async def _read(
        self, headers: Headers, receive: Receive, settings: ApiConfig
    ) -> bytes | bytearray | int | None:
        """The body; or the status that refuses it; or ``None`` when the client left."""
        limit = settings.max_body_size
        for name, value in headers:
            if name == b"content-length" and int(value) > limit:
                return 413
        event = await receive()
        if event["type"] == "http.request" and not event["more_body"]:
            whole: bytes = event["body"]
            return whole if len(whole) <= limit else 413
        body = bytearray()
        try:
            while True:
                if event["type"] != "http.request":
                    return None
                body += event["body"]
                self._arriving += len(event["body"])
                if len(body) > limit:
                    return 413
                if self._arriving > _WHOLE_BODIES * limit:
                    logger.warning("too many large requests at once", bytes=self._arriving)
                    return 503
                if not event["more_body"]:
                    return body
                event = await receive()
        finally:
            self._arriving -= len(body)

    async def _call(self, call: Call, method: Method, reply: Reply, settings: ApiConfig) -> None:
        try:
            if method.carries_secrets:
                remember_in(call.params)
            params = method.read_params(call.params)
        except Exception as error:  # noqa: BLE001  the client is told
            await reply.finish(failure(call.identity, error))
            return
        context = Context(
            services=self._services,
            settings=settings,
            registry=self._registry,
            authenticator=self._authenticator,
            stopping=self._stopping,
        )
        work = functools.partial(method.function, context, params)
        if not method.waits:
            await answer_now(reply, call.identity, work)
            return
        if method.changes:
            work = functools.partial(self._in_daemon, method, work)
        # a space would begin an answer in JSON
        is_binary = method.result.get("x-stream") == "binary"
        interval = 0.0 if is_binary else settings.keep_alive_interval
        await answer_when_ready(reply, call.identity, interval, work)

    async def _in_daemon(self, method: Method, work: Callable[[], Awaitable[Any]]) -> Any:
        """Run ``work`` in the daemon's nursery and wait for it.

        A cancel of this call (its client left) ends the waiting, not the work.
        """
        put, outcome = trio.open_memory_channel["tuple[Any, Exception | None]"](1)
        try:
            self._services.nursery.start_soon(_detached, method.name, work, put)
        except RuntimeError as error:
            raise _stopping() from error
        with outcome:
            try:
                result, failed = await outcome.receive()
            except trio.EndOfChannel as error:
                raise _stopping() from error
        if failed is not None:
            raise failed
        return result


def _stopping() -> Refused:
    return Refused("the daemon is stopping: call again when it is back", code="ESHUTDOWN")


async def _detached(
    name: str,
    work: Callable[[], Awaitable[Any]],
    put: trio.MemorySendChannel[tuple[Any, Exception | None]],
) -> None:
    with put:
        result: Any = None
        failed: Exception | None = None
        try:
            result = await work()
        except Exception as error:  # noqa: BLE001  it is handed to the caller
            failed = error
        try:
            put.send_nowait((result, failed))
        except trio.BrokenResourceError:
            if failed is not None:
                logger.warning(
                    "call failed after its client left", method=name, error=describe(failed)
                )
            elif hasattr(result, "aclose"):
                await result.aclose()


async def _plain(send: Send, status: int, *headers: tuple[bytes, bytes]) -> None:
    text = _REASONS[status]
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"content-length", b"%d" % len(text)),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": text})
