"""``event.from`` and ``event.inject``.

A token is ``<20 digits>,<20 digits>``: the generation of the database and of the messages.
Changes of one object collapse; an object that came and went between two calls is not told.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import XapiError
from proxy.simulator.records import BY_LOWER, SCHEMA

if TYPE_CHECKING:
    from proxy.simulator.sessions import Sessions
    from proxy.simulator.store import Record, Store

BATCH_SECONDS = 0.05
_TOKEN = re.compile(r"(\d{1,20}),(\d{1,20})\Z")


class _Wanted:
    """The subscriptions of one call."""

    def __init__(self, subscriptions: list[str]) -> None:
        self.classes: set[str] = set()
        self.refs: set[tuple[str, str]] = set()
        for text in subscriptions:
            if text == "*":
                self.classes.update(SCHEMA)
                continue
            name, _, ref = text.partition("/")
            kind = BY_LOWER.get(name.lower())
            if kind is None:
                raise XapiError("EVENT_SUBSCRIPTION_PARSE_FAILURE", [text])
            if ref:
                self.refs.add((kind, ref))
            else:
                self.classes.add(kind)

    @property
    def kinds(self) -> set[str]:
        return self.classes | {kind for kind, _ in self.refs}

    def __contains__(self, item: tuple[str, str]) -> bool:
        return item[0] in self.classes or item in self.refs


def inject(store: Store, kind: str, ref: str) -> str:
    """Touch an object; returns the token at which everybody will have seen it."""
    if kind not in SCHEMA:
        raise XapiError("HANDLE_INVALID", [kind, ref])
    return _token(store.touch(kind, ref))


def _token(generation: int) -> str:
    return f"{generation:020d},{0:020d}"


async def wait_events(
    store: Store,
    sessions: Sessions,
    session: str,
    subscriptions: list[str],
    token: str,
    timeout: float,
) -> Record:
    """Answer ``event.from``: at once when something changed since ``token``, else wait.

    Raises ``XapiError``: bad token or subscription, ``SESSION_INVALID`` as soon as the
    session ends.
    """
    wanted = _Wanted(subscriptions)
    since = 0
    if token:
        match = _TOKEN.match(token)
        if match is None:
            raise XapiError("EVENT_FROM_TOKEN_PARSE_FAILURE", [token])
        since = int(match[1])
    limit = trio.current_time() + max(0.0, timeout) if math.isfinite(timeout) else math.inf
    while True:
        sessions.check(session)
        changed = store.changed
        if _any_since(store, wanted, since):
            if wanted.kinds != {"task"} and token:
                # xapi lets a burst of changes collapse into one answer
                await trio.sleep(BATCH_SECONDS)
                sessions.check(session)
            return _answer(store, wanted, since)
        with trio.CancelScope(deadline=limit) as scope:
            await changed.wait()
        if scope.cancelled_caught:
            sessions.check(session)
            return _answer(store, wanted, since)


def _any_since(store: Store, wanted: _Wanted, since: int) -> bool:
    if store.generation <= since:
        return False
    for gone in reversed(store.deletions):
        if gone.deleted <= since:
            break
        if gone.created <= since and (gone.kind, gone.ref) in wanted:
            return True
    return any(
        modified > since and (kind, ref) in wanted
        for kind in wanted.kinds
        for ref, _, _, modified in store.entries(kind)
    )


def _answer(store: Store, wanted: _Wanted, since: int) -> Record:
    added: list[Any] = []
    changed: list[Any] = []
    removed: list[Any] = []
    for kind in wanted.kinds:
        for ref, record, created, modified in store.entries(kind):
            if modified <= since or (kind, ref) not in wanted:
                continue
            operation, into = ("add", added) if created > since else ("mod", changed)
            into.append((modified, _event(kind, ref, operation, modified, record)))
    for gone in store.deletions:
        if gone.deleted > since >= gone.created and (gone.kind, gone.ref) in wanted:
            event = _event(gone.kind, gone.ref, "del", gone.deleted, None)
            removed.append((gone.deleted, event))
    ordered = [event for part in (added, changed, removed) for _, event in sorted(part, key=_at)]
    return {
        "token": _token(store.generation),
        "events": ordered,
        "valid_ref_counts": {kind.lower(): store.count(kind) for kind in SCHEMA},
    }


def _at(item: tuple[int, Any]) -> int:
    return item[0]


def _event(kind: str, ref: str, operation: str, number: int, record: Record | None) -> Record:
    event: Record = {
        "id": str(number),
        "timestamp": "0.0",
        "class": kind.lower(),
        "operation": operation,
        "ref": ref,
    }
    if record is not None:
        event["snapshot"] = record
    return event
