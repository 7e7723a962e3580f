"""What the RPC room needs from the rest of the daemon, and what a method gets per call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    import trio

    from proxy.config import ApiConfig
    from proxy.jobs import (
        BackupRequest,
        MetadataRestoreRequest,
        RestoreRequest,
        SweepRequest,
        VerifyRequest,
        VerifyRun,
    )
    from proxy.jobs.traffic import Traffic
    from proxy.remotes.interface import Remote
    from proxy.rpc.auth import Authenticator
    from proxy.rpc.registry import Registry
    from proxy.tasks import Task, Tasks


class Services(Protocol):
    """Made by the daemon, shared by all calls; the API makes none of it."""

    @property
    def tasks(self) -> Tasks: ...

    @property
    def nursery(self) -> trio.Nursery:
        """Outlives every connection: calls that change something run here."""
        ...

    @property
    def datadir(self) -> Path:
        """Where the journal lives; ``appliance.check`` looks at its disk."""
        ...

    def remote(
        self, spec: Mapping[str, Any], /, *, create: bool = True
    ) -> AbstractAsyncContextManager[Remote]:
        """Open the remote that a call describes; ``spec`` has at least ``url``.

        With ``create`` false nothing is made: a missing directory is ``NotFound``.
        """
        ...

    @property
    def traffic(self) -> Traffic:
        """What was done on remotes since the daemon began."""
        ...

    def open_connections(self) -> Mapping[str, int]:
        """How many remotes and pools are open now."""
        ...

    def start_backup(self, request: BackupRequest, /) -> Task: ...

    async def start_restore(self, request: RestoreRequest, /) -> Task: ...

    async def start_metadata_restore(self, request: MetadataRestoreRequest, /) -> Task: ...

    async def start_verify(self, request: VerifyRequest, /) -> VerifyRun: ...

    def start_sweep(self, request: SweepRequest, /) -> Task: ...

    def running_jobs(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Context:
    """Given to every method as its first argument."""

    services: Services
    settings: ApiConfig
    """As they are at this call; they may be reloaded while the daemon runs."""
    registry: Registry
    authenticator: Authenticator
    stopping: trio.Event
    """Set when the daemon begins to stop: waits for something to happen should end."""
