"""Metadata runs and restores, blocked at every stage and cancelled: nothing may be left behind."""

from __future__ import annotations

import pytest
import trio

from proxy.remotes.faults import Gate as RemoteGate

from .conftest import House, until
from .test_cancel import Block, at_pool, at_remote, cancel_and_wait
from .test_metadata_backup import backups, clean, pool_uuid, request, second_pool
from .test_metadata_restore import restore

STAGES: dict[str, Block] = {
    "opening the remote's folder": at_remote("mktree", "*"),
    "login": at_pool("session.login_with_password"),
    "reading the pool": at_pool("pool.get_record"),
    "reading the master": at_pool("host.get_record", stage="after"),
    "export, before the first byte": at_pool("/pool/xmldbdump"),
    "export, at its first byte": at_pool("/pool/xmldbdump", at_bytes=0),
    "export, mid-transfer": at_pool("/pool/xmldbdump", at_bytes=1_100_000),
    "export, sent but its task has not ended": at_pool("/pool/xmldbdump", stage="after"),
    "the lock": at_remote("lock.acquire", "*xo-pool-*"),
    "looking for a free name": at_remote("list", "*xo-pool-*"),
    "opening the data": at_remote("create.open", "*/data"),
    "writing the data": at_remote("create.write", "*/data"),
    "naming the data": at_remote("create.commit", "*/data"),
    "the data has its name": at_remote("create.commit", "*/data", after=True),
    "looking at the size": at_remote("stat", "*/data"),
    "writing the configuration": at_remote("create.write", "*/data.json"),
    "naming the configuration": at_remote("create.commit", "*/data.json", after=True),
}


@pytest.mark.parametrize("stage", STAGES)
async def test_cancelled_at(house: House, stage: str) -> None:
    house.pool.database_filler = 2_000_000
    before = {kind: backups(house, kind) for kind in ("xo", "pool")}
    async with STAGES[stage](house) as reached:
        task = house.services.start_backup(request(house))
        with trio.fail_after(10):
            await reached()
        outcome = await cancel_and_wait(house, task)
    assert outcome.status == "canceled"
    assert outcome.log[-1]["status"] == "failure"
    warnings = [r for r in outcome.log if r["type"] == "warning"]
    assert warnings == [], "no undo failed"
    # each part has its task, whatever it had come to
    told = {child["data"].get("type"): child for child in outcome.snapshot["tasks"]}
    assert {"xo", "pool"} <= set(told)
    configuration = stage in {"writing the configuration", "naming the configuration"}
    blocked = "xo" if configuration else "pool"
    if stage != "opening the remote's folder":
        assert told[blocked]["status"] == "canceled"
        assert backups(house, blocked) == before[blocked]
    await clean(house)
    # the next run of the same job works at once
    again = await house.run(request(house))
    assert again.status == "success", again.snapshot
    await clean(house)


@pytest.mark.parametrize("after", [False, True])
async def test_a_cancel_at_the_metadata_waits_for_its_outcome(house: House, after: bool) -> None:
    async with house.faulty() as faults:
        gate = faults.add("write_file", RemoteGate(after=after), path="*xo-pool-*/metadata.json")
        task = house.services.start_backup(request(house))
        await gate.reached.wait()
        await until(lambda: len(backups(house, "xo")) == 1)
        await house.services.tasks.cancel(task.id)
        await trio.sleep(0.05)
        assert task.pending
        gate.release.set()
        outcome = await house.outcome(task)
    assert outcome.status == "canceled"
    assert len(backups(house, "pool")) == 1, "what is a backup stays"
    await clean(house)


async def test_a_cancel_in_the_retention_removes_the_one_at_hand_whole(house: House) -> None:
    for _ in range(3):
        await house.run(request(house, pools=[], settings={"retentionXoMetadata": 9}))
    async with house.faulty() as faults:
        gate = faults.add("rmtree", RemoteGate())
        task = house.services.start_backup(
            request(house, pools=[], settings={"retentionXoMetadata": 1})
        )
        await gate.reached.wait()
        await house.services.tasks.cancel(task.id)
        gate.release.set()
        await house.outcome(task)
    assert len(backups(house, "xo")) == 3
    await clean(house)


async def test_one_pool_and_one_remote_are_cancelled_alone(house: House) -> None:
    async with second_pool() as other, house.faulty("remote2") as faults:
        uuids = [pool_uuid(house), str(other.store.get("pool", other.ref)["uuid"])]
        asked = request(house, pools=uuids, remotes=("remote1", "remote2"))
        asked.xapis["xapi2"] = {**house.xapi_spec, "url": other.url}  # type: ignore[index]
        asked.record_to_xapi[uuids[1]] = "xapi2"  # type: ignore[index]
        pool_gate = other.pause_at("/pool/xmldbdump", at_bytes=100)
        remote_gate = faults.add("create.write", RemoteGate(), path=f"*{uuids[0]}*")
        task = house.services.start_backup(asked)
        await pool_gate.reached()
        await remote_gate.reached.wait()
        parts = {child.properties.get("id"): child for child in task.children}
        (stuck,) = [c for c in parts[uuids[0]].children if c.properties["id"] == "remote2"]
        await house.services.tasks.cancel(stuck.id)
        await house.services.tasks.cancel(parts[uuids[1]].id)
        outcome = await house.outcome(task)
    assert outcome.status == "canceled"
    assert len(backups(house, "xo", "remote2")) == 1
    assert [path.parts[-2] for path in backups(house, "pool", "remote1")] == [uuids[0]]
    assert backups(house, "pool", "remote2") == []
    await clean(house)


async def test_a_queued_part_ends_without_work(house: House) -> None:
    async with house.faulty() as faults:
        gate = faults.add("create.open", RemoteGate())
        task = house.services.start_backup(request(house, levels={"": {"concurrency": 1}}))
        await gate.reached.wait()
        outcome = await cancel_and_wait(house, task)
    assert [child["status"] for child in outcome.snapshot["tasks"]] == ["canceled", "canceled"]
    assert {child["data"]["type"] for child in outcome.snapshot["tasks"]} == {"xo", "pool"}
    await clean(house)


# -- restores -----------------------------------------------------------------------------------

RESTORE_STAGES: dict[str, Block] = {
    "login": at_pool("session.login_with_password", nth=2),
    "task": at_pool("task.create", stage="after"),
    "import, before its answer": at_pool("/pool/xmldbdump"),
    "import, mid-transfer": at_pool("/pool/xmldbdump", at_bytes=1_100_000),
    "opening the database": at_remote("read.open"),
    "reading the database": at_remote("read.read_into"),
}


@pytest.mark.parametrize("stage", RESTORE_STAGES)
async def test_restore_cancelled_at(house: House, stage: str) -> None:
    house.pool.database_filler = 6_000_000
    await house.run(request(house))
    await clean(house)
    backup = backups(house, "pool")[0]
    async with RESTORE_STAGES[stage](house) as reached:
        task = await restore(house, backup)
        with trio.fail_after(10):
            await reached()
        outcome = await cancel_and_wait(house, task)
    assert outcome.status == "canceled"
    assert outcome.log[-1]["result"]["code"] == "ECANCELED"
    assert house.pool.restored == [], "the host never had the whole database"
    await clean(house)


@pytest.mark.parametrize("dry_run", [False, True])
async def test_a_cancel_that_comes_too_late_tells_what_the_host_did(
    house: House, dry_run: bool
) -> None:
    await house.run(request(house))
    gate = house.pool.pause_at("/pool/xmldbdump", stage="after")
    task = await restore(house, backups(house, "pool")[0], dry_run=dry_run)
    await gate.reached()
    await house.services.tasks.cancel(task.id)
    await trio.sleep(0.05)
    assert task.pending
    gate.release()
    outcome = await house.outcome(task)
    assert outcome.status == "canceled"
    warnings = [record["message"] for record in outcome.log if record["type"] == "warning"]
    if dry_run:
        assert (warnings, house.pool.restored) == ([], [])
    else:
        assert len(house.pool.restored) == 1
        assert ["it has restored it and reboots" in warning for warning in warnings] == [True]
    await clean(house)


async def test_a_client_that_leaves_stops_nothing(house: House) -> None:
    await house.run(request(house))
    gate = house.pool.pause_at("/pool/xmldbdump")
    task = await restore(house, backups(house, "pool")[0])
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            async for _ in house.services.tasks.watch(task):
                pass

        nursery.start_soon(follow)
        await gate.reached()
        nursery.cancel_scope.cancel()
    gate.release()
    assert (await house.outcome(task)).status == "success"
    assert len(house.pool.restored) == 1
