"""A health check is blocked at every stage and cancelled: its VM goes, the backup stays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.simulator import GuestScript, SimulatedPool
from proxy.tasks import Task

from .conftest import House, Outcome, open_house, until
from .test_health_check import SCRIPT_TAG, clean, job, running, tag, trials

STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "reading the backup's SR": ("SR.get_by_uuid", "full", {"nth": 2}),
    "import of an archive": ("/import", "full", {"at_bytes": 2 * 1024 * 1024}),
    "the archive is sent, its task has not ended": ("/import", "full", {"stage": "after"}),
    "making the VM": ("VM.create", "delta", {"stage": "after"}),
    "making its disk": ("VDI.create", "delta", {"stage": "after"}),
    "sending its disk": ("/import_raw_vdi", "delta", {"at_bytes": 1024 * 1024}),
    "its tag": ("VM.add_tags", "delta", {}),
    "its name": ("VM.set_name_label", "delta", {"nth": 2}),
    "its networks": ("VIF.destroy", "delta", {}),
    "planning the script": ("VM.add_to_xenstore_data", "full", {}),
    "starting it, before": ("VM.start", "delta", {}),
    "starting it, after": ("VM.start", "delta", {"stage": "after"}),
    "shutting it down": ("VM.hard_shutdown", "full", {}),
    "destroying it": ("VM.destroy", "delta", {}),
    "destroying its disk": ("VDI.destroy", "delta", {}),
}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(SimulatedPool.small(), tmp_path) as opened:
        yield opened


async def cancelled(house: House, task: Task, what: Task) -> Outcome:
    await house.services.tasks.cancel(what.id)
    await trio.sleep(0.02)
    house.pool.gates.release_all()
    return await house.outcome(task)


def check_of(task: Task) -> Task:
    def walk(one: Task) -> list[Task]:
        found = [one] if one.name == "health check" else []
        for child in one.children:
            found += walk(child)
        return found

    (check,) = walk(task)
    return check


@pytest.mark.parametrize("stage", STAGES)
async def test_cancelled_at(house: House, stage: str) -> None:
    point, mode, where = STAGES[stage]
    tag(house, SCRIPT_TAG)
    house.pool.guest_script = GuestScript()
    gate = house.pool.pause_at(point, **where)
    task = house.services.start_backup(job(house, mode))
    with trio.fail_after(15):
        await gate.reached()
    check = check_of(task)
    outcome = await cancelled(house, task, task)
    assert outcome.status == "canceled"
    assert not check.pending
    assert trials(house) == []
    assert len(house.backups()) == 1
    await clean(house)


@pytest.mark.parametrize(("phase", "mode"), [("tools", "full"), ("script", "delta")])
async def test_cancelled_while_it_waits_for_the_guest(house: House, mode: str, phase: str) -> None:
    tag(house, SCRIPT_TAG)
    house.pool.boot_seconds = -1 if phase == "tools" else 0
    task = house.services.start_backup(job(house, mode))
    await until(lambda: any(running(house, ref) for ref in trials(house)), 15)
    await trio.sleep(0.1)
    assert (await cancelled(house, task, task)).status == "canceled"
    assert trials(house) == []
    await clean(house)


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_the_check_alone_is_cancelled(house: House, mode: str) -> None:
    """The backup is finished as if there had been no check."""
    house.pool.boot_seconds = -1
    task = house.services.start_backup(job(house, mode))
    await until(lambda: any(running(house, ref) for ref in trials(house)), 15)
    outcome = await cancelled(house, task, check_of(task))
    assert outcome.status == "canceled"
    (check,) = outcome.of("health check")
    assert check["status"] == "canceled"
    assert outcome.of("export")[0]["tasks"][0]["status"] == "success"
    assert outcome.of("clean-vm")[-1]["status"] == "success"
    assert trials(house) == []
    await clean(house)


async def test_the_time_of_the_vm_is_over(house: House) -> None:
    house.pool.boot_seconds = -1
    outcome = await house.run(job(house, "delta", {"vmTimeout": 1500}))
    assert outcome.status == "failure"
    assert trials(house) == []
    assert len(house.backups()) == 1
    await clean(house)


async def test_a_daemon_that_stops_takes_the_vm_along(house: House) -> None:
    house.pool.boot_seconds = -1
    task = house.services.start_backup(job(house, "full"))
    await until(lambda: any(running(house, ref) for ref in trials(house)), 15)
    house.services.cancel_all("the daemon stops")
    assert (await house.outcome(task)).status == "canceled"
    await house.services.wait_idle()
    assert trials(house) == []
