"""What all calls share: live runs, the stop, connections by everything they are made from."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from proxy.config.schema import RemoteOptions
from proxy.errors import Busy, NotFound, ProxyError, Refused, Unauthorized
from proxy.repository import delete_backups, lock_vm

from .conftest import JOB, KEY, House, until


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


async def test_weakness_16_a_changed_option_of_a_remote_takes_effect_at_once(house: House) -> None:
    """Upstream weakness 21, for remotes."""
    spec = house.remote_spec("remote1")
    async with house.services.remote(spec) as one:
        async with house.services.remote({**spec, "url": spec["url"] + "?immutable=true"}) as other:
            assert (one.is_immutable, other.is_immutable) == (False, True)
        async with house.services.remote({**spec, "name": "renamed"}) as same:
            assert same is one


@pytest.mark.parametrize(
    ("change", "is_shared"),
    [
        ({"options": "vers=4.2"}, False),
        ({"id": "another"}, False),
        ({"encryptionKey": "0123456789abcdef0123456789abcdef"}, False),
        ({"useVhdDirectory": True}, False),
        ({"unknown": 1}, False),
        ({"name": "x", "error": "x", "benchmarks": [1]}, True),
    ],
)
async def test_weakness_16_a_remote_is_cached_by_its_whole_record(
    house: House, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], *, is_shared: bool
) -> None:
    """Upstream sees a changed option or key after five minutes of silence, at best."""

    @contextlib.asynccontextmanager
    async def opener(_spec: object, *, options: object) -> AsyncIterator[Any]:
        del options
        yield SimpleNamespace(
            url="", is_encrypted=False, is_immutable=False, use_vhd_directory=False
        )

    monkeypatch.setattr("proxy.jobs.services.opened_remote", opener)
    spec = {"url": "nfs://host:/share", "id": "r", "options": "vers=3"}
    async with house.services.remote(spec) as one, house.services.remote(spec | change) as other:
        assert (one is other) is is_shared


async def test_a_changed_configuration_of_remotes_takes_effect_at_once(house: House) -> None:
    spec = house.remote_spec("remote1")
    before = house.services.config
    async with house.services.remote(spec) as one:
        changed = msgspec.structs.replace(
            before, remote_options=RemoteOptions(max_parallel_operations=3)
        )
        house.services._config = lambda: changed
        async with house.services.remote(spec) as other:
            assert one is not other
        house.services._config = lambda: before
        async with house.services.remote(spec) as again:
            assert again is one


async def test_who_only_looks_makes_no_directory(house: House) -> None:
    """A mistyped path was an empty remote, and then a directory."""
    spec = house.remote_spec("mistyped")
    with pytest.raises(NotFound, match="does not exist") as caught:
        async with house.services.remote(spec, create=False):
            pass
    assert caught.value.code == "ENOENT"
    assert not house.folder("mistyped").exists()
    async with house.services.remote(spec):
        assert house.folder("mistyped").is_dir()
        async with house.services.remote(spec, create=False) as remote:
            assert await remote.list("/") == []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_who_only_looks_sets_no_encrypted_remote_up(house: House) -> None:
    """Upstream does on any call, and gives an empty remote a new key on any call too."""
    folder = house.folder("new")
    folder.mkdir()
    spec = {**house.remote_spec("new"), "encryptionKey": KEY}
    other = {**spec, "encryptionKey": KEY[::-1]}
    async with house.services.remote(spec, create=False) as looking:
        assert await looking.list("/") == []
        await delete_backups(looking, ["/xo-vm-backups/vm/20260101T000000Z.json"])
        assert contents(folder) == {}
        async with house.services.remote(spec) as writing:
            assert writing is looking
            before = contents(folder)
            assert sorted(before) == ["encryption.json", "metadata.json"]
            await writing.write_file("f.test2", b"x")
            assert await looking.read_file("f.test2") == b"x"
            await writing.unlink("f.test2")
        with pytest.raises(Unauthorized, match="with another encryption key"):
            async with house.services.remote(other, create=False):
                pass
        assert contents(folder) == before


async def test_a_run_that_waits_for_a_lock_says_so_and_goes_on(house: House) -> None:
    """Upstream fails at once with `Lock file is already being held`."""
    vm = house.pool.vm_uuid("vm1")
    request = house.request(settings={"getRemoteTimeout": 20_000})
    async with house.services.remote(house.remote_spec("remote1")) as remote:
        async with lock_vm(remote, vm, owner="run-0815"):
            task = house.services.start_backup(request)

            def infos() -> list[dict[str, Any]]:
                return [info for child in task.children for info in child._infos]

            await until(lambda: any("waiting" in info["message"] for info in infos()))
            (info,) = [info for info in infos() if "waiting" in info["message"]]
            assert info["data"]["remote"] == "remote1"
            assert info["data"]["holder"]["owner"] == "run-0815"
            assert info["data"]["holder"]["pid"] == os.getpid()
            assert {"host", "since"} <= set(info["data"]["holder"])
            assert "run-0815 (process" in info["data"]["reason"]
    assert (await house.outcome(task)).status == "success"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "call"}, "No runner for the backup type call"),
        ({"type": None}, "No runner for the backup type undefined"),
        ({"mode": "sideways"}, "Job mode sideways not implemented"),
        ({"srs": {"type": "nfs"}}, "invalid pattern"),
        ({"remotes": {"type": "nfs"}}, "invalid pattern"),
        ({"settings": {"": {"healthCheckTimeout": "soon"}}}, "healthCheckTimeout"),
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
