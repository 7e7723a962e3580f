"""Full backups of eight VMs, four at a time: the whole run and the daemon's memory."""

from __future__ import annotations

from benchmarks.lab import (
    MIB,
    Figures,
    Options,
    daemon,
    empty,
    exportable,
    job,
    main,
    plain_export,
    remote_spec,
    run,
    scratch,
    settle,
    simulated_pool,
)


def measure(chosen: Options) -> list[Figures]:
    size = (16 if chosen.quick else 256) * MIB
    rate = Figures("8 VMs, 4 at a time: whole run", "MB/s", goal="≥ twice 282 MB/s")
    peak = Figures("8 VMs, 4 at a time: daemon's peak RSS", "MiB", goal="-")
    with (
        scratch(chosen) as folder,
        simulated_pool(folder, size=size, vms=8) as pool,
        daemon(folder) as proxy,
        exportable(pool, pool.vms[0]) as ref,
    ):
        spec = remote_spec(folder)
        for warm_up in (True, *[False] * chosen.rounds):
            settle()
            count, seconds = plain_export(pool, ref, folder / "floor.xva")
            (folder / "floor.xva").unlink()
            settle()
            done = run(proxy, "backup.run", job(pool, spec, pool.vms, concurrency=4))
            empty(folder / spec["id"])
            if not warm_up:
                rate.add(done.transferred() / done.seconds / 1e6, count / seconds / 1e6)
        peak.add(proxy.program.peak_memory / MIB)
    return [rate, peak]


if __name__ == "__main__":
    main(__doc__, measure)
