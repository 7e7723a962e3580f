"""A restore of one full backup, beside a plain copy of the same bytes from file to socket."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.lab import (
    MIB,
    Figures,
    Options,
    Run,
    daemon,
    job,
    main,
    plain_import,
    remote_spec,
    run,
    scratch,
    settle,
    simulated_pool,
)

if TYPE_CHECKING:
    from benchmarks.lab import Daemon, Pool


def measure(chosen: Options) -> list[Figures]:
    size = (32 if chosen.quick else 2048) * MIB
    rows: list[Figures] = []
    for tls in (False, True):
        rows += one_protocol(chosen, size, tls=tls)
    return rows


def one_protocol(chosen: Options, size: int, *, tls: bool) -> list[Figures]:
    name = "HTTPS" if tls else "HTTP"
    goal = "≥ 60 % of the copy" if tls else "≥ 70 % of the copy"
    rate = Figures(f"restore, {name}: whole run", "MB/s", goal=f"{goal}; ≥ twice 338-451 MB/s")
    cpu = Figures(f"restore, {name}: daemon's CPU per GiB", "s")
    peak = Figures(f"restore, {name}: daemon's peak RSS", "MiB", goal="< 150 MiB")
    with (
        scratch(chosen) as folder,
        simulated_pool(folder, size=size, tls=tls) as pool,
        daemon(folder) as proxy,
    ):
        spec = remote_spec(folder)
        run(proxy, "backup.run", job(pool, spec, pool.vms))
        (archive,) = (folder / spec["id"]).rglob("*.xva")
        restored(proxy, pool, spec, archive)  # the first one opens connections and loads code
        proxy.program.forget_peak()
        for _ in range(chosen.rounds):
            settle()
            count, before = plain_import(pool, archive)
            pool.forget_vms(set(pool.vms))
            used = proxy.program.cpu
            done = restored(proxy, pool, spec, archive)
            used = proxy.program.cpu - used
            count, after = plain_import(pool, archive)
            pool.forget_vms(set(pool.vms))
            rate.add(count / done.seconds / 1e6, count / statistics.mean((before, after)) / 1e6)
            cpu.add(used / count * 2**30)
        peak.add(proxy.program.peak_memory / MIB)
    return [rate, cpu, peak]


def restored(proxy: Daemon, pool: Pool, spec: dict[str, str], archive: Path) -> Run:
    """Restore into a new VM, which is then removed."""
    remote = Path(spec["url"].removeprefix("file://"))
    done = run(
        proxy,
        "backup.importVmBackup",
        {
            "backupId": f"/{archive.relative_to(remote).with_suffix('.json')}",
            "remote": spec,
            "srUuid": pool.sr,
            "xapi": pool.spec,
            "streamLogs": True,
        },
    )
    if done.transferred() != archive.stat().st_size:
        raise RuntimeError("the restore did not send the whole archive")
    pool.forget_vms(set(pool.vms))
    return done


if __name__ == "__main__":
    main(__doc__, measure)
