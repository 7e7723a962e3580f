"""Listing 2,000 backups of 20 VMs through the API, cold and from the cache."""

from __future__ import annotations

import gzip
import json
import time
import uuid
from typing import TYPE_CHECKING

from benchmarks.lab import MIB, Figures, Options, daemon, main, remote_spec, scratch

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.lab import Daemon

_FIRST = 1_700_000_000_000
_HOUR = 3_600_000


def measure(chosen: Options) -> list[Figures]:
    vms, each = (4, 10) if chosen.quick else (20, 100)
    count = f"{vms * each} backups of {vms} VMs"
    cold = Figures(f"listing {count}, cold", "s", goal="≤ 0.24 s")
    cached = Figures(f"listing {count}, cached", "s", goal="≤ 0.05 s")
    peak = Figures(f"listing {count}: daemon's peak RSS", "MiB", goal="-")
    with scratch(chosen) as folder, daemon(folder) as proxy:
        spec = remote_spec(folder)
        remote = folder / spec["id"]
        fill(remote, vms, each)
        listed(proxy, spec, vms * each)  # the first one opens the remote and loads code
        for _ in range(chosen.rounds):
            for cache in remote.rglob("cache.json.gz"):
                cache.unlink()
            floor = plain_reading(sorted(remote.rglob("*.json")))
            cold.add(listed(proxy, spec, vms * each), floor)
            caches = sorted(remote.rglob("cache.json.gz"))
            assert len(caches) == vms
            floor = plain_reading(caches)
            cached.add(listed(proxy, spec, vms * each), floor)
        peak.add(proxy.program.peak_memory / MIB)
    return [cold, cached, peak]


def listed(proxy: Daemon, spec: dict[str, str], count: int) -> float:
    """Seconds of one listing, answer parsed."""
    began = time.perf_counter()
    answer = proxy.call("backup.listVmBackups", remotes={spec["id"]: spec})
    seconds = time.perf_counter() - began
    found = sum(len(backups) for backups in answer[spec["id"]].values())
    if found != count:
        raise RuntimeError(f"{found} backups listed of {count}")
    return seconds


def plain_reading(files: list[Path]) -> float:
    """Seconds for reading and parsing the files one after the other."""
    began = time.perf_counter()
    for path in files:
        data = path.read_bytes()
        json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return time.perf_counter() - began


def fill(remote: Path, vms: int, each: int) -> None:
    """Metadata as a full backup writes it, with archives of one byte."""
    for number in range(vms):
        vm = str(uuid.UUID(int=number + 1, version=4))
        directory = remote / "xo-vm-backups" / vm
        directory.mkdir(parents=True)
        for position in range(each):
            stamp = _FIRST + position * _HOUR
            name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(stamp / 1000))
            (directory / f"{name}.xva").write_bytes(b"x")
            (directory / f"{name}.json").write_text(json.dumps(metadata(vm, name, stamp)))


def metadata(vm: str, name: str, stamp: int) -> dict[str, object]:
    record = {
        "uuid": vm,
        "name_label": f"vm {vm[:8]}",
        "name_description": "a VM as large as records are in life",
        "other_config": {f"key{number}": "x" * 40 for number in range(20)},
        "platform": {f"flag{number}": "true" for number in range(20)},
        "tags": [],
        "VBDs": [f"OpaqueRef:{number}" for number in range(4)],
        "is_a_snapshot": False,
    }
    return {
        "jobId": "d3a0d3a0-0000-4000-8000-000000000001",
        "mode": "full",
        "scheduleId": "schedule",
        "size": 1,
        "timestamp": stamp,
        "version": "2.0.0",
        "vm": record,
        "vmSnapshot": {**record, "is_a_snapshot": True},
        "xva": f"./{name}.xva",
    }


if __name__ == "__main__":
    main(__doc__, measure)
