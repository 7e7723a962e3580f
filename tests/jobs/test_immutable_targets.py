"""Runs on a remote whose older backups are protected, with files that really are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.protection import protection

from .test_incremental_backup import back_up, change, digests, house_of, restored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def protect(tmp_path: Path) -> Iterator[Callable[..., None]]:
    with protection(tmp_path) as switch:
        yield switch


async def test_retention_waits_for_the_end_of_protection(
    tmp_path: Path, protect: Callable[..., None]
) -> None:
    async with house_of(tmp_path) as house:
        request = house.request(settings={"exportRetention": 1})
        await house.run(request)
        (first,) = house.backups()
        files = [path for path in house.folder().rglob("*") if path.name[:16] == first[-21:-5]]
        assert len(files) == 3
        protect(*files)
        outcome = await house.run(request)
        assert outcome.status == "success", outcome.snapshot
        (warning,) = outcome.of("export")[0]["data"]["warnings"]
        assert warning["message"] == "old backups are protected and are removed by a later run"
        assert first in warning["data"]["backups"][0]
        assert len(house.backups()) == 2
        protect(*files, on=False)
        assert (await house.run(request)).status == "success"
        assert len(house.backups()) == 1
        await house.clean()


@pytest.mark.parametrize("remote", ["remote1", "directories1"])
async def test_a_merge_waits_for_the_end_of_protection(
    tmp_path: Path, remote: str, protect: Callable[..., None]
) -> None:
    async with house_of(tmp_path) as house:
        await back_up(house, remote)
        change(house, 1, 1)
        await back_up(house, remote)
        root = house.folder(remote)
        (root / "immutability.json").write_text("{}")
        disks = [path for path in root.glob("xo-vm-backups/*/vdis/*/*/*") if path.name != "data"]
        data = list(root.glob("xo-vm-backups/*/vdis/*/*/data/*"))
        protect(*disks, *data)
        before = house.chains(remote)
        change(house, 2, 2)
        outcome = await back_up(house, remote, exportRetention=1)
        assert outcome.status == "success", outcome.snapshot
        warned = [
            warning["message"]
            for task in outcome.of("clean-vm")
            for warning in task["data"].get("warnings", [])
        ]
        assert warned == ["the disks are protected, their merge waits"]
        after = house.chains(remote)
        assert all(set(names) <= set(after[vdi]) for vdi, names in before.items())
        assert await restored(house, house.backups(remote)[-1], remote) == digests(house)
        protect(*disks, *data, on=False)
        change(house, 3, 3)
        outcome = await back_up(house, remote, exportRetention=1)
        assert outcome.status == "success", outcome.snapshot
        assert [len(names) for names in house.chains(remote).values()] == [1]
        assert await restored(house, house.backups(remote)[-1], remote) == digests(house)
