"""Calls at the same time, failing as one call would."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from proxy.errors import ProxyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

A = TypeVar("A")
B = TypeVar("B")


async def together(function: Callable[[A], Awaitable[B]], items: Iterable[A]) -> list[B]:
    """``function`` of every item, in the items' order.

    The first ``ProxyError`` cancels the others and is raised itself, not in a group.
    """
    inputs = list(items)
    results: dict[int, B] = {}
    failures: list[ProxyError] = []

    async def run(index: int, item: A) -> None:
        try:
            results[index] = await function(item)
        except ProxyError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for index, item in enumerate(inputs):
            nursery.start_soon(run, index, item)
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(inputs))]


async def all_of(
    function: Callable[[A], Awaitable[object]], items: Iterable[A]
) -> list[ProxyError]:
    """Run ``function`` for every item whatever the others do; the errors, none if all went well."""
    failures: list[ProxyError] = []

    async def run(item: A) -> None:
        try:
            await function(item)
        except ProxyError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for item in list(items):
            nursery.start_soon(run, item)
    return failures
