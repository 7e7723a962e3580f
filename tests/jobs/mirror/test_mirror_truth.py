"""What the log of a mirror says is what is on its remotes, whatever fails."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from proxy.errors import Refused, Unreachable
from proxy.remotes.faults import Fail
from tests.jobs.conftest import explained
from tests.jobs.xo_status import rendered

from .mirrors import Stock, contents, house_with, mirror, times

POINTS = {
    "source": [("read.*", "*.vhd"), ("read_file", "*.json"), ("stat", "*.vhd"), ("list", "*")],
    "remote1": [("create.*", "*.vhd"), ("list", "*"), ("write_file", "*"), ("unlink", "*.json")],
    "directories1": [("batch.*", "*"), ("list", "*"), ("write_file", "*"), ("unlink", "*.json")],
}


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5, 6, 7, 8])
async def test_the_log_says_what_is_there(tmp_path: Path, stock: Stock, seed: int) -> None:
    chance = random.Random(seed)
    async with house_with(stock, tmp_path) as house:
        settings = {"exportRetention": 3, "nRetriesVmBackupFailures": seed % 2}
        targets = ("remote1", "directories1")
        await mirror(house, *targets, filter={"timestamp": times(house, "source")[0]})
        before = {each: set(times(house, each)) for each in targets}
        async with AsyncExitStack() as stack:
            faults = {each: await stack.enter_async_context(house.faulty(each)) for each in POINTS}
            where = chance.choice(list(POINTS))
            for verb, path in chance.sample(POINTS[where], 2):
                error = chance.choice([Unreachable("away"), Refused("no", code="EACCES")])
                fault = Fail(error, after=chance.random() < 0.3)
                often = chance.randint(1, 3)
                faults[where].add(verb, fault, path=path, skip=chance.randint(0, 5), times=often)
            planned = len(faults[where].unused)
            outcome = await mirror(house, *targets, settings=settings)
            assert len(faults[where].unused) < planned, "nothing failed"
        assert rendered(outcome.log)["status"] == outcome.status
        moments = times(house, "source")
        for target in targets:
            there = times(house, target)
            found = await contents(house, target)
            assert found == [stock.chain[moments.index(each)] for each in there]
            told = [
                export
                for export in outcome.of("export")
                if export["data"]["id"] == target and export["status"] == "success"
            ]
            copied = set(there) - before[target]
            assert len(told) <= len(copied)
            if outcome.status == "success":
                assert len(told) == len(copied)
        if outcome.status == "success":
            assert [times(house, each) for each in targets] == [moments[-3:]] * 2
        again = await mirror(house, *targets, settings=settings)
        assert again.status == "success", again.snapshot
        assert [times(house, each) for each in targets] == [moments[-3:]] * 2
        for target in targets:
            assert await contents(house, target) == stock.chain[-3:]
        for target in targets:
            # checksums that could not be stored are told and no failure
            needed = {each for each in explained(house.folder(target)) if "xxh3" not in each}
            assert {each for each in house.files(target) if "xxh3" not in each} == needed
