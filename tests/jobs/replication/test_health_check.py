"""Health checks of replicas, in a run: where the task is, and that the next run is a delta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.simulator import SimulatedPool
from proxy.xapi import ownership
from tests.jobs.conftest import Outcome
from tests.jobs.test_health_check import nested

from .conftest import Pair, keys_of, open_pair

PLACES = {
    "the replica's SR": "cloning-vm",
    "another SR of its pool": "copying-vm",
    "the pool of the source": "copying-vm",
}


def settings(pair: Pair, place: str, **more: Any) -> dict[str, Any]:
    source = pair.here.store.get("SR", pair.here.srs[1])["uuid"]
    sr = {
        "the replica's SR": pair.sr,
        "another SR of its pool": pair.sr_uuid(0),
        "the pool of the source": source,
    }[place]
    return {"healthCheckSr": sr, "healthCheckTimeout": "600s", **more}


def trials(*pools: SimulatedPool) -> list[str]:
    return [
        ref
        for pool in pools
        for ref, record in pool.store.all("VM")
        if ownership.is_of_health_check(record)
    ]


async def check(pair: Pair, place: str, mode: str, **more: Any) -> Outcome:
    outcome = await pair.run(mode=mode, settings=settings(pair, place, **more))
    assert trials(pair.here, pair.there) == []
    return outcome


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_a_replica_is_checked(tmp_path: Path, mode: str, place: str) -> None:
    async with open_pair(tmp_path, disk_size=4 * 1024 * 1024) as pair:
        outcome = await check(pair, place, mode)
        assert outcome.status == "success", outcome.snapshot
        (task,) = outcome.of("health check")
        assert nested(task) == {"health check": [PLACES[place], "vmstart"]}
        (export,) = outcome.of("export")
        (vm,) = outcome.of("backup VM")
        assert task in (vm if mode == "full" else export)["tasks"]
        (replica,) = pair.vms()
        assert pair.vm(replica)["power_state"] == "Halted"
        assert "start" in pair.vm(replica)["blocked_operations"]
        assert ownership.HEALTH_CHECK not in keys_of(pair.there, "VM", replica)
        assert len(pair.vm(replica)["VIFs"]) == 1
        await pair.quiet()


async def test_a_checked_replica_is_updated_by_the_next_run(tmp_path: Path) -> None:
    async with open_pair(tmp_path) as pair:
        await check(pair, "the replica's SR", "delta")
        (replica,) = pair.vms()
        sent = len(pair.uploads())
        pair.change(1, 7)
        outcome = await check(pair, "the replica's SR", "delta")
        assert outcome.status == "success", outcome.snapshot
        assert pair.vms() == [replica]
        assert pair.digests(replica) == pair.live()
        assert sum(pair.uploads()[sent:]) < 6 * 1024 * 1024


async def test_a_guest_that_does_not_boot_leaves_the_replica(tmp_path: Path) -> None:
    async with open_pair(tmp_path, disk_size=4 * 1024 * 1024) as pair:
        pair.there.boot_seconds = -1
        outcome = await check(pair, "the replica's SR", "delta", healthCheckTimeout=300)
        assert outcome.status == "failure"
        assert outcome.error("health check")["phase"] == "tools"
        (replica,) = pair.vms()
        assert pair.digests(replica) == pair.live()
        await pair.quiet()


async def test_a_failed_check_of_distributed_targets_counts_after_a_retry_of_others(
    tmp_path: Path,
) -> None:
    async with open_pair(tmp_path, disk_size=4 * 1024 * 1024) as pair:
        pair.there.boot_seconds = -1
        pair.there.fail("/import", error=("SR_FULL", "no"))
        remotes = ("remote1", "remote2")
        retried = {"distributeBackups": True, "nRetriesVmBackupFailures": 1}
        request = pair.request(mode="full", remotes=remotes, settings=retried)
        checked = dict.fromkeys(remotes, settings(pair, "the replica's SR", healthCheckTimeout=300))
        levels = {**request.job["settings"], **checked}
        request = replace(request, job={**request.job, "settings": levels})
        outcome = await pair.house.run(request)
        (task,) = outcome.of("health check")
        assert task["status"] == "failure"
        assert task["data"]["id"] in remotes
        assert outcome.status == "failure", "only the SR was tried again"
        assert len(pair.vms()) == 1
        assert trials(pair.there) == []
