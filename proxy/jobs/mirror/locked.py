"""Holding one VM's directory on the source and on every remote of a mirror."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.errors import ProxyError
from proxy.jobs.vm_lock import hold_vm

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping

    from proxy.remotes import Lock, Remote
    from proxy.tasks import Task


@dataclass(frozen=True, slots=True)
class Place:
    """A remote, and how many seconds its lock is waited for."""

    remote: Remote
    wait: float


async def lock_everywhere(
    stack: contextlib.AsyncExitStack,
    places: Mapping[str, Place],
    vm_uuid: str,
    *,
    needed: str,
    owner: str,
    task: Task,
) -> tuple[dict[str, Lock], dict[str, ProxyError]]:
    """The locks by the id of each place, held with ``stack``, and why others cannot be had.

    Always in the order of their URLs, so that mirrors of opposite directions do not wait for each
    other.  Raises when it is the place ``needed`` that cannot be had.  ``task`` hears of waits.
    """
    locks: dict[str, Lock] = {}
    errors: dict[str, ProxyError] = {}
    for key in sorted(places, key=lambda each: (places[each].remote.url, each)):
        place = places[key]
        try:
            locks[key] = await stack.enter_async_context(
                hold_vm(
                    place.remote,
                    vm_uuid,
                    task=task,
                    remote_id=key,
                    owner=owner,
                    wait=place.wait,
                )
            )
        except ProxyError as error:
            if key == needed:
                raise
            errors[key] = error
    return locks, errors
