"""Whole runs on Azure's emulator: backups, a merge, listing, restore, verify, deletion."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from azure.storage.blob import ContainerClient
from trio.to_thread import run_sync as in_thread

from proxy.repository import delete_backups, list_all
from proxy.simulator import SimulatedPool
from tests.azurite import ACCOUNT, KEY

from .conftest import open_house
from .test_incremental_backup import MIB, back_up, change, digests, restored
from .test_verify_run import statuses, verified

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.remotes import Remote
    from tests.azurite import Azurite


async def listed(remote: Remote) -> list[str]:
    return [backup.id for backups in (await list_all(remote)).values() for backup in backups]


async def test_chains_merge_restore_and_verify(tmp_path: Path, azurite: Azurite) -> None:
    container = f"c{secrets.token_hex(8)}"
    url = azurite.url(f"/{container}/some dir")
    async with open_house(SimulatedPool.small(disk_size=8 * MIB), tmp_path) as house:
        house.remotes["remote1"] = {"id": "remote1", "name": "remote1", "url": url}
        points: list[list[str]] = []
        for number in range(3):
            change(house, number, number + 1)
            change(house, 0, number + 100)
            points.append(digests(house))
            outcome = await back_up(house, exportRetention=2)
            assert outcome.status == "success", outcome.snapshot
        with ContainerClient(
            f"http://{azurite.address}/{ACCOUNT}",
            container,
            credential=KEY,
            api_version="2025-11-05",
        ) as client:
            names = await in_thread(lambda: [*client.list_blob_names()])
            # as the emulator's other client sees it: a directory of backups and nothing else
            assert all(name.startswith("some dir/xo-vm-backups/") for name in names)
            left = [name for name in names if "probe" in name or name.endswith((".lock", ".tmp"))]
            assert left == []
        async with house.services.remote(house.remote_spec("remote1")) as remote:
            backups = await listed(remote)
            assert len(backups) == 2
            assert [await restored(house, each) for each in backups] == points[-2:]
            assert statuses(await verified(house, "remote1", level="read")) == ["ok", "ok"]
            await delete_backups(remote, backups[:1])
            assert await listed(remote) == backups[1:]
            assert await restored(house, backups[1]) == points[-1]
