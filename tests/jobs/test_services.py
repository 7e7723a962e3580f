"""What all calls share: live runs, the stop, connections by everything they are made from."""

from __future__ import annotations

import dataclasses

import pytest
import trio

from proxy.errors import Busy, ProxyError, Refused, Unauthorized

from .conftest import JOB, House


async def test_a_second_run_of_a_job_is_refused_while_the_first_lives(house: House) -> None:
    """Upstream's demand 2: a job said to be running for days after its run had died."""
    gate = house.pool.pause_at("VM.snapshot")
    task = house.services.start_backup(house.request())
    await gate.reached()
    assert house.services.running_jobs() == [JOB]
    with pytest.raises(Busy, match=r"^job is already running$") as caught:
        house.services.start_backup(house.request())
    assert caught.value.data == {"jobId": JOB, "taskId": task.id}
    gate.release()
    assert (await house.outcome(task)).status == "success"
    assert house.services.running_jobs() == []
    assert (await house.run(house.request())).status == "success"


@pytest.mark.parametrize("ending", ["failure", "cancel"])
async def test_a_run_that_ended_badly_blocks_no_other(house: House, ending: str) -> None:
    if ending == "failure":
        house.pool.fail("VM.snapshot", error=("SR_FULL",))
        await house.run(house.request())
    else:
        gate = house.pool.pause_at("VM.snapshot")
        task = house.services.start_backup(house.request())
        await gate.reached()
        task.cancel()
        await house.outcome(task)
    assert house.services.running_jobs() == []
    assert (await house.run(house.request())).status == "success"


async def test_another_job_runs_beside_it(house: House) -> None:
    gate = house.pool.pause_at("VM.snapshot")
    first = house.services.start_backup(house.request())
    await gate.reached()
    other = dataclasses.replace(
        house.request(remotes=("remote2",)),
        job={**house.request(remotes=("remote2",)).job, "id": "x"},
    )
    second = house.services.start_backup(other)
    assert house.services.running_jobs() == [JOB, "x"]
    assert (await house.outcome(second)).status == "success"
    gate.release()
    assert (await house.outcome(first)).status == "success"


async def test_a_stopping_daemon_begins_nothing_and_ends_what_runs(house: House) -> None:
    gate = house.pool.pause_at("/export", at_bytes=1024)
    task = house.services.start_backup(house.request())
    await gate.reached()
    house.services.stop_accepting()
    with pytest.raises(Refused, match="stopping") as caught:
        house.services.start_backup(house.request())
    assert caught.value.code == "ESHUTDOWN"
    house.services.cancel_all("the daemon stops")
    with trio.fail_after(10):
        await house.services.wait_idle()
    outcome = await house.outcome(task)
    assert outcome.status == "canceled"
    assert outcome.log[-1]["result"]["message"] == "the daemon stops"
    await house.clean()


async def test_a_changed_password_takes_effect_at_once(house: House) -> None:
    """Upstream weakness 21: connections are cached by URL alone until the cache expires."""
    right = house.xapi_spec
    wrong = {**right, "credentials": {"username": "root", "password": "changed since"}}
    async with house.services.xapi(right):
        with pytest.raises(Unauthorized):
            async with house.services.xapi(wrong):
                pass
        async with house.services.xapi(right) as again:
            assert await again.call("pool.get_all")


async def test_a_changed_option_of_a_remote_takes_effect_at_once(house: House) -> None:
    """Upstream weakness 21, for remotes."""
    spec = house.remote_spec("remote1")
    async with house.services.remote(spec) as one:
        async with house.services.remote({**spec, "url": spec["url"] + "?immutable=true"}) as other:
            assert (one.is_immutable, other.is_immutable) == (False, True)
        async with house.services.remote({**spec, "name": "renamed"}) as same:
            assert same is one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "call"}, "No runner for the backup type call"),
        ({"type": None}, "No runner for the backup type undefined"),
        ({"mode": "sideways"}, "Job mode sideways not implemented"),
        ({"srs": {"id": "sr"}}, "replication to SRs is not available yet"),
        ({"remotes": {"type": "nfs"}}, "invalid pattern"),
        ({"settings": {"": {"healthCheckSr": "sr"}}}, "health checks are not available yet"),
        ({"settings": {"": {"distributeBackups": True}}}, "distributed backups are not available"),
        ({"settings": {"": {"concurrency": "many"}}}, "concurrency"),
    ],
)
async def test_what_cannot_be_run_is_refused_before_anything_is_touched(
    house: House, change: dict[str, object], message: str
) -> None:
    request = house.request()
    calls = len(house.pool.calls.log)
    with pytest.raises(ProxyError, match=message) as caught:
        house.services.start_backup(dataclasses.replace(request, job={**request.job, **change}))
    assert caught.value.rpc_code != 10, "on that number XO would repeat the run without its log"
    assert len(house.pool.calls.log) == calls
    assert not house.folder().exists()
    assert house.services.running_jobs() == []


async def test_a_rolling_snapshot_job_may_say_delta(house: House) -> None:
    settings = {"exportRetention": 0, "snapshotRetention": 1}
    outcome = await house.run(house.request(remotes=(), settings=settings, mode="delta"))
    assert outcome.status == "success"
    assert len(house.pool.snapshots()) == 1
