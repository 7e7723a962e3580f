"""Health checks after a mirror: the last backup that each remote got is made a VM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.conftest import House, Outcome

from .mirrors import Stock, contents, house_with, messages, mirror_request, times


async def checked(house: House, *targets: str, **how: Any) -> Outcome:
    sr = str(house.pool.store.get("SR", house.pool.srs[1])["uuid"])
    how["settings"] = {"healthCheckSr": sr, "healthCheckTimeout": "600s", **how.get("settings", {})}
    request = mirror_request(house, *targets, **how)
    return await house.run(replace(request, xapis={"x": house.xapi_spec}, record_to_xapi={sr: "x"}))


@pytest.mark.parametrize(("source", "mode"), [("source", "delta"), ("archives", "full")])
async def test_the_last_backup_of_each_remote_is_tried_out(
    tmp_path: Path, stock: Stock, source: str, mode: str
) -> None:
    async with house_with(stock, tmp_path, source) as house:
        outcome = await checked(house, "remote1", "remote2", source=source, mode=mode)
        assert outcome.status == "success", outcome.snapshot
        checks = outcome.of("health check")
        assert {each["data"]["id"] for each in checks} == {"remote1", "remote2"}
        for each in checks:
            assert [task["data"]["name"] for task in each["tasks"]] == ["transfer", "vmstart"]
        await house.clean()
        again = await checked(house, "remote1", "remote2", source=source, mode=mode)
        assert messages(again) == [
            "No new data to upload for this VM",
            "No healthCheck needed because no data was transferred.",
        ]
        assert again.of("health check") == []


async def test_a_vm_of_other_tags_is_not_tried_out(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        settings = {"healthCheckVmsWithTags": ["important"]}
        outcome = await checked(house, "remote1", settings=settings)
        assert outcome.status == "success"
        told = messages(outcome, "health check")
        assert told == ["This VM doesn't match the health check's tags for this schedule"]


async def test_a_failed_check_is_a_failure_and_the_copies_stay(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house:
        house.pool.fail("VM.start", error=("NO_HOSTS_AVAILABLE",), times=None)
        settings = {"nRetriesVmBackupFailures": 2}
        outcome = await checked(house, "remote1", settings=settings)
        assert outcome.status == "failure"
        assert len(outcome.of("health check")) == 1
        assert await contents(house, "remote1") == stock.chain
        await house.clean()


async def test_an_sr_that_is_not_there_fails_the_run_before_anything(
    tmp_path: Path, stock: Stock
) -> None:
    async with house_with(stock, tmp_path) as house:
        missing = {"healthCheckSr": "99999999-9999-4999-8999-999999999999"}
        outcome = await checked(house, "remote1", settings=missing)
        assert outcome.log[-1]["status"] == "failure"
        assert not house.folder("remote1").exists()
        assert len(times(house, "source")) == 4
