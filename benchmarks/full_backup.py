"""A full backup of one VM, beside a plain copy of the same bytes from socket to file."""

from __future__ import annotations

import hashlib
import statistics
import time
from typing import TYPE_CHECKING

from benchmarks.lab import (
    MIB,
    Daemon,
    Figures,
    Options,
    Run,
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

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.lab import Pool


def measure(chosen: Options) -> list[Figures]:
    size = (32 if chosen.quick else 2048) * MIB
    rows: list[Figures] = []
    for tls in (False, True):
        rows += one_protocol(chosen, size, tls=tls)
    return [*rows, *memory(chosen)]


def one_protocol(chosen: Options, size: int, *, tls: bool) -> list[Figures]:
    name = "HTTPS" if tls else "HTTP"
    goal = "≥ 60 % of the copy" if tls else "≥ 70 % of the copy"
    rate = Figures(f"full backup, {name}: export to durable", "MB/s", goal=goal)
    moving = Figures(f"full backup, {name}: transfer task", "MB/s", goal="≥ twice 240-325 MB/s")
    overhead = Figures(f"full backup, {name}: run besides the transfer", "s", goal="≤ 0.45 s")
    hashing = Figures(f"full backup, {name}: beside MD5 alone on one core", "MB/s")
    cpu = Figures(f"full backup, {name}: daemon's CPU per GiB", "s")
    with (
        scratch(chosen) as folder,
        simulated_pool(folder, size=size, tls=tls) as pool,
        daemon(folder) as proxy,
        exportable(pool, pool.vms[0]) as ref,
    ):
        backed_up(proxy, pool, folder)  # the first one opens connections and loads code
        for _ in range(chosen.rounds):
            settle()
            count, before = plain_export(pool, ref, folder / "floor.xva")
            (folder / "floor.xva").unlink()
            settle()
            used = proxy.program.cpu
            done = backed_up(proxy, pool, folder)
            used = proxy.program.cpu - used
            settle()
            count, after = plain_export(pool, ref, folder / "floor.xva")
            (folder / "floor.xva").unlink()
            floor = count / statistics.mean((before, after)) / 1e6
            (transfer,) = done.spans("transfer")
            (export,) = done.spans("export")
            assert abs(done.transferred() - count) < MIB  # their ova.xml differ a little
            rate.add(count / export / 1e6, floor)
            hashing.add(count / export / 1e6, hash_rate())
            moving.add(count / transfer / 1e6, floor)
            overhead.add(done.seconds - transfer)
            cpu.add(used / count * 2**30)
    return [rate, hashing, moving, overhead, cpu]


def backed_up(proxy: Daemon, pool: Pool, folder: Path) -> Run:
    spec = remote_spec(folder)
    done = run(proxy, "backup.run", job(pool, spec, pool.vms))
    empty(folder / spec["id"])
    return done


def hash_rate() -> float:
    """MB/s of MD5, which the checksum beside each archive needs and which knows no second core."""
    block = bytes(2 * MIB)
    digest = hashlib.md5(usedforsecurity=False)
    began = time.perf_counter()
    for _ in range(256):
        digest.update(block)
    return 256 * len(block) / (time.perf_counter() - began) / 1e6


def memory(chosen: Options) -> list[Figures]:
    rows: list[Figures] = []
    for size in (16, 64) if chosen.quick else (256, 4096):
        row = Figures(f"full backup of {size} MiB: daemon's peak RSS", "MiB", goal="< 150 MiB")
        with (
            scratch(chosen) as folder,
            simulated_pool(folder, size=size * MIB) as pool,
            daemon(folder) as proxy,
        ):
            backed_up(proxy, pool, folder)
            row.add(proxy.program.peak_memory / MIB)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main(__doc__, measure)
