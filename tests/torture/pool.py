"""The simulated pool as a program that remembers what each snapshot held.

Its guests write all the time.  Prints what ``xo-proxy simulate`` prints; each line on standard
input is a command (JSON) and is answered by one line.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from typing import Any
from unittest import mock

import trio

from proxy.simulator import SimulatedPool, serve, standalone_info
from proxy.simulator.disks import BLOCK, DiskContent
from proxy.simulator.standalone import churn

VMS = 2
SIZE = 3 * BLOCK
_RATE = 60e6
"""Bytes a second of each transfer: there must be time to be killed in."""
_LATENCY = 0.01


class Memory:
    """The content of every disk snapshot that ever was, by uuid; contents share what is equal."""

    def __init__(self, pool: SimulatedPool) -> None:
        self._pool = pool
        self._snapshot = pool.disks.snapshot
        self._contents: dict[str, DiskContent] = {}

    def snapshot(self, vdi: str, options: Any = None) -> str:
        ref = self._snapshot(vdi, options)
        uuid = str(self._pool.store.get("VDI", ref)["uuid"])
        self._contents[uuid] = self._pool.disks.contents[ref].copy()
        return ref

    def digest(self, uuid: str) -> str | None:
        content = self._contents.get(uuid)
        if content is None:
            return None
        sha = hashlib.sha256()
        for chunk in content.chunks():
            sha.update(chunk)
        return sha.hexdigest()


class Commands:
    def __init__(self, pool: SimulatedPool, memory: Memory) -> None:
        self._pool = pool
        self._memory = memory
        self._original = {ref for ref, _ in pool.store.all("VM")}
        self._disks = {ref for ref, _ in pool.store.all("VDI")}

    def __call__(self, line: str) -> Any:
        command = json.loads(line)
        match command.pop("do"):
            case "digests":
                return {uuid: self._memory.digest(uuid) for uuid in command["uuids"]}
            case "state":
                return self.state()
            case "made":
                return self.made()
            case "forget":
                return self.forget(command["vm"])
            case "records":
                return list(self._pool.store.all(command["class"]))
            case unknown:
                raise AssertionError(unknown)

    def state(self) -> dict[str, Any]:
        """What a run may have left."""
        store = self._pool.store
        found = self._pool.leftovers()
        found.pop("tasks", None)  # the host forgets them by itself
        found.pop("vms", None)  # asked for by "made"
        found.pop("snapshots", None)
        for _, record in store.all("VM"):
            keys = record["other_config"]
            if record["is_a_snapshot"] and "xo:backup:exported" in keys:
                found.setdefault("bases", []).append(keys["xo:backup:vm"])
            elif record["is_a_snapshot"]:
                job = keys.get("xo:backup:job", "none")
                found.setdefault("other snapshots", []).append(job)
        found["vdis"] = self._lone_disks()
        found["marks"] = [
            f"{kind} {record['name_label']} {key}"
            for kind in ("VM", "VDI")
            for _, record in store.all(kind)
            for key in ("xo:backup:proxy", "xo:backup:run")
            if key in record["other_config"]
        ]
        return {key: value for key, value in found.items() if value}

    def _lone_disks(self) -> list[str]:
        """The jobs of disks that no VM has."""
        return [
            record["other_config"].get("xo:backup:job", "none")
            for ref, record in self._pool.store.all("VDI")
            if ref not in self._disks
            and record["managed"]
            and not record["VBDs"]
            and not self._is_lost_clone(record)
        ]

    @staticmethod
    def _is_lost_clone(record: dict[str, Any]) -> bool:
        """A clone of a base, not marked yet: nothing tells it from one that a user made."""
        return not record["is_a_snapshot"] and "xo:backup:job" in record["other_config"]

    def made(self) -> list[dict[str, Any]]:
        """The VMs that restores have made."""
        pool = self._pool
        return [
            {
                "ref": ref,
                "uuid": record["uuid"],
                "name": record["name_label"],
                "digests": sorted(pool.digest(uuid) for uuid in pool.disk_uuids(ref)),
            }
            for ref, record in pool.store.all("VM")
            if ref not in self._original and not record["is_a_snapshot"]
        ]

    def forget(self, vm: str) -> None:
        disks = self._pool.vms.disks(vm)
        self._pool.do("VM.destroy", vm)
        for disk in disks:
            self._pool.do("VDI.destroy", disk)


async def main(seed: int) -> None:
    pool = SimulatedPool.small(vms=VMS, disks_per_vm=2, disk_size=SIZE, seed=seed, fill=0.7)
    pool.enable_nbd("insecure_nbd")
    for ref, record in pool.store.all("VDI"):
        if record["managed"]:
            pool.do("VDI.enable_cbt", ref)
    for point in ("/export", "/import", "/export_raw_vdi", "/import_raw_vdi", "NBD"):
        pool.fail(point, rate=_RATE, times=None)
    for call in ("VM.snapshot", "VM.destroy", "VDI.destroy", "VM.create", "VDI.create"):
        pool.latencies[call] = _LATENCY
    memory = Memory(pool)
    commands = Commands(pool, memory)
    pool.mark()
    with mock.patch.object(pool.disks, "snapshot", memory.snapshot):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, pool))
            nursery.start_soon(churn, pool, 0.3, 0.2)
            print(json.dumps(standalone_info(pool)), flush=True)
            async for line in trio.wrap_file(sys.stdin):
                print(json.dumps(commands(line)), flush=True)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
