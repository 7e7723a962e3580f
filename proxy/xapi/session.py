"""A session on a pool: JSON-RPC calls over HTTP, and what to do when one does not work.

XCP-ng 7.3 and later speak JSON-RPC at ``/jsonrpc``; the older XML-RPC is not offered.

Cancel: a call that only reads is given up at once (its connection is closed).  A call with
an effect can be given up until its request starts to be sent; from then on its answer is
waited for, bounded by :data:`HANDLE_SECONDS`: what it did is known, and an undo cannot be
overtaken.  One that *makes* something whose name only the answer tells (``task.create``,
``VDI.create``, ``Async.*``, the login) returns it, and the cancel strikes afterwards.
"""

from __future__ import annotations

import contextlib
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import httpx
import msgspec
import trio

from proxy.errors import ProxyError, Unauthorized, Unreachable, XapiError
from proxy.runtime import secrets
from proxy.runtime.deadlines import deadline, undo_within
from proxy.runtime.transport import client_context, connect_error
from proxy.xapi.shapes import is_list, is_map

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Sequence

    from proxy.xapi.options import Address, XapiOptions

CONNECT_SECONDS: Final = 30.0
HANDLE_SECONDS: Final = 60.0
LOGOUT_SECONDS: Final = 5.0
LARGEST_ANSWER: Final = 128 * 1024 * 1024
_REDIRECTS: Final = 3
_RETRY_DELAYS: Final = (0.5, 1, 2, 4, 8, 8, 8, 8, 8)
"""Seconds before each new try after a connection error: a toolstack restart takes so long."""
_PENDING_DELAY: Final = 5.0
_PENDING_TRIES: Final = 10
_PASSING: Final = frozenset(
    {"ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE", "ETIMEDOUT", "EHOSTUNREACH"}
)
_READ_ONLY: Final = re.compile(r"[A-Za-z_]+\.get_[a-z_A-Z]+|system\.[A-Za-z]+|event\.from")
_MAKES_HANDLE: Final = re.compile(
    r"Async\..+|[A-Za-z_]+[._]create|session\.login_with_password", re.IGNORECASE
)


class Session:
    """Calls to the master of one pool.  Many tasks may call at the same time.

    At most ``options.concurrency`` calls are in flight; ``event.from`` does not count.
    """

    def __init__(self, options: XapiOptions) -> None:
        self.options = options
        self.address: Address = options.address
        self.tls: ssl.SSLContext = client_context(allow_unauthorized=options.allow_unauthorized)
        self._ref: str | None = None
        self._login = trio.Lock()
        self._slots = trio.Semaphore(options.concurrency)
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                verify=self.tls,
                proxy=options.http_proxy,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
                trust_env=False,
            ),
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
            },
            follow_redirects=False,
        )

    @property
    def ref(self) -> str:
        """The session reference: a secret."""
        assert self._ref is not None, "not logged in"
        return self._ref

    async def open(self) -> None:
        """Log in, following ``HOST_IS_SLAVE`` to the master.

        Raises ``Unauthorized`` for wrong credentials, ``Unreachable`` for everything that
        keeps the host from answering.
        """
        async with self._login:
            await self._log_in()

    async def close(self) -> None:
        """Log out (bounded, errors do not matter) and close the connections."""
        try:
            if self._ref is not None:
                with contextlib.suppress(ProxyError), undo_within("XAPI: logout", LOGOUT_SECONDS):
                    await self._post("session.logout", [self._ref], _Attempt())
        finally:
            self._ref = None
            with trio.CancelScope(shield=True, deadline=trio.current_time() + LOGOUT_SECONDS):
                await self._http.aclose()

    async def renew(self, stale: str) -> None:
        """Log in again unless another task already replaced the session ``stale``."""
        async with self._login:
            if self._ref == stale:
                await self._log_in()

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Call ``method`` with the session prepended and return its result.

        ``timeout`` (seconds) aborts the HTTP request too; by default the inactivity timeout
        for calls that only read and the call timeout for the others.
        Raises ``XapiError`` with XAPI's code, or ``Unreachable``.
        """
        if timeout is None:
            reads = _READ_ONLY.fullmatch(method) is not None
            timeout = self.options.inactivity_timeout if reads else self.options.call_timeout
        renewed = False
        failures = redirects = pending = 0
        while True:
            session = self.ref
            attempt = _Attempt()
            try:
                if method == "event.from":
                    return await self._post(method, [session, *args], attempt, timeout)
                async with self._slots:
                    if _READ_ONLY.fullmatch(method) or _MAKES_HANDLE.fullmatch(method):
                        return await self._post(method, [session, *args], attempt, timeout)
                    post = partial(self._post, method, [session, *args], attempt, timeout)
                    return await _answered(post, attempt)
            except XapiError as error:
                if error.code == "SESSION_INVALID" and not renewed:
                    renewed = True
                    await self.renew(session)
                elif error.code == "HOST_IS_SLAVE" and redirects < _REDIRECTS:
                    # Refused before anything was done: safe to repeat on the new master.
                    redirects += 1
                    await self._follow(session, error)
                elif error.code == "TOO_MANY_PENDING_TASKS" and pending < _PENDING_TRIES:
                    pending += 1
                    await trio.sleep(_PENDING_DELAY)
                else:
                    raise
            except Unreachable as error:
                repeatable = not attempt.sent or _READ_ONLY.fullmatch(method) is not None
                if not repeatable or error.code not in _PASSING or attempt.expired:
                    raise
                if failures == len(_RETRY_DELAYS):
                    raise
                await trio.sleep(_RETRY_DELAYS[failures])
                failures += 1

    async def _follow(self, session: str, error: XapiError) -> None:
        async with self._login:
            if self._ref == session:
                self._redirect(error)
                await self._log_in()

    def _redirect(self, error: XapiError) -> None:
        if not error.params or not error.params[0]:
            raise error
        self.address = self.address.at(error.params[0])

    async def _log_in(self) -> None:
        """Holding the lock: open a session at the present address or the master behind it."""
        credentials = [self.options.username, self.options.password]
        for turn in range(_REDIRECTS + 1):
            try:
                ref = await self._post(
                    "session.login_with_password", credentials, _Attempt(), HANDLE_SECONDS
                )
            except XapiError as error:
                if error.code == "HOST_IS_SLAVE" and turn < _REDIRECTS:
                    if turn:
                        await trio.sleep(1)  # two hosts that name each other: an election
                    self._redirect(error)
                    continue
                if error.code == "SESSION_AUTHENTICATION_FAILED":
                    raise Unauthorized(
                        f"{self.address.authority} refuses the credentials of"
                        f" {self.options.username}: check the user name and password",
                        code=error.code,
                    ) from error
                raise
            if not isinstance(ref, str) or not ref:
                raise Unreachable(f"{self.address.authority} answered no session", code="EPROTO")
            secrets.remember(ref)
            self._ref = ref
            return

    async def _post(
        self, method: str, params: Sequence[Any], attempt: _Attempt, timeout: float = 60
    ) -> Any:
        peer = self.address.authority
        body = msgspec.json.encode(
            {"jsonrpc": "2.0", "id": 0, "method": method, "params": list(params)}
        )
        handle = _MAKES_HANDLE.fullmatch(method) is not None
        seconds = min(timeout, HANDLE_SECONDS) if handle and timeout else timeout
        attempt.expired = True
        with deadline(f"{peer}: {method}", seconds) as scope:

            async def trace(event: str, info: dict[str, Any]) -> None:
                request = info.get("request")
                if event.endswith("send_request_headers.started") and (
                    request is None or request.method != b"CONNECT"
                ):
                    attempt.sent = True
                    scope.shield = handle

            try:
                request = self._http.build_request(
                    "POST", self.address.url("jsonrpc"), content=body, extensions={"trace": trace}
                )
                request.stream = _Whole(body)
                response = await self._http.send(request, stream=True)
                async with contextlib.aclosing(response):
                    text = await _read(response, peer)
                    kind = response.headers.get("content-type", "")
                    status = response.status_code
            except httpx.HTTPError as error:
                attempt.expired = False
                raise _translate(error, peer) from error
        attempt.expired = False
        if not 200 <= status < 300 or kind.partition(";")[0].strip() != "application/json":
            raise Unreachable(
                f"{peer} answered HTTP {status} ({kind or 'no type'}) to {method}: not a host of"
                " XCP-ng 7.3 or later",
                code="EPROTO",
            )
        return _result(text, method, peer)


async def _answered(post: Callable[[], Awaitable[Any]], attempt: _Attempt) -> Any:
    """A call with an effect; on cancel its answer is awaited for a while before going on.

    A host finishes what it was told, whether its caller waits or not: an undo that began
    before the answer would be overtaken by the very effect that it undoes.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    outcome: list[Any] = []
    failure: list[ProxyError] = []
    done = trio.Event()
    kept = trio.CancelScope(shield=True)

    async def run() -> None:
        with kept:
            try:
                outcome.append(await post())
            except ProxyError as error:
                failure.append(error)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        try:
            await done.wait()
        except trio.Cancelled:
            kept.deadline = trio.current_time() + (HANDLE_SECONDS if attempt.sent else 0)
            raise
    if failure:
        raise failure[0]
    return outcome[0]


class _Attempt:
    """What is known about one request: whether it began to be sent, whether its time ran out."""

    def __init__(self) -> None:
        self.sent = False
        self.expired = False


class _Whole(httpx.AsyncByteStream):
    """A request's body in one piece.

    httpx's own is an async generator, which a cancel in the middle of sending leaves suspended:
    it would be finished, with a warning, when the garbage collector comes by.
    """

    def __init__(self, body: bytes) -> None:
        self._left = [body]

    def __aiter__(self) -> _Whole:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


async def _read(response: httpx.Response, peer: str) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > LARGEST_ANSWER:
            raise Unreachable(f"{peer} sent an endless answer", code="EPROTO")
    return bytes(body)


def _translate(error: httpx.HTTPError, peer: str) -> ProxyError:
    if isinstance(error, httpx.ConnectTimeout):
        return Unreachable(
            f"ETIMEDOUT: {peer} did not accept a connection within {CONNECT_SECONDS:g} s",
            code="ETIMEDOUT",
        )
    if isinstance(error, httpx.ProxyError):
        return Unreachable(f"the HTTP proxy refused to connect to {peer}", code="EPROXY")
    return connect_error(error, peer)


def _result(text: bytes, method: str, peer: str) -> Any:
    try:
        answer: Any = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise Unreachable(f"{peer} answered broken JSON to {method}", code="EPROTO") from error
    if not is_map(answer) or not ({"result", "error"} & answer.keys()):
        raise Unreachable(f"{peer} answered no JSON-RPC to {method}", code="EPROTO")
    failure = answer.get("error")
    if not failure:
        return answer.get("result")
    if is_list(failure):  # JSON-RPC 1.0 of older hosts: [code, param, …]
        code, *params = failure
    else:
        fields = failure if is_map(failure) else {}
        code = fields.get("message", "UNKNOWN")
        data = fields.get("data")
        params = data if is_list(data) else []
    raise xapi_error(str(code), params, method)


def xapi_error(code: str, params: Sequence[Any], method: str | None = None) -> XapiError:
    """An error as XAPI told it, without the secrets that its parameters may hold."""
    return XapiError(code, [secrets.scrub_text(str(p)) for p in params], method=method)
