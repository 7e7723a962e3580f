"""The guide's calls are made, in its order, on simulated pools: each does what it says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.jobs import BackupRequest, MetadataRestoreRequest, RestoreRequest
from proxy.repository import list_config_backups, list_pool_backups, list_vm_backups
from proxy.simulator import SimulatedPool, serve
from tests.documents import GUIDE, named_json
from tests.jobs.conftest import House, Outcome, open_house

RUNS = [
    "full",
    "incremental",
    "snapshots",
    "replicate-full",
    "replicate-incremental",
    "mirror",
    "mirror-full",
    "metadata",
    "checked",
    "distributed",
]
RESTORES = ["restore", "restore-pool", "restore-xo"]


def test_every_call_of_the_guide_is_made_here() -> None:
    assert sorted(named_json(GUIDE)) == sorted(
        f"{name}.json" for name in ["places", *RUNS, *RESTORES]
    )


@dataclass
class Site:
    """What the guide speaks of: two pools, and for each of its remotes a folder."""

    house: House
    there: SimulatedPool

    def call(self, *names: str) -> dict[str, Any]:
        """The parameters that these files of the guide make, for what is here."""
        here, there = self.house.pool, self.there
        folder = self.house.root
        real = {
            "nfs://nas.example:/export/backups": f"file://{folder}/nas",
            "nfs://nas2.example:/export/backups": f"file://{folder}/nas2",
            "s3://KEY:SECRET@s3.eu-west-3.amazonaws.com/bucket/folder#eu-west-3": (
                f"file://{folder}/offsite"
            ),
            "https://pool1.example": here.url,
            "https://pool2.example": there.url,
            "PASSWORD": "simulated",
            "5c1b8c0e-3f0a-4d5e-9a43-1f7d2d1b6c01": here.vm_uuid("vm1"),
            "5c1b8c0e-3f0a-4d5e-9a43-1f7d2d1b6c02": here.vm_uuid("vm2"),
            "a7d5b6f4-52f1-4c39-8a0e-6e0f3a9b7d01": here.store.get("SR", here.srs[1])["uuid"],
            "a7d5b6f4-52f1-4c39-8a0e-6e0f3a9b7d02": there.store.get("SR", there.srs[1])["uuid"],
            "e2f4c3d8-0b6a-4f27-b1c5-9d8e7f6a5b01": here.store.get("pool", here.ref)["uuid"],
            "d0e1f2a3-b4c5-4d6e-8f70-a1b2c3d4e501": here.disk_uuids(here.vm("vm1"))[0],
        }
        files = named_json(GUIDE)
        params: dict[str, Any] = {}
        for name in names:
            text = files[f"{name}.json"]
            for example, this in real.items():
                text = text.replace(example, this)
            params.update(json.loads(text))
        return params

    async def run(self, name: str) -> Outcome:
        params = self.call("places", name)
        return await self.house.run(
            BackupRequest(
                job=params["job"],
                schedule=params["schedule"],
                remotes=params["remotes"],
                xapis=params["xapis"],
                record_to_xapi=params["recordToXapi"],
            )
        )


@asynccontextmanager
async def _site(folder: Path) -> AsyncIterator[Site]:
    there = SimulatedPool(seed=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, there))
        async with open_house(SimulatedPool.small(vms=2), folder) as house:
            yield Site(house, there)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with _site(tmp_path) as opened:
        yield opened


NEEDED = {"mirror": ["incremental"], "mirror-full": ["full"]}
"""What has to be there before."""
STEP = {
    "snapshots": "snapshot",
    "checked": "health check",
    "metadata": "Starting XO metadata backup. (metadata)",
}
"""The task that a run is for, where that is no transfer."""


@pytest.mark.parametrize("name", RUNS)
async def test_a_run_of_the_guide_succeeds(site: Site, name: str) -> None:
    for each in [*NEEDED.get(name, []), name]:
        outcome = await site.run(each)
        assert outcome.status == "success", outcome.snapshot
        assert outcome.of(STEP.get(each, "transfer"))
        assert "warnings" not in outcome.snapshot["data"]


async def test_an_incremental_job_of_the_guide_goes_on_with_deltas(site: Site) -> None:
    await site.run("incremental")
    outcome = await site.run("incremental")
    assert [export["data"]["isFull"] for export in outcome.of("export")] == [False, False]


async def test_a_vm_is_restored_as_the_guide_says(site: Site) -> None:
    await site.run("incremental")
    params = site.call("restore")
    vm = site.house.pool.vm_uuid("vm1")
    assert params["backupId"].startswith(f"/xo-vm-backups/{vm}/")
    async with site.house.services.remote(params["remote"]) as remote:
        (backup,) = await list_vm_backups(remote, vm)
    settings = params["settings"]
    task = await site.house.services.start_restore(
        RestoreRequest(
            backup_id=backup.id,
            remote=params["remote"],
            sr_uuid=params["srUuid"],
            xapi=params["xapi"],
            new_mac_addresses=settings["newMacAddresses"],
            additional_vm_tag=settings["additionalVmTag"],
            map_vdis_srs=settings["mapVdisSrs"],
            use_differential_restore=settings["useDifferentialRestore"],
        )
    )
    outcome = await site.house.outcome(task)
    assert outcome.status == "success", outcome.snapshot


async def test_metadata_are_restored_as_the_guide_says(site: Site) -> None:
    stored = site.call("places", "metadata")["job"]["xoMetadata"]
    await site.run("metadata")
    pool, configuration = site.call("restore-pool"), site.call("restore-xo")
    async with site.house.services.remote(pool["remote"]) as remote:
        ((of_pool,),) = (await list_pool_backups(remote)).values()
        (of_xo,) = await list_config_backups(remote)
    for params, found in ((pool, of_pool), (configuration, of_xo)):
        assert found["id"].rpartition("/")[0] == params["backupId"].rpartition("/")[0]
    task = await site.house.services.start_metadata_restore(
        MetadataRestoreRequest(
            backup_id=of_pool["id"],
            remote=pool["remote"],
            xapi=pool["xapi"],
            dry_run=pool["dryRun"],
        )
    )
    outcome = await site.house.outcome(task)
    assert outcome.log[-1]["result"]["accepted"] is True
    assert site.house.pool.restored == []
    task = await site.house.services.start_metadata_restore(
        MetadataRestoreRequest(backup_id=of_xo["id"], remote=configuration["remote"])
    )
    outcome = await site.house.outcome(task)
    assert outcome.log[-1]["result"] == stored
