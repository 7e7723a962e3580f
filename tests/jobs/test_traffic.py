"""What runs do on remotes, counted: in the tasks of targets, and since the daemon began."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from proxy.errors import ProxyError, Unreachable
from proxy.jobs.traffic import Traffic, told
from proxy.remotes import RemoteOptions, opened_remote
from proxy.remotes.faults import Fail, Faults
from proxy.tasks import open_tasks

from .conftest import House, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path
    from typing import Any

    from proxy.remotes import Remote
    from proxy.tasks import Task

OPTIONS = RemoteOptions(disable_file_remotes=False)


async def test_a_target_tells_its_own_operations_and_no_others(house: House) -> None:
    async with house.faulty("remote2") as faults:
        faults.add("create.commit", Fail(Unreachable("gone", code="ECONNRESET")))
        outcome = await house.run(house.request(remotes=("remote1", "remote2")))
    one, other = sorted(outcome.of("export"), key=lambda task: task["data"]["id"])
    assert one["data"]["operations"]["create.commit"]["calls"] == 1
    assert "failed" not in one["data"]["operations"]["create.commit"]
    assert other["data"]["operations"]["create.commit"]["failed"] == {"ECONNRESET": 1}
    assert (one["status"], other["status"]) == ("success", "failure")
    (stored,) = house.folder().glob("xo-vm-backups/*/*.xva")
    assert one["data"]["operations"]["create.write"]["bytes"] == stored.stat().st_size
    assert "requests" not in one["data"], "a file system has none"


async def test_the_figures_are_in_no_log_record(house: House) -> None:
    """XO stores the records: what it does not know stays out of them."""
    outcome = await house.run(house.request())
    assert outcome.of("export")[0]["data"]["operations"]
    assert "operations" not in json.dumps(outcome.log)


async def test_a_restore_and_a_clean_tell_theirs(house: House) -> None:
    run = await house.run(house.request())
    assert run.of("clean-vm")[0]["data"]["operations"]["list"]["calls"] >= 1
    restored = await house.outcome(await house.restore(house.backups()[0]))
    assert restored.snapshot["data"]["operations"]["read.open"]["calls"] >= 1


async def test_what_a_run_did_is_counted_beyond_its_connection(house: House) -> None:
    """With a cache delay of 0 each use opens the remote anew."""
    await house.run(house.request())
    (traffic,) = house.services.traffic.remotes
    assert (traffic.type, traffic.id) == ("file", "remote1")
    opened = traffic.operations["open"].calls
    await until(lambda: traffic.open == [])
    async with house.services.remote(house.remote_spec("remote1")) as remote:
        await remote.list("/")
        assert traffic.open == [remote]
        assert house.services.open_connections()["remote"] == 1
    assert traffic.operations["open"].calls == opened + 1
    assert traffic.operations["write_file"].calls >= 2


class Requests:
    """As an object store's remote, of which only the counts matter."""

    def __init__(self, inner: Remote) -> None:
        self.counts = {"GET": 0}
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def requests(self) -> Mapping[str, int]:
        return self.counts


async def test_requests_to_an_object_store_are_told(nursery: Any, tmp_path: Path) -> None:
    stores: list[Requests] = []

    @contextlib.asynccontextmanager
    async def opener(spec: Mapping[str, Any], *, options: RemoteOptions) -> AsyncIterator[Remote]:
        async with opened_remote(spec, options=options) as remote:
            stores.append(Requests(remote))
            yield Faults(stores[-1])

    traffic = Traffic()
    spec = {"url": f"file://{tmp_path}/remote"}
    async with open_tasks(str(tmp_path / "tasks.db"), nursery) as tasks:

        async def work(task: Task) -> None:
            async with traffic.counted(spec, opener, OPTIONS) as remote:
                stores[-1].counts["GET"] = 5
                with told(task, remote):
                    stores[-1].counts |= {"GET": 8, "PUT": 1}
                    await remote.stat("/")

        for _ in range(2):
            task = tasks.start("test", {}, work)
            _ = [record async for record in tasks.watch(task)]
            data = json.loads(task.snapshot())["data"]
            assert data["requests"] == {"GET": 3, "PUT": 1}
            assert data["operations"]["stat"]["calls"] == 1
    (counted,) = traffic.remotes
    assert counted.requests() == {"GET": 16, "PUT": 2}


async def test_remotes_are_named_without_secrets_and_in_bounded_number(tmp_path: Path) -> None:
    traffic = Traffic()
    secret = "hunter2Is0nlyOurs"
    specs: list[dict[str, Any]] = [
        {"url": f"s3://key:{secret}@host/bucket"},
        {"url": f"s3://key:{secret}@host/bucket", "id": f'"}}\n{secret}'},
        {"url": "nothing"},
        *({"url": f"nfs://host:/{number}"} for number in range(100)),
    ]
    for spec in specs:
        with pytest.raises(ProxyError):
            async with traffic.counted(spec, opened_remote, RemoteOptions()):
                pass
    names = [(each.type, each.id) for each in traffic.remotes]
    assert len(names) <= 52
    assert ("unknown", "malformed") in names
    assert secret not in repr(names)
    assert [kind for kind, _ in names].count("s3") == 1, "the URL, not the odd id, names it"
    by_name = {each.id: each for each in traffic.remotes}
    assert sum(each.operations["open"].calls for each in traffic.remotes) == len(specs)
    assert by_name["other"].operations["open"].calls > 40
