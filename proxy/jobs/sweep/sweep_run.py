"""``backup.sweep``: what dead runs left on pools and remotes, at a client's word."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from proxy.jobs.services import Services
    from proxy.jobs.sweep.findings import Report
    from proxy.tasks import Task


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """As received; both maps hold credentials."""

    xapis: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, "Mapping[str, Any]"])
    remotes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, "Mapping[str, Any]"])
    dry_run: bool = False


async def run_sweep(services: Services, request: SweepRequest, root: Task) -> dict[str, Any]:
    """The work of the root task; its result is of each pool and remote what went and what stays.

    One that fails is a failed task, and the others are swept.  In its place in the result stands
    ``error`` beside what was done until then.
    """
    pools: dict[str, Any] = {}
    remotes: dict[str, Any] = {}

    async def one(
        kind: str, name: str, into: dict[str, Any], sweep: Callable[[Task], Awaitable[Report]]
    ) -> None:
        try:
            async with root.child(f"sweep {kind}", id=name, type=kind) as task:
                report = await sweep(task)
                into[name] = task.result = report.as_data()
                if report.errors:
                    task.info("what was swept and what is left", report.as_data())
                    raise report.errors[0]
        except Exception as error:  # noqa: BLE001  in the log of the task
            into[name] = {"swept": [], "left": [], **into.get(name, {}), "error": str(error)}

    async def pool(name: str, spec: Mapping[str, Any]) -> None:
        async def sweep(_: Task) -> Report:
            async with services.xapi(spec) as xapi:
                return await services.sweeper.sweep_pool(xapi, dry_run=request.dry_run)

        await one("pool", name, pools, sweep)

    async def remote(name: str, spec: Mapping[str, Any]) -> None:
        async def sweep(_: Task) -> Report:
            async with services.remote(spec, create=False) as opened:
                return await services.sweeper.sweep_remote(
                    opened, owner=root.id, dry_run=request.dry_run
                )

        await one("remote", name, remotes, sweep)

    async with trio.open_nursery() as nursery:
        for name, spec in request.xapis.items():
            nursery.start_soon(pool, name, spec)
        for name, spec in request.remotes.items():
            nursery.start_soon(remote, name, spec)
    return {"dryRun": request.dry_run, "pools": pools, "remotes": remotes}
