"""What an Azure endpoint can do: tried out, because emulators and gateways differ."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from proxy.errors import Conflict, NotFound
from proxy.remotes.objects.store import Condition
from proxy.runtime.deadlines import undo_within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from proxy.remotes.objects.azure import AzureStore

_UNDO_SECONDS = 30


async def probe(store: AzureStore, prefix: str) -> Mapping[str, Any]:
    """A dozen requests on three hidden blobs below ``prefix``, removed again.

    ``server`` is what it calls itself.  Where a policy makes blobs immutable nothing is written,
    because it could not be removed: the service itself is known to honour conditions, and no
    emulator has policies.
    """
    locked, server = await store.object_lock()
    found: dict[str, Any] = {
        "server": server,
        "objectLock": locked,
        "conditionalPut": locked,
        "conditionalDelete": locked,
    }
    if not locked:
        found.update(await _tried(store, prefix))
    return found


async def _tried(store: AzureStore, prefix: str) -> Mapping[str, bool]:
    # blanks and letters beyond ASCII: names must survive headers and batches too
    name = f"{prefix}.xo-proxy-probe {secrets.token_hex(8)} é+"
    names = [name, f"{name}2", f"{name}3"]
    try:
        old = await store.put(name, b"1")
        etag = await store.put(name, b"2")
        upload = await store.upload(name)
        await upload.send(1, b"3")
        changes = (
            lambda: store.put(name, b"3", condition=Condition(absent=True)),
            lambda: store.put(name, b"3", condition=Condition(etag=old)),
            lambda: upload.complete(condition=Condition(absent=True)),
        )
        puts = [await _refused(change) for change in changes]
        deletes = await _refused(lambda: store.delete(name, condition=Condition(etag=old)))
        kept = await _etag(store, name) == etag
        if kept:
            await store.copy(name, names[1])
            part = await store.upload(names[2])
            await part.copy(1, names[1], 0, 1)
            await part.complete()
    finally:
        with undo_within("removing what was tried out", _UNDO_SECONDS):
            outcomes = await store.delete_many(names)
    for error in outcomes:
        if error is not None:
            raise error
    return {"conditionalPut": all(puts) and kept, "conditionalDelete": deletes and kept}


async def _refused(call: Callable[[], Awaitable[object]]) -> bool:
    """Whether a condition that does not hold stops the call."""
    try:
        await call()
    except Conflict:
        return True
    return False


async def _etag(store: AzureStore, name: str) -> str:
    try:
        return (await store.head(name)).etag
    except NotFound:
        return ""
