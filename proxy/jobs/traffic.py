"""What runs do on remotes, in numbers: for the daemon's metrics, and in the tasks of targets."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from proxy.errors import ProxyError
from proxy.remotes.metrics import Counts, Metrics, tally
from proxy.remotes.url import parse_url
from proxy.remotes.wrapper import requests_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from proxy.remotes import Remote, RemoteOptions
    from proxy.tasks import Task

    class Opener(Protocol):
        def __call__(
            self, spec: Mapping[str, Any], /, *, options: RemoteOptions
        ) -> AbstractAsyncContextManager[Remote]: ...


_MOST_REMOTES = 50
"""Told apart by name; further ones count together."""
_PLAIN_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(slots=True)
class RemoteTraffic:
    """What was done on one remote since the daemon began.  Without secrets."""

    type: str
    """Upstream's name of the kind: ``file nfs smb s3 azure azurite``."""
    id: str
    """Xen Orchestra's, else a hash of the URL without its credentials."""
    operations: dict[str, Counts] = field(default_factory=dict[str, Counts])
    """By verb, as in :class:`proxy.remotes.wrapper.Operation`; ``open`` for connecting."""
    open: list[Remote] = field(default_factory=list["Remote"])
    _ended: Counter[str] = field(default_factory=Counter[str])

    def requests(self) -> Mapping[str, int]:
        """Requests of the protocol by its verb, of all connections that ever were."""
        total = Counter(self._ended)
        for remote in self.open:
            total.update(requests_of(remote))
        return total

    def closing(self, remote: Remote) -> None:
        self._ended.update(requests_of(remote))
        self.open.remove(remote)


class Traffic:
    """Counts since the daemon began; connections come and go meanwhile."""

    def __init__(self) -> None:
        self._remotes: dict[tuple[str, str], RemoteTraffic] = {}

    @property
    def remotes(self) -> list[RemoteTraffic]:
        return list(self._remotes.values())

    @contextlib.asynccontextmanager
    async def counted(
        self, spec: Mapping[str, Any], opener: Opener, options: RemoteOptions
    ) -> AsyncIterator[Remote]:
        """A remote that ``opener`` opens, everything on it counted."""
        traffic = self._of(spec)
        async with contextlib.AsyncExitStack() as stack:
            with _opening(traffic):
                inner = await stack.enter_async_context(opener(spec, options=options))
            remote = Metrics(inner, traffic.operations)
            traffic.open.append(remote)
            try:
                yield remote
            finally:
                traffic.closing(remote)

    def _of(self, spec: Mapping[str, Any]) -> RemoteTraffic:
        kind, name = _names(spec)
        if (kind, name) not in self._remotes and len(self._remotes) >= _MOST_REMOTES:
            name = "other"
        return self._remotes.setdefault((kind, name), RemoteTraffic(kind, name))


@contextlib.contextmanager
def _opening(traffic: RemoteTraffic) -> Iterator[None]:
    counts = traffic.operations.setdefault("open", Counts())
    try:
        yield
    except ProxyError as error:
        counts.add(0, 0, error.code)
        raise
    counts.add(0, 0, None)


def _names(spec: Mapping[str, Any]) -> tuple[str, str]:
    try:
        url = parse_url(str(spec.get("url")))
    except ProxyError:
        return "unknown", "malformed"
    given = spec.get("id")
    if isinstance(given, str) and _PLAIN_ID.fullmatch(given):
        return url.type, given
    return url.type, hashlib.sha256(url.public.encode()).hexdigest()[:12]


@contextlib.contextmanager
def told(task: Task, remote: Remote) -> Iterator[None]:
    """When the block ends, however it does, its ``task`` tells what it did on ``remote``.

    ``data.operations`` is exact: of this task and those below it.  ``data.requests`` are what
    the remote's protocol sent meanwhile, for whom each request costs money; tasks that share the
    remote at the same time count each other's.  No log record tells either.
    """
    before = Counter(requests_of(remote))
    with tally() as counts:
        try:
            yield
        finally:
            sent = Counter(requests_of(remote))
            sent.subtract(before)
            figures = {
                "operations": {verb: _described(each) for verb, each in sorted(counts.items())},
                "requests": {verb: number for verb, number in sorted(sent.items()) if number},
            }
            task.figures |= {name: figure for name, figure in figures.items() if figure}


def _described(counts: Counts) -> dict[str, Any]:
    said: dict[str, Any] = {"calls": counts.calls, "seconds": round(counts.seconds, 3)}
    if counts.size:
        said["bytes"] = counts.size
    if counts.failed:
        said["failed"] = dict(counts.failed)
    return said
