"""Two pools: VMs on the one are replicated to an SR of the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from proxy.jobs import BackupRequest
from proxy.simulator import SimulatedPool, serve
from proxy.simulator.disks import DiskContent
from proxy.tasks import Task
from proxy.xapi import ownership
from tests.jobs.conftest import House, Outcome, open_house

MIB = 1024 * 1024
BLOCK = 2 * MIB

_VOLATILE = {
    *("allowed_operations", "VBDs", "VIFs", "VTPMs", "parent", "children", "snapshots"),
    *("metrics", "uuid", "sm_config", "physical_utilisation", "memory_target"),
}


@dataclass
class Pair:
    """The house with its pool, and the pool that replicas go to."""

    house: House
    there: SimulatedPool

    @property
    def here(self) -> SimulatedPool:
        return self.house.pool

    @property
    def sr(self) -> str:
        """UUID of the SR that replicas go to."""
        return self.sr_uuid(1)

    def sr_uuid(self, number: int) -> str:
        return str(self.there.store.get("SR", self.there.srs[number])["uuid"])

    def request(
        self,
        *,
        srs: tuple[str, ...] | None = None,
        remotes: tuple[str, ...] = (),
        mode: str = "delta",
        settings: dict[str, Any] | None = None,
        to: SimulatedPool | None = None,
        **job: Any,
    ) -> BackupRequest:
        uuids = (self.sr,) if srs is None else srs
        made = self.house.request(
            remotes=remotes,
            mode=mode,
            settings={"copyRetention": 2, **(settings or {})},
            srs={"id": {"__or": list(uuids)}},
            **job,
        )
        spec = {**self.house.xapi_spec, "url": (to or self.there).url}
        return replace(
            made,
            xapis={**made.xapis, "xapi2": spec},
            record_to_xapi={**made.record_to_xapi, **dict.fromkeys(uuids, "xapi2")},
        )

    async def run(self, **how: Any) -> Outcome:
        return await self.house.run(self.request(**how))

    async def good(self, **how: Any) -> Outcome:
        outcome = await self.run(**how)
        assert outcome.status == "success", outcome.snapshot
        return outcome

    def start(self, **how: Any) -> Task:
        return self.house.services.start_backup(self.request(**how))

    # -- what is there, from the simulator's store -------------------------------------------

    def replicas(self, sr: str | None = None) -> list[str]:
        """The snapshots of replicas on the pool, oldest first."""
        found = [
            (record["other_config"][ownership.DATETIME], record["name_label"], ref)
            for ref, record in self.there.store.all("VM")
            if record["is_a_snapshot"]
            and record["other_config"].get(ownership.SR) == (sr or self.sr)
        ]
        return [ref for _, _, ref in sorted(found)]

    def vms(self) -> list[str]:
        """VMs on the other pool that are no snapshots."""
        return [
            ref
            for ref, record in self.there.store.all("VM")
            if not record["is_a_snapshot"] and not record["is_control_domain"]
        ]

    def vm(self, ref: str) -> dict[str, Any]:
        return self.there.store.get("VM", ref)

    def digests(self, ref: str) -> list[str]:
        """Of the disks of a VM on the other pool, by device."""
        return [self.there.digest(uuid) for uuid in self.there.disk_uuids(ref)]

    def live(self, vm: str = "vm1") -> list[str]:
        return [self.here.digest(uuid) for uuid in self.here.disk_uuids(self.here.vm(vm))]

    def change(self, block: int, fill: int, disk: int = 0) -> None:
        uuid = self.here.disk_uuids(self.here.vm("vm1"))[disk]
        self.here.write(uuid, block * BLOCK + 4096, bytes([fill]) * 8192)

    def orphans(self) -> list[str]:
        """Names of disks on the other pool that no VM has."""
        return [
            vdi["name_label"]
            for _, vdi in self.there.store.all("VDI")
            if vdi["managed"] and not vdi["VBDs"]
        ]

    def uploads(self) -> list[int]:
        """Bytes of each import on the other pool so far."""
        return [
            each.sent
            for each in self.there.transfer_log
            if each.path in ("/import", "/import_raw_vdi")
        ]

    async def quiet(self) -> None:
        """Assert that nothing unfinished is on the other pool."""
        with trio.move_on_after(5):
            while self.there.transfers or self.there.connections or self.there.sessions.open:
                await trio.sleep(0.01)
        left = self.there.leftovers(connections=True)
        for key in ("importing", "dom0_vbds", "current_operations", "tasks", "transfers"):
            assert key not in left, left
        for key in ("unfinished", "connections", "sessions"):
            assert key not in left, left
        for kind in ("VM", "VDI"):
            marked = [
                record["name_label"]
                for _, record in self.there.store.all(kind)
                if {ownership.RUN, ownership.PROXY} & record["other_config"].keys()
            ]
            assert marked == []


def _signature(content: DiskContent) -> object:
    """What a disk is made of: equal for equal content of one disk, and cheap."""
    return content.size, dict(content._written)  # pyright: ignore[reportPrivateUsage]


def state(pool: SimulatedPool) -> dict[str, Any]:
    """All that a user can tell of a pool's VMs and disks, but for what a host numbers itself."""
    store = pool.store
    vms: dict[str, Any] = {}

    def without(kind: str, ref: str) -> dict[str, Any]:
        return {k: v for k, v in store.get(kind, ref).items() if k not in _VOLATILE}

    for ref, record in store.all("VM"):
        if record["is_control_domain"]:
            continue
        vms[ref] = {
            **without("VM", ref),
            "uuid": record["uuid"],
            "snapshots": sorted(record["snapshots"]),
            "drives": sorted(
                (without("VBD", each) for each in record["VBDs"]),
                key=lambda one: str(one["userdevice"]),
            ),
            "nics": sorted(
                (without("VIF", each) for each in record["VIFs"]),
                key=lambda one: str(one["device"]),
            ),
            "tpms": [pool.vtpm_contents.get(each) for each in record["VTPMs"]],
        }
    vdis = {
        ref: {
            **without("VDI", ref),
            "uuid": record["uuid"],
            "content": _signature(pool.disks.contents[ref]),
        }
        for ref, record in store.all("VDI")
        if record["managed"]
    }
    return {"vms": vms, "vdis": vdis}


def differences(now: dict[str, Any], before: dict[str, Any], where: str = "") -> list[str]:
    """Where two states differ, for the reader of a failed test."""
    found = [f"{where}/{key}" for key in now.keys() ^ before.keys()]
    for key in now.keys() & before.keys():
        new, old = now[key], before[key]
        if isinstance(new, dict) and isinstance(old, dict):
            found += differences(
                cast("dict[str, Any]", new), cast("dict[str, Any]", old), f"{where}/{key}"
            )
        elif new != old:
            found.append(f"{where}/{key}: {new!r} was {old!r}")
    return found


def keys_of(pool: SimulatedPool, kind: str, ref: str) -> dict[str, str]:
    """The keys of backups in ``other_config``."""
    config = pool.store.get(kind, ref)["other_config"]
    return {key: value for key, value in config.items() if key.startswith(("xo:backup", "xo:copy"))}


@asynccontextmanager
async def open_pair(
    root: Path, there: SimulatedPool | None = None, **pool: Any
) -> AsyncIterator[Pair]:
    options: dict[str, Any] = {"disk_size": 16 * MIB, **pool}
    other = there or SimulatedPool(seed=77)
    async with open_house(SimulatedPool.small(**options), root) as house:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, other, tls=False))
            try:
                yield Pair(house, other)
            finally:
                house.services.cancel_all("the test is over")
                with trio.CancelScope(shield=True), trio.move_on_after(10):
                    await house.services.wait_idle()
            nursery.cancel_scope.cancel()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """One running VM with a disk of 16 MiB, and a pool without VMs."""
    async with open_pair(tmp_path) as opened:
        yield opened
