"""Health checks of replicas: cloned, copied in their pool, or made anew on another pool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.jobs import BackupRequest
from proxy.jobs.health_check import HealthChecks, Wanted
from proxy.simulator import DiskContent, GuestScript, SimulatedPool, serve
from proxy.tasks import Task
from proxy.xapi import guest, ownership

from .conftest import House, Outcome, open_house, until

MIB = 1024 * 1024
BLOCK = "Start operation for this vm is blocked, clone it if you want to use it."
KEYS = {
    ownership.JOB: "job",
    ownership.SCHEDULE: "schedule",
    ownership.VM: "source",
    ownership.SR: "sr",
    ownership.DATETIME: "20261124T01:00:00Z",
}


@dataclass
class Site:
    """A pool with a replica, and where its health check is to be made."""

    house: House
    other: SimulatedPool
    replica: str
    health: SimulatedPool
    """The pool of the check."""
    sr: str
    seconds: float = 600
    before: dict[str, Any] | None = None

    @property
    def pool(self) -> SimulatedPool:
        return self.house.pool

    def start(self) -> Task:
        """A run that does nothing but check the replica."""
        house = self.house
        other = {**house.xapi_spec, "url": self.other.url}
        request = BackupRequest(
            job={}, schedule={}, remotes={}, xapis={"a": house.xapi_spec, "b": other},
            record_to_xapi={},
        )  # fmt: skip
        wanted = Wanted(self.health.store.get("SR", self.sr)["uuid"], self.seconds)

        async def work(root: Task) -> None:
            async with house.services.xapi(house.xapi_spec) as xapi:
                checks = HealthChecks(house.services, request, root)
                await checks.of_replica(root, wanted, xapi, self.replica, id="SR1")

        self.before = self.state()
        return house.services.tasks.start("backup run", {}, work)

    async def run(self) -> Outcome:
        return await self.house.outcome(self.start())

    def state(self) -> dict[str, Any]:
        """Of the replica: all that a user sees of it."""
        store = self.pool.store
        vm = store.get("VM", self.replica)
        fields = ("name_label", "tags", "other_config", "blocked_operations", "xenstore_data")
        disks = self.pool.vms.disks(self.replica)
        return {
            **{field: vm[field] for field in fields},
            "VIFs": vm["VIFs"],
            "disks": [(store.get("VDI", disk)["name_label"], disk) for disk in disks],
            "digests": [self.pool.digest(store.get("VDI", disk)["uuid"]) for disk in disks],
        }

    def trials(self) -> list[str]:
        return [
            ref
            for ref, record in self.health.store.all("VM")
            if ownership.is_of_health_check(record)
        ]

    async def clean(self) -> None:
        """Nothing is left on either pool, and the replica is what it was."""
        blocked = [f"replica: {operation}" for operation in ("start", "start_on")]

        def left() -> list[dict[str, list[str]]]:
            found = [pool.leftovers(connections=True) for pool in (self.pool, self.other)]
            return [
                {k: v for k, v in each.items() if (k, v) != ("blocked_operations", blocked)}
                for each in found
            ]

        with trio.move_on_after(5):
            while left() != [{}, {}]:
                await trio.sleep(0.01)
        assert left() == [{}, {}]
        assert self.trials() == []
        assert self.state() == self.before


@asynccontextmanager
async def site(tmp_path: Path, where: str) -> AsyncIterator[Site]:
    """``where``: the replica's own SR, another SR of its pool, or another pool."""
    other = SimulatedPool.small(seed=7, running=False)
    pool = SimulatedPool(seed=3)
    contents = [DiskContent(3 * MIB, kind="text", seed=1), DiskContent(4 * MIB, kind="random")]
    replica = pool.add_vm("replica", contents, running=False)
    pool.store.update(
        "VM",
        replica,
        blocked_operations={"start": BLOCK, "start_on": BLOCK},
        other_config={**pool.store.get("VM", replica)["other_config"], **KEYS},
        xenstore_data={"vm-data/role": "db"},
        ha_restart_priority="restart",
        tags=["Continuous Replication", guest.SCRIPT_TAG],
    )
    pool.store.create("VTPM", VM=replica)
    pool.mark()
    health = other if where == "another pool" else pool
    async with open_house(pool, tmp_path) as house:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, other))
            for each in (pool, other):
                each.guest_script = GuestScript()
            yield Site(house, other, replica, health, health.srs[where == "another SR"])
            nursery.cancel_scope.cancel()


WHERE = {"its SR": "cloning-vm", "another SR": "copying-vm", "another pool": "copying-vm"}


@pytest.mark.parametrize("where", WHERE)
async def test_upstream_weakness_13_a_replica_is_checked_on_any_sr(
    tmp_path: Path, where: str
) -> None:
    async with site(tmp_path, where) as found:
        health = found.health
        gate = health.pause_at("VM.start")
        task = found.start()
        with trio.fail_after(15):
            await gate.reached()
        (ref,) = found.trials()
        trial = health.store.get("VM", ref)
        assert trial["name_label"] == "Health Check - replica"
        assert "xo:no-bak=Health Check" in trial["tags"]
        assert not {"start", "start_on"} & set(trial["blocked_operations"])
        assert trial["VIFs"] == []
        assert trial["ha_restart_priority"] == ""
        assert trial["xenstore_data"] == {"vm-data/role": "db", guest.STATE: "planned"}
        assert not set(KEYS) & set(trial["other_config"])
        marks = {
            ownership.PROXY: found.house.services.installation,
            ownership.RUN: task.id,
        }
        disks = health.vms.disks(ref)
        for record in (trial, *(health.store.get("VDI", disk) for disk in disks)):
            assert record["other_config"].items() >= marks.items()
        assert {health.store.get("VDI", disk)["SR"] for disk in disks} == {found.sr}
        assert found.before is not None
        copies = [health.digest(health.store.get("VDI", disk)["uuid"]) for disk in disks]
        assert copies == found.before["digests"]
        assert len(trial["VTPMs"]) == 1
        health.gates.release_all()
        outcome = await found.house.outcome(task)
        assert outcome.status == "success", outcome.snapshot
        (check,) = outcome.of("health check")
        assert check["data"]["id"] == "SR1"
        assert [each["data"]["name"] for each in check["tasks"]] == [WHERE[where], "vmstart"]
        await found.clean()


async def test_a_replica_without_disks_is_cloned(tmp_path: Path) -> None:
    async with site(tmp_path, "another SR") as found:
        for vbd in found.pool.store.get("VM", found.replica)["VBDs"]:
            found.pool.store.destroy("VBD", vbd)
        outcome = await found.run()
        assert outcome.status == "success"
        assert len(outcome.of("cloning-vm")) == 1


async def test_the_guest_of_the_copy_fails(tmp_path: Path) -> None:
    async with site(tmp_path, "another pool") as found:
        found.health.guest_script = GuestScript("failure", "no data")
        outcome = await found.run()
        assert outcome.status == "failure"
        assert outcome.error("health check")["code"] == "EHEALTHSCRIPT"
        await found.clean()


FAILING = {
    "its SR": [
        "VM.add_to_other_config", "VM.clone", "VDI.add_to_other_config", "VM.set_name_label",
    ],
    "another SR": ["VM.copy", "VM.add_tags", "VM.set_ha_restart_priority"],
    "another pool": [
        "VM.create", "VDI.create", "VBD.create", "VDI.set_name_label",
        "VTPM.create", "/import_raw_vdi", "VM.remove_from_blocked_operations",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("where", "point"), [(where, point) for where, points in FAILING.items() for point in points]
)
async def test_a_call_fails(tmp_path: Path, where: str, point: str) -> None:
    async with site(tmp_path, where) as found:
        fault = found.health.fail(point, error=("INTERNAL_ERROR", "db"))
        outcome = await found.run()
        assert fault.hits == 1
        assert outcome.status == "failure"
        assert outcome.error("health check")["code"] == "INTERNAL_ERROR"
        await found.clean()


@pytest.mark.parametrize("fault", [{"cut": "reset", "after_bytes": MIB}, {"cut": "end"}])
async def test_the_replica_cannot_be_read_to_its_end(tmp_path: Path, fault: dict[str, Any]) -> None:
    async with site(tmp_path, "another pool") as found:
        found.pool.fail("/export_raw_vdi", **fault)
        outcome = await found.run()
        assert outcome.status == "failure"
        assert [each["status"] for each in outcome.of("copying-vm")] == ["failure"]
        assert outcome.of("vmstart") == []
        await found.clean()


async def test_a_copy_whose_task_got_lost_is_found(tmp_path: Path) -> None:
    """A toolstack that restarts forgets the task: the copy may be there all the same."""
    async with site(tmp_path, "its SR") as found:
        gate = found.pool.pause_at("VM.clone", stage="after")
        task = found.start()
        with trio.fail_after(15):
            await gate.reached()
        (pending,) = [
            ref
            for ref, record in found.pool.store.all("task")
            if record["name_label"] == "Async.VM.clone"
        ]
        found.pool.store.destroy("task", pending)
        outcome = await found.house.outcome(task)
        assert outcome.error("health check")["code"] == "TASK_DESTROYED"
        found.pool.gates.release_all()
        await found.clean()


STAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("its SR", "VM.add_to_other_config", {"stage": "after"}),
    ("its SR", "VM.clone", {"stage": "after"}),
    ("its SR", "VM.add_tags", {}),
    ("its SR", "VM.start", {"stage": "after"}),
    ("another SR", "VM.copy", {"stage": "after"}),
    ("another pool", "VM.create", {"stage": "after"}),
    ("another pool", "VDI.create", {"stage": "after"}),
    ("another pool", "VBD.create", {"stage": "after"}),
    ("another pool", "/import_raw_vdi", {"at_bytes": MIB}),
    ("another pool", "VTPM.create", {"stage": "after"}),
    ("another pool", "VM.start", {}),
]


@pytest.mark.parametrize(("where", "point", "how"), STAGES)
async def test_cancelled_at(tmp_path: Path, where: str, point: str, how: dict[str, Any]) -> None:
    async with site(tmp_path, where) as found:
        gate = found.health.pause_at(point, **how)
        task = found.start()
        with trio.fail_after(15):
            await gate.reached()
        await found.house.services.tasks.cancel(task.id)
        await trio.sleep(0.02)
        found.health.gates.release_all()
        outcome = await found.house.outcome(task)
        assert outcome.status == "canceled"
        await found.clean()


async def test_a_copy_that_cannot_be_cancelled_goes_when_it_is_there(tmp_path: Path) -> None:
    async with site(tmp_path, "another SR") as found:
        found.pool.fail("VM.copy", ignore_cancel=True, delay=0.3)
        task = found.start()
        await until(lambda: bool(found.pool.store.get("VM", found.replica)["current_operations"]))
        await found.house.services.tasks.cancel(task.id)
        assert (await found.house.outcome(task)).status == "canceled"
        await found.clean()
