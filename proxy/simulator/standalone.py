"""The simulated pool as a program of its own: what ``xo-proxy simulate`` runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import trio

from proxy.simulator.pool import PASSWORD, MiB, SimulatedPool
from proxy.simulator.server import serve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from proxy.simulator.disks import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorOptions:
    """How the pool looks and behaves.  Sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    port: int = 0
    tls: bool = False
    slave_host: str | None = None
    user: str = "root"
    password: str = PASSWORD
    vms: int = 1
    disks: int = 1
    disk_size: int = 64 * MiB
    seed: int = 0
    running: bool = True
    kind: Kind = "random"
    fill: float = 1.0
    """Share of each disk that is not zero."""
    disk_image: Path | None = None
    """A file that is the disk of the first VM."""
    latency: float = 0.0
    """Before the effect of the calls that change VMs and disks."""
    boot_seconds: float = 1.0
    rate: float | None = None
    """Bytes per second of each transfer; None for as fast as possible."""
    churn: float = 0.0
    """Share of each disk of a running VM that is written anew every ``churn_seconds``."""
    churn_seconds: float = 60.0
    nbd: Literal["nbd", "insecure_nbd"] | None = None
    """Serve disks over NBD, with or without TLS."""


_SLOW = """
    VM.snapshot VM.checkpoint VM.clone VM.copy VM.start VM.clean_shutdown VM.hard_shutdown
    VM.destroy VDI.destroy VDI.clone VDI.copy VDI.snapshot
""".split()  # noqa: SIM905 - a list of forty lines says no more


def build(options: SimulatorOptions) -> SimulatedPool:
    """The pool that ``options`` describe; raises ``OSError`` for an unreadable image."""
    pool = SimulatedPool(seed=options.seed, user=options.user, password=options.password)
    first = 1
    if options.disk_image is not None:
        pool.add_file_vm("vm1", options.disk_image, running=options.running)
        first = 2
    pool.add_generated(
        range(first, options.vms + 1),
        disks=options.disks,
        size=options.disk_size,
        running=options.running,
        kind=options.kind,
        fill=options.fill,
    )
    pool.boot_seconds = options.boot_seconds
    if options.nbd is not None:
        pool.enable_nbd(options.nbd)
    if options.latency:
        pool.latencies.update(dict.fromkeys(_SLOW, options.latency))
    if options.rate:
        for point in ("/export", "/import", "/export_raw_vdi", "/import_raw_vdi", "NBD"):
            pool.fail(point, rate=options.rate, times=None)
    return pool


async def churn(pool: SimulatedPool, share: float, seconds: float) -> None:
    """Play the guests: write into the disks of all running VMs, again and again."""
    while True:
        await trio.sleep(seconds)
        for vm, record in pool.store.all("VM"):
            # What is attached to dom0 is being read: no guest writes there.
            if record["power_state"] == "Running" and not record["is_control_domain"]:
                for uuid in pool.disk_uuids(vm):
                    pool.mutate(uuid, share)


async def run_standalone(
    options: SimulatorOptions,
    ready: Callable[[dict[str, Any]], None] | None = None,
    *,
    task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; ``ready`` gets :func:`standalone_info` once it listens."""
    pool = build(options)
    async with trio.open_nursery() as nursery:

        async def start(task_status: trio.TaskStatus[str]) -> None:
            await serve(
                pool,
                host=options.host,
                port=options.port,
                tls=options.tls,
                slave_host=options.slave_host,
                task_status=task_status,
            )

        await nursery.start(start)
        if options.churn:
            nursery.start_soon(churn, pool, options.churn, options.churn_seconds)
        info = standalone_info(pool)
        if ready is not None:
            ready(info)
        task_status.started(info)


def standalone_info(pool: SimulatedPool) -> dict[str, Any]:
    """What a client needs to know: ``url, user, password, pool, srs, vms``, all JSON."""
    store = pool.store
    return {
        "url": pool.url,
        "user": pool.sessions.user,
        "password": pool.sessions.password,
        "pool": store.get("pool", pool.ref)["uuid"],
        "srs": [store.get("SR", sr)["uuid"] for sr in pool.srs],
        "vms": [
            {
                "uuid": record["uuid"],
                "name": record["name_label"],
                "vdis": pool.disk_uuids(ref),
            }
            for ref, record in store.all("VM")
            if not record["is_control_domain"] and not record["is_a_snapshot"]
        ],
    }
