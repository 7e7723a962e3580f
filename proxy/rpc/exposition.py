"""``GET /metrics``: the daemon in numbers, in the text format of Prometheus.

Labels are few and bounded (50 remotes, their verbs, 32 error codes for each) and hold no secret:
a remote is named by its id, else by a hash.  Nothing here is global, so that two daemons in one
process (as in tests) have their own figures.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prometheus_client.core import Metric

    from proxy.remotes.metrics import Counts
    from proxy.rpc.context import Services

CONTENT_TYPE = CONTENT_TYPE_LATEST

_REMOTE = ("type", "remote", "verb")


@dataclass(frozen=True, slots=True)
class RemoteFigures:
    """One remote's counts at one moment."""

    labels: tuple[str, str]
    operations: Mapping[str, Counts]
    requests: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Figures:
    """What is shown, taken at one moment by :func:`figures`."""

    version: str
    remotes: tuple[RemoteFigures, ...]
    running: int
    ended: Mapping[str, int]
    waiters: int
    connections: int
    open: Mapping[str, int]
    """Connections of ours, by what they lead to: ``remote``, ``pool``."""


def figures(services: Services, *, version: str, connections: int) -> Figures:
    """Take them, in the event loop; :func:`render` may then run in a thread."""
    tasks = services.tasks.statistics()
    return Figures(
        version=version,
        remotes=tuple(
            RemoteFigures(
                labels=(one.type, one.id),
                operations={verb: each.copy() for verb, each in one.operations.items()},
                requests=dict(one.requests()),
            )
            for one in services.traffic.remotes
        ),
        running=tasks.running,
        ended=dict(tasks.ended),
        waiters=tasks.waiters,
        connections=connections,
        open=services.open_connections(),
    )


def render(taken: Figures) -> bytes:
    """The whole text.  Blocking: a few milliseconds for each ten remotes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Shown(taken))
    return generate_latest(registry)


class _Shown(Collector):
    def __init__(self, taken: Figures) -> None:
        self._taken = taken

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily("xo_proxy", "This daemon", {"version": self._taken.version})
        yield from self._daemon()
        yield from self._operations()

    def _daemon(self) -> Iterable[Metric]:
        taken = self._taken
        yield GaugeMetricFamily("xo_proxy_tasks_running", "Root tasks under way", taken.running)
        ended = CounterMetricFamily(
            "xo_proxy_tasks_ended", "Root tasks that ended, since the start", labels=["status"]
        )
        for status, count in taken.ended.items():
            ended.add_metric([status], count)
        yield ended
        yield GaugeMetricFamily(
            "xo_proxy_event_waiters", "Calls of event.from that wait", taken.waiters
        )
        yield GaugeMetricFamily(
            "xo_proxy_client_connections", "Open connections of clients", taken.connections
        )
        peers = GaugeMetricFamily(
            "xo_proxy_open_peers", "Remotes and pools that are open", labels=["peer"]
        )
        for peer, count in taken.open.items():
            peers.add_metric([peer], count)
        yield peers
        yield GaugeMetricFamily(
            "xo_proxy_resident_memory_bytes", "Memory of this process", resident_memory()
        )

    def _operations(self) -> Iterable[Metric]:
        calls = CounterMetricFamily(
            "xo_proxy_remote_operations", "Operations that ended", labels=_REMOTE
        )
        size = CounterMetricFamily("xo_proxy_remote_bytes", "Bytes written or read", labels=_REMOTE)
        seconds = CounterMetricFamily(
            "xo_proxy_remote_seconds", "Time that operations took, summed", labels=_REMOTE
        )
        errors = CounterMetricFamily(
            "xo_proxy_remote_errors", "Operations that failed", labels=[*_REMOTE, "code"]
        )
        running = GaugeMetricFamily(
            "xo_proxy_remote_operations_running", "Operations under way", labels=_REMOTE
        )
        requests = CounterMetricFamily(
            "xo_proxy_remote_requests", "Requests to object stores, by their verb", labels=_REMOTE
        )
        for remote in self._taken.remotes:
            for verb, counts in remote.operations.items():
                labels = [*remote.labels, verb]
                calls.add_metric(labels, counts.calls)
                seconds.add_metric(labels, counts.seconds)
                running.add_metric(labels, counts.running)
                if counts.size:
                    size.add_metric(labels, counts.size)
                for code, failed in counts.failed.items():
                    errors.add_metric([*labels, code], failed)
            for verb, count in remote.requests.items():
                requests.add_metric([*remote.labels, verb], count)
        yield from (calls, size, seconds, errors, running, requests)


def resident_memory() -> int:
    """Bytes, as the kernel says; 0 where it does not."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
