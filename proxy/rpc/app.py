"""The Quart-Trio application: the API's endpoint, and ordinary routes beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from proxy import __version__
from proxy.rpc.auth import Authenticator, bearer_as_cookie
from proxy.rpc.endpoint import Endpoint
from proxy.rpc.exposition import CONTENT_TYPE, figures, render
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.config import ApiConfig
    from proxy.rpc.auth import TokenStore
    from proxy.rpc.context import Services
    from proxy.rpc.registry import Registry
    from proxy.rpc.replies import Headers, Send

API_PATHS = frozenset({"/api/v1", "/api/v1/"})
_API_TARGETS = frozenset(path.encode() for path in API_PATHS)


class App(QuartTrio):
    """Serves the API at ``/api/v1``; everything else goes through Quart's routes."""

    def __init__(self, endpoint: Endpoint, stopping: trio.Event) -> None:
        super().__init__("proxy.rpc", static_folder=None)
        self._endpoint = endpoint
        self.connections: Callable[[], int] = _none
        """How many clients are connected; the server that runs this says it."""
        self.stopping = stopping
        """Set when the server begins to stop; calls that only wait then end."""
        # a stream may last as long as a backup
        self.config["RESPONSE_TIMEOUT"] = None
        self.config["BODY_TIMEOUT"] = None
        self.register_error_handler(HTTPException, _as_text)

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] in API_PATHS:
            await self._endpoint(scope, receive, send)
        else:
            await super().asgi_app(scope, receive, send)

    async def answer_at_once(
        self, target: bytes, headers: Headers, body: bytes, send: Send
    ) -> bool:
        """Answer a POST whose method has nothing to wait for; false: nothing was done.

        Costs half of what :meth:`asgi_app` does.  Needs no task of its own, since it only
        waits for ``send``.
        """
        return target in _API_TARGETS and await self._endpoint.at_once(headers, body, send)


def create_app(
    services: Services,
    registry: Registry,
    tokens: TokenStore,
    settings: Callable[[], ApiConfig],
) -> App:
    """The application; needs a running Trio, makes no task and opens nothing.

    ``settings`` is asked at every call, so that a reload takes effect.
    """
    stopping = trio.Event()
    authenticator = Authenticator(tokens, grace=lambda: settings().token_grace)
    app = App(Endpoint(services, registry, authenticator, settings, stopping), stopping)

    async def metrics() -> Response:
        if not settings().metrics:
            return _text("Not Found", 404)
        if authenticator.accepts(bearer_as_cookie(request.scope["headers"])) is None:
            return _text("Unauthorized", 401)
        taken = figures(services, version=__version__, connections=app.connections())
        shown = await in_thread(Work.CPU, render, taken, abandon=True)
        return Response(shown, 200, content_type=CONTENT_TYPE)

    app.add_url_rule("/metrics", "metrics", metrics, methods=["GET"])
    return app


def _none() -> int:
    return 0


def _text(text: str, status: int) -> Response:
    return Response(text, status, content_type="text/plain; charset=utf-8")


async def _as_text(error: HTTPException) -> Response:
    return _text(error.name, error.code or 500)
