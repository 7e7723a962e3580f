"""``distributeBackups`` of a mirror: each VM's copies are on one remote, and stay there."""

from __future__ import annotations

from pathlib import Path

from proxy.errors import Unreachable
from proxy.remotes.faults import Fail
from proxy.repository import lock_vm
from tests.jobs.conftest import House

from .mirrors import Stock, contents, house_with, mirror, times

TWO = ("remote1", "remote2")
DISTRIBUTED = {"distributeBackups": True}


def holders(house: House) -> list[str]:
    return [each for each in TWO if house.backups(each)]


async def test_a_chain_stays_where_it_is(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        for count in (1, 2, 3, 4):
            some = {"timestamp": {"__or": times(house, "source")[:count]}}
            outcome = await mirror(house, *TWO, settings=DISTRIBUTED, filter=some)
            assert outcome.status == "success", outcome.snapshot
            assert {each["data"]["id"] for each in outcome.of("export")} == set(TWO)
            assert len(outcome.of("transfer")) == 1
        (holder,) = holders(house)
        assert await contents(house, holder) == stock.chain
        house.clean_remotes()


async def test_what_any_remote_has_is_not_copied_again(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        await mirror(house, "remote1", filter={"timestamp": times(house, "source")[0]})
        await mirror(house, "remote2", filter={"timestamp": times(house, "source")[1]})
        outcome = await mirror(house, *TWO, settings=DISTRIBUTED)
        assert outcome.status == "success", outcome.snapshot
        assert times(house, "remote1") == times(house, "source")[:1]
        assert await contents(house, "remote2") == stock.chain[1:]


async def test_retention_counts_over_all_remotes(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        await mirror(house, "remote1", filter={"timestamp": times(house, "source")[0]})
        await mirror(house, "remote2", filter={"timestamp": times(house, "source")[1]})
        outcome = await mirror(house, *TWO, settings={**DISTRIBUTED, "exportRetention": 2})
        assert outcome.status == "success", outcome.snapshot
        assert house.backups("remote1") == []
        assert await contents(house, "remote2") == stock.chain[2:]
        house.clean_remotes()


async def test_a_remote_that_fails_is_left_for_another(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        await mirror(house, "remote1", filter={"timestamp": times(house, "source")[0]})
        async with house.faulty() as faults:
            faults.add("create.commit", Fail(Unreachable("broken")), times=9)
            settings = {**DISTRIBUTED, "nRetriesVmBackupFailures": 1}
            outcome = await mirror(house, *TWO, settings=settings)
        assert outcome.status == "success", outcome.snapshot
        assert times(house, "remote1") == times(house, "source")[:1]
        assert await contents(house, "remote2") == stock.chain[1:]
        house.clean_remotes()


async def test_archives_go_to_one_remote(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path, "archives") as house:
        outcome = await mirror(house, *TWO, settings=DISTRIBUTED, source="archives", mode="full")
        assert outcome.status == "success", outcome.snapshot
        assert len(holders(house)) == 1
        again = await mirror(house, *TWO, settings=DISTRIBUTED, source="archives", mode="full")
        assert again.of("transfer") == []


async def test_copies_that_two_remotes_have_count_once(tmp_path: Path, stock: Stock) -> None:
    """While one cannot be had, the other gets what that one has too."""
    settings = {**DISTRIBUTED, "exportRetention": 4, "getRemoteTimeout": 200}
    async with house_with(stock, tmp_path) as house:
        some = {"timestamp": {"__or": times(house, "source")[:2]}}
        await mirror(house, *TWO, settings=settings, filter=some)
        (holder,) = holders(house)
        (other,) = set(TWO) - {holder}
        async with house.services.remote(house.remote_spec(holder)) as remote:
            async with lock_vm(remote, stock.vm, owner="a run"):
                outcome = await mirror(house, *TWO, settings=settings)
        assert outcome.status == "failure"
        assert times(house, other) == times(house, "source")
        outcome = await mirror(house, *TWO, settings=settings)
        assert outcome.status == "success", outcome.snapshot
        assert {*times(house, holder), *times(house, other)} == {*times(house, "source")}
        outcome = await mirror(house, *TWO, settings={**settings, "exportRetention": 3})
        assert times(house, holder) == times(house, "source")[1:2]
        assert await contents(house, other) == stock.chain[1:]
        house.clean_remotes()
