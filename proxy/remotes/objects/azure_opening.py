"""From the URL of an Azure container to an open remote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proxy.errors import NotFound, ProxyError, Unauthorized
from proxy.remotes.objects.azure import AzureStore
from proxy.remotes.objects.azure_client import AzureClient
from proxy.remotes.objects.remote import ObjectRemote
from proxy.remotes.objects.retrying import OPENING_SECONDS, RetryingStore
from proxy.runtime.deadlines import deadline
from proxy.runtime.transport import NO_CONNECTION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.remotes.url import AzureUrl


async def open_azure(
    url: AzureUrl, record: Mapping[str, Any], *, seconds: float, open_seconds: float
) -> ObjectRemote:
    """Make the container where it is missing, and check that account and key work, and
    whether its blobs are immutable.

    ``record`` holds the remote's options; ``seconds`` is how long the service may be silent, and
    ``open_seconds`` bounds the whole check.  What is wrong is named in ``data.part``: of a server
    that refuses connections after 5 s, of one that does not answer them after 10 s.  On cancel
    nothing stays open.
    """
    client = AzureClient.of(
        url, allow_unauthorized=record.get("allowUnauthorized") is True, seconds=seconds
    )
    place = client.place
    below = f"{place.prefix}/" if place.prefix else ""
    store = AzureStore(client, checks_data=url.protocol == "http", probe_prefix=below)
    retrying = RetryingStore(store)
    try:
        with deadline("opening the remote", open_seconds):
            await retrying.again(lambda _: store.make_container(), seconds=OPENING_SECONDS)
            locked, _ = await retrying.again(lambda _: store.object_lock(), seconds=OPENING_SECONDS)
    except BaseException as error:
        client.close()
        if isinstance(error, ProxyError):
            raise _explained(error, url, place.container) from error
        raise
    return ObjectRemote(
        retrying,
        place.prefix,
        url=url.public,
        is_immutable=locked or record.get("immutable") is True,
    )


def _explained(error: ProxyError, url: AzureUrl, container: str) -> ProxyError:
    """The same with the part of the remote that it is about."""
    part = error.data.get("part")
    if error.code == "ENOBUCKET":
        part = "path"
    elif isinstance(error, NotFound):
        part = part or "host"  # no answer of a service that has the container
    elif error.code in NO_CONNECTION:
        part = part or "host"
    elif isinstance(error, Unauthorized):
        part = part or "password"
    data = {**error.data, **({"part": part} if part else {})}
    place = f"Azure at {url.host}, container '{container}'"
    return type(error)(f"{place}: {error.message}", code=error.code, data=data)
