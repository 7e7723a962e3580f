"""``authentication.setToken``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from proxy.rpc.registry import Params, Registry

if TYPE_CHECKING:
    from proxy.rpc.context import Context

methods = Registry()


class Token(Params):
    token: Annotated[str, Meta(min_length=1)]


@methods.method(
    "authentication.setToken",
    Token,
    description="change the authentication token used by this XO Proxy",
    changes=True,
    result={"type": "boolean"},
)
async def set_token(context: Context, params: Token) -> None:
    """The new token is durable and valid when the answer goes out."""
    await context.authenticator.rotate(params.token)
