"""Whole runs over a share: what a job writes through SMB restores byte for byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from proxy.remotes.wrapper import protected_of
from tests.jobs.test_incremental_backup import (
    back_up,
    change,
    digests,
    disk_records,
    house_of,
    restored,
)
from tests.protection import protection

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs.conftest import House
    from tests.remotes.samba import Samba


def share(house: House, samba: Samba, name: str, query: str = "") -> str:
    url = samba.url(house.root / name, query=query)
    house.remotes[name] = {"id": name, "name": name, "url": url}
    return name


@pytest.mark.parametrize("query", ["", "&useVhdDirectory=true"])
async def test_a_chain_with_a_merge_restores_from_a_share(
    tmp_path: Path, samba: Samba, query: str
) -> None:
    async with house_of(tmp_path) as house:
        remote = share(house, samba, "smb1", query)
        points: list[list[str]] = []
        for number in range(3):
            change(house, number, number + 1)
            points.append(digests(house))
            outcome = await back_up(house, remote, exportRetention=2)
            assert outcome.status == "success", outcome.snapshot
            kinds = {record["got"] for record in disk_records(outcome)}
            assert kinds == ({"full"} if number == 0 else {"delta"})
        assert not [*house.folder(remote).rglob(".*.tmp"), *house.folder(remote).rglob("*.lock*")]
        assert [len(names) for names in house.chains(remote).values()] == [2]
        found = [await restored(house, each, remote) for each in house.backups(remote)]
        assert found == points[-2:]


async def test_a_full_backup_restores_from_a_share(tmp_path: Path, samba: Samba) -> None:
    async with house_of(tmp_path, running=False) as house:
        remote = share(house, samba, "smb1")
        assert (await house.run(house.request(remotes=(remote,)))).status == "success"
        await house.clean()
        (backup,) = house.backups(remote)
        assert await restored(house, backup, remote) == digests(house)


async def test_retention_on_a_share_waits_for_the_end_of_protection(
    tmp_path: Path, samba: Samba
) -> None:
    """SMB has no word of its own for it: the server denies the access, as to a stranger."""
    with protection(tmp_path) as protect:
        async with house_of(tmp_path, running=False) as house:
            remote = share(house, samba, "smb1")
            request = house.request(remotes=(remote,), settings={"exportRetention": 1})
            assert (await house.run(request)).status == "success"
            (first,) = house.backups(remote)
            folder = house.folder(remote)
            files = [path for path in folder.rglob("*") if path.name[:16] == first[-21:-5]]
            protect(*files)
            (export,) = (await house.run(request)).of("export")
            assert export["status"] == "failure"  # nobody says that anything is protected
            (folder / "immutability.json").write_text("{}")
            (export,) = (await house.run(request)).of("export")
            assert export["status"] == "success"
            (warning,) = export["data"]["warnings"]
            assert warning["message"] == "old backups are protected and are removed by a later run"
            async with house.services.remote(house.remotes[remote]) as opened:
                assert await protected_of(opened, [first, "/missing", "/"]) == (True, False, False)
            protect(*files, on=False)
            assert (await house.run(request)).status == "success"
            assert len(house.backups(remote)) == 1
            await house.clean()
