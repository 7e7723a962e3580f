"""What a dead run's health check left, running or not, is swept at the next contact."""

from __future__ import annotations

from pathlib import Path

from proxy.simulator import SimulatedPool

from .conftest import House, open_house
from .test_health_check import job, running, trials


async def dies_with(house: House, *points: str) -> None:
    """A run that cannot undo what its check made: as good as dead."""
    for point in points:
        house.pool.fail(point, error=("INTERNAL_ERROR", "stuck"), times=None)
    outcome = await house.run(job(house, "delta"))
    assert outcome.status == "failure"
    house.pool.faults.clear()


async def test_a_running_test_vm_goes_with_its_disks(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(), tmp_path) as house:
        await dies_with(house, "VM.hard_shutdown")
        (trial,) = trials(house)
        assert running(house, trial)
        copy = house.pool.vms.clone(trial, "Health Check - mine")
        outcome = await house.run(house.request(mode="delta"))
        assert outcome.status == "success", outcome.snapshot
        assert trials(house) == []
        assert house.pool.store.find("VM", copy) is not None, "somebody took a copy to keep it"
        assert len(house.pool.vms.disks(copy)) == 1
        assert "vdis" not in house.pool.leftovers()


async def test_disks_whose_test_vm_is_gone_already(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(), tmp_path) as house:
        await dies_with(house, "VDI.destroy")
        assert trials(house) == []
        assert len(house.pool.leftovers()["vdis"]) == 1
        outcome = await house.run(house.request(mode="delta"))
        assert outcome.status == "success", outcome.snapshot
        assert "vdis" not in house.pool.leftovers()
