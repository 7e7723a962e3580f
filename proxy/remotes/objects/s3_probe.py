"""What an S3 endpoint can do: tried out, because servers ignore headers that they do not know."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from proxy.errors import Conflict, NotFound, ProxyError, Refused, Unreachable
from proxy.remotes.objects.store import Condition
from proxy.runtime.deadlines import undo_within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from proxy.remotes.objects.s3 import S3Store
    from proxy.remotes.objects.s3_client import S3Client

_NEVER = '"00000000000000000000000000000000"'
"""An etag that no object has."""
_WRONG = "0" * 64
_UNDO_SECONDS = 30


async def probe(store: S3Store, client: S3Client, prefix: str) -> Mapping[str, Any]:
    """A dozen requests on two hidden objects below ``prefix``, removed again.

    ``conditionalPut``, ``conditionalDelete``, ``checksums`` (does it verify the bytes),
    ``copy``, ``batchDelete``.  Raises when the store does not take plain objects.
    """
    # blanks and letters beyond ASCII: a store must understand names in headers and batches too
    name = f"{prefix}.xo-proxy-probe {secrets.token_hex(8)} é+"
    other = f"{name}2"
    try:
        await store.put(name, b"probe")
        found = {
            "conditionalPut": await _honours(
                lambda: store.put(name, b"other", condition=Condition(absent=True))
            )
            and await _honours(lambda: store.put(name, b"other", condition=Condition(etag=_NEVER))),
            "checksums": await _verifies(client, name),
            "copy": await _copies(store, name, other),
            "conditionalDelete": await _keeps(store, name),
        }
        found["batchDelete"] = await _deletes(store, [name, other])
    finally:
        with undo_within("removing what was tried out", _UNDO_SECONDS):
            await store.delete(name)
            await store.delete(other)
    return found


async def _honours(call: Callable[[], Awaitable[object]]) -> bool:
    """Whether a condition that does not hold stops the call."""
    try:
        await call()
    except (Conflict, NotFound):
        return True
    except Refused:
        pass
    return False


async def _verifies(client: S3Client, name: str) -> bool:
    try:
        await client.call("PUT", "PUT", name, doing="trying", body=b"damaged", digest=_WRONG)
    except Unreachable as error:
        return error.code == "ECHECKSUM"
    except ProxyError:
        # a signature over another hash than the server computes
        return True
    return False


async def _copies(store: S3Store, name: str, other: str) -> bool:
    try:
        await store.copy(name, other)
    except (Refused, NotFound):
        return False
    return True


async def _keeps(store: S3Store, name: str) -> bool:
    if not await _honours(lambda: store.delete(name, condition=Condition(etag=_NEVER))):
        return False
    try:
        await store.head(name)
    except NotFound:
        return False
    return True


async def _deletes(store: S3Store, names: list[str]) -> bool:
    try:
        outcomes = await store.delete_many(names)
    except Refused:
        return False
    return all(outcome is None for outcome in outcomes)
