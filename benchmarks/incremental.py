"""Incremental backups, merges and restores, each beside the least that it can cost.

Floors: the same export from socket to file with one ``fsync``; of text that goes to a directory,
the codec alone on both cores; of a merge, a copy of the bytes or the renames alone; of a
restore, the same bytes from file to socket.  Disks hold noise, which no codec makes smaller,
unless a row says text.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import brotli

from benchmarks.lab import (
    MIB,
    PIECE,
    Daemon,
    Figures,
    Options,
    Pool,
    Run,
    after_head,
    created,
    daemon,
    empty,
    exportable,
    job,
    main,
    plain_import,
    remote_spec,
    run,
    scratch,
    settle,
    started,
)
from proxy.runtime.allocator import set_up_heaps
from proxy.simulator import SimulatedPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from proxy.simulator.disks import Kind

SHARE = 0.25
KINDS = {"file": "", "directory": "?useVhdDirectory=true"}


@contextlib.contextmanager
def changing_pool(
    folder: Path, *, size: int, vms: int = 1, kind: Kind = "random", nbd: bool = False
) -> Iterator[Pool]:
    words = ["-m", "benchmarks.changing_pool", str(size), str(vms), kind, *["nbd"] * nbd]
    with started(folder, *words) as (program, line):
        yield Pool(program, json.loads(line))


def change(pool: Pool, share: float) -> None:
    """Let the guests write into so much of their disks."""
    process = pool.program.process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{share}\n")
    process.stdin.flush()
    process.stdout.readline()


def measure(chosen: Options) -> list[Figures]:
    size = (32 if chosen.quick else 2048) * MIB
    rows: list[Figures] = []
    for kind in KINDS:
        rows += one_kind(chosen, kind, size)
    return [*rows, *text(chosen, size), *over_nbd(chosen, size), *many(chosen)]


def one_kind(chosen: Options, kind: str, size: int) -> list[Figures]:
    goals = {
        "file": ("≥ twice 536, ≥ 60 % of the copy", "≥ twice 304", "≤ 0.3 s for 512 MiB"),
        "directory": ("≥ twice 162-207", "≥ twice 140-176", "< 0.2 ms a block"),
    }[kind]
    key = Figures(f"key backup to a {kind}: export", "MB/s", goal=goals[0])
    delta = Figures(f"delta of 25 % to a {kind}: export", "MB/s", goal=goals[1])
    merging = Figures(
        f"merge of 25 % into a {kind}" + ("" if kind == "file" else ", each block"),
        "s" if kind == "file" else "ms",
        goal=goals[2],
    )
    back = Figures(f"restore from a {kind}: whole run", "MB/s", goal="≥ twice 338 (file), 128")
    peak = Figures(f"incremental backups to a {kind}: daemon's peak RSS", "MiB", goal="< 200 MiB")
    with (
        scratch(chosen) as folder,
        changing_pool(folder, size=size) as pool,
        daemon(folder) as proxy,
    ):
        spec = remote_spec(folder)
        spec["url"] += KINDS[kind]
        backed_up(proxy, pool, spec)  # the first one opens connections and loads code
        for _ in range(chosen.rounds):
            empty(folder / spec["id"])
            settle()
            floor = copy_rate(pool, folder)
            settle()
            done = backed_up(proxy, pool, spec, fullInterval=1)
            key.add(size / done.spans("export")[0] / 1e6, floor)
            change(pool, SHARE)
            settle()
            done = backed_up(proxy, pool, spec, exportRetention=2)
            delta.add(size * SHARE / done.spans("transfer")[0] / 1e6, floor)
            back.add(*restored(proxy, pool, spec, folder, size))
            change(pool, SHARE)
            settle()
            done = backed_up(proxy, pool, spec, exportRetention=1)
            seconds = sum(done.spans("merge"))
            if kind == "file":
                merging.add(seconds, plain_copy(folder, round(2 * size * SHARE)))
            else:
                blocks = round(2 * size * SHARE) // PIECE
                merging.add(1000 * seconds / blocks, 1000 * renames(folder, blocks) / blocks)
        peak.add(proxy.program.peak_memory / MIB)
    return [key, delta, merging, back, peak]


def text(chosen: Options, size: int) -> list[Figures]:
    """What compresses well: the codec does the work."""
    key = Figures("key backup of text to a directory: export", "MB/s", goal="≥ twice 162-207")
    delta = Figures("delta of 25 % of text to a directory: export", "MB/s", goal="≥ twice 140-176")
    with (
        scratch(chosen) as folder,
        changing_pool(folder, size=size, kind="text") as pool,
        daemon(folder) as proxy,
    ):
        spec = remote_spec(folder)
        spec["url"] += KINDS["directory"]
        backed_up(proxy, pool, spec)
        for _ in range(chosen.rounds):
            empty(folder / spec["id"])
            settle()
            floor = codec_rate()
            done = backed_up(proxy, pool, spec, fullInterval=1)
            key.add(size / done.spans("export")[0] / 1e6, floor)
            change(pool, SHARE)
            done = backed_up(proxy, pool, spec, exportRetention=2)
            delta.add(size * SHARE / done.spans("transfer")[0] / 1e6, floor)
    return [key, delta]


def over_nbd(chosen: Options, size: int) -> list[Figures]:
    key = Figures("key backup over NBD to a file: export", "MB/s", goal="≥ twice 673")
    delta = Figures("delta of 25 % over NBD with CBT to a file: export", "MB/s", goal="≥ twice 307")
    with (
        scratch(chosen) as folder,
        changing_pool(folder, size=size, nbd=True) as pool,
        daemon(folder) as proxy,
    ):
        spec = remote_spec(folder)
        nbd = {"preferNbd": True, "nbdConcurrency": 2}
        backed_up(proxy, pool, spec, **nbd)
        for _ in range(chosen.rounds):
            empty(folder / spec["id"])
            settle()
            floor = copy_rate(pool, folder)
            settle()
            done = backed_up(proxy, pool, spec, **nbd, fullInterval=1)
            key.add(size / done.spans("export")[0] / 1e6, floor)
            change(pool, SHARE)
            settle()
            done = backed_up(proxy, pool, spec, **nbd, exportRetention=2)
            delta.add(size * SHARE / done.spans("transfer")[0] / 1e6, floor)
    return [key, delta]


def many(chosen: Options) -> list[Figures]:
    size = (16 if chosen.quick else 256) * MIB
    rate = Figures("8 VMs to directories, 4 at a time: whole run", "MB/s", goal="≥ twice 152")
    peak = Figures("8 VMs to directories: daemon's peak RSS", "MiB", goal="< 250 MiB")
    with (
        scratch(chosen) as folder,
        changing_pool(folder, size=size, vms=8) as pool,
        daemon(folder) as proxy,
    ):
        spec = remote_spec(folder)
        spec["url"] += KINDS["directory"]
        for warm_up in (True, *[False] * chosen.rounds):
            if not warm_up:
                empty(folder / spec["id"])
            settle()
            floor = copy_rate(pool, folder)
            settle()
            done = backed_up(proxy, pool, spec, fullInterval=1, concurrency=4)
            if not warm_up:
                rate.add(8 * size / done.seconds / 1e6, floor)
        peak.add(proxy.program.peak_memory / MIB)
    return [rate, peak]


def backed_up(proxy: Daemon, pool: Pool, spec: dict[str, str], **settings: Any) -> Run:
    params = job(pool, spec, pool.vms)
    params["job"]["mode"] = "delta"
    params["job"]["settings"]["schedule"] |= {"exportRetention": 5, **settings}
    return run(proxy, "backup.run", params)


def restored(
    proxy: Daemon, pool: Pool, spec: dict[str, str], folder: Path, size: int
) -> tuple[float, float]:
    """MB/s of a restore of the newest backup, and of its floor."""
    root = folder / spec["id"]
    newest = max(path for path in root.glob("xo-vm-backups/*/*.json"))
    settle()
    before = plain_disk_import(pool, folder, size)
    done = run(
        proxy,
        "backup.importVmBackup",
        {
            "backupId": f"/{newest.relative_to(root)}",
            "remote": spec,
            "srUuid": pool.sr,
            "xapi": pool.spec,
            "streamLogs": True,
        },
    )
    pool.forget_vms(set(pool.vms))
    after = plain_disk_import(pool, folder, size)
    return size / done.seconds / 1e6, statistics.mean((before, after))


# -- floors -------------------------------------------------------------------------------------


def copy_rate(pool: Pool, folder: Path) -> float:
    """MB/s of the same VHD export, from socket to file."""
    view = memoryview(bytearray(PIECE))
    with exportable(pool, pool.vms[0]) as ref:
        drives = pool.call("VM.get_VBDs", ref)
        vdis = [pool.call("VBD.get_VDI", drive) for drive in drives]
        vdi = next(each for each in vdis if each and each != "OpaqueRef:NULL")
        query = urlencode({"vdi": vdi, "format": "vhd", "session_id": pool.session})
        total = 0
        with pool.connect() as sock, created(folder / "floor") as target:
            began = time.perf_counter()
            sock.sendall(f"GET /export_raw_vdi/?{query} HTTP/1.1\r\nHost: pool\r\n\r\n".encode())
            total += os.write(target, after_head(sock))
            while count := sock.recv_into(view):
                total += os.write(target, view[:count])
            os.fsync(target)
            seconds = time.perf_counter() - began
    (folder / "floor").unlink()
    return total / seconds / 1e6


def codec_rate() -> float:
    """MB/s of brotli alone on both cores, of the text that the simulated disks hold."""
    pool = SimulatedPool.small(disk_size=8 * PIECE, kind="text")
    content = b"".join(pool.disk_bytes(pool.disk_uuids(pool.vm("vm1"))[0]))
    blocks = [content[start : start + PIECE] for start in range(0, len(content), PIECE)] * 16
    set_up_heaps()
    with ThreadPoolExecutor(2) as threads:
        began = time.perf_counter()
        for _ in threads.map(lambda block: len(brotli.compress(block, quality=0)), blocks):
            pass
        return len(blocks) * PIECE / (time.perf_counter() - began) / 1e6


def plain_copy(folder: Path, size: int) -> float:
    """Seconds to copy so many bytes from file to file, durably."""
    source, target = folder / "source", folder / "target"
    with source.open("wb") as file:
        for _ in range(size // PIECE):
            file.write(os.urandom(PIECE))
    settle()
    began = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    source.unlink()
    target.unlink()
    return seconds


def renames(folder: Path, count: int) -> float:
    """Seconds to rename so many blocks over others, durably.

    They are as large as blocks are: what is renamed over has to be freed."""
    old, new = folder / "old", folder / "new"
    block = os.urandom(PIECE)
    for each in (old, new):
        each.mkdir()
        for number in range(count):
            (each / str(number)).write_bytes(block)
    settle()
    began = time.perf_counter()
    for number in range(count):
        (old / str(number)).rename(new / str(number))
    for each in (old, new):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - began
    shutil.rmtree(old)
    shutil.rmtree(new)
    return seconds


def plain_disk_import(pool: Pool, folder: Path, size: int) -> float:
    """MB/s of a raw image from file to socket, until the pool has taken it."""
    path = folder / "image"
    with path.open("wb") as file:
        block = os.urandom(PIECE)
        for _ in range(size // PIECE):
            file.write(block)
    record = {
        "SR": pool.call("SR.get_by_uuid", pool.sr),
        "virtual_size": str(size),
        "type": "user",
        "sharable": False,
        "read_only": False,
        "other_config": {},
        "name_label": "floor",
    }
    vdi = pool.call("VDI.create", record)
    size, seconds = plain_import(pool, path, "/import_raw_vdi/", vdi=vdi, format="raw")
    pool.call("VDI.destroy", vdi)
    path.unlink()
    return size / seconds / 1e6


if __name__ == "__main__":
    main(__doc__, measure)
