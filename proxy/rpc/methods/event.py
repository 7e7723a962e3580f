"""``event.from``: what happened to tasks since a client last asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import trio
from msgspec import Meta

from proxy.rpc.registry import Params, Registry

if TYPE_CHECKING:
    from proxy.rpc.context import Context
    from proxy.tasks import EventPage

methods = Registry()


class From(Params):
    token: str = ""
    """Of the last answer; empty for the present tasks."""
    timeout: Annotated[float, Meta(ge=0)] = 30
    """Seconds to wait for something to happen; ``api.maxEventTimeout`` at most."""


@methods.method(
    "event.from",
    From,
    description=(
        "returns what happened to tasks since token, waiting up to timeout seconds for it; "
        "reset says that the token was unknown and the events are the whole present state"
    ),
    result={
        "type": "object",
        "properties": {
            "events": {"type": "array", "items": {"type": "object"}},
            "token": {"type": "string"},
            "reset": {"type": "boolean"},
        },
        "required": ["events", "token"],
    },
)
async def events_from(context: Context, params: From) -> dict[str, Any]:
    """On cancel (the client left) nothing is lost: the token it has is still good."""
    timeout = min(params.timeout, context.settings.max_event_timeout)
    pages: list[EventPage] = []
    async with trio.open_nursery() as nursery:

        async def end_when_stopping() -> None:
            await context.stopping.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(end_when_stopping)
        pages.append(await context.services.tasks.events(params.token, timeout))
        nursery.cancel_scope.cancel()
    if not pages:
        return {"events": [], "token": params.token}
    (page,) = pages
    answer: dict[str, Any] = {"events": page.events, "token": page.token}
    return {**answer, "reset": True} if page.reset else answer
