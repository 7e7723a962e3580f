"""A mirror run is blocked at every stage and cancelled: what was copied is whole, nothing is half
there, and the next run goes on from it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.remotes.faults import Gate
from proxy.repository import lock_vm
from proxy.tasks import Task
from tests.jobs.conftest import House, Outcome

from .mirrors import Stock, contents, house_with, mirror, mirror_request, times

Stand = tuple[Callable[[], Any], Callable[[], None]]
"""A wait for the run to stand still, and what lets it go on."""
Block = Callable[[House], AbstractAsyncContextManager[Stand]]


def at(remote: str, verb: str, path: str = "*", *, skip: int = 0, after: bool = False) -> Block:
    @asynccontextmanager
    async def block(house: House) -> AsyncIterator[Stand]:
        async with house.faulty(remote) as faults:
            gate = faults.add(verb, Gate(after=after), path=path, skip=skip)
            try:
                yield gate.reached.wait, gate.release.set
            finally:
                assert faults.unused == []

    return block


def behind_the_lock_of(remote: str) -> Block:
    @asynccontextmanager
    async def block(house: House) -> AsyncIterator[Stand]:
        async with house.services.remote(house.remote_spec(remote)) as opened:
            (vm,) = [path.name for path in house.folder("source").glob("xo-vm-backups/*-*")]

            async def waiting() -> None:
                await trio.sleep(0.3)

            async with lock_vm(opened, vm, owner="somebody else"):
                yield waiting, lambda: None

    return block


SOURCE: dict[str, Block] = {
    "listing the VMs": at("source", "list", "xo-vm-backups"),
    "listing the VM": at("source", "list", "xo-vm-backups/*"),
    "the lock of the source": behind_the_lock_of("source"),
    "reading metadata": at("source", "read_file", "*.json"),
    "opening a disk": at("source", "read.open", "*.vhd", skip=3),
    "reading a table": at("source", "read.read_at", "*.vhd", skip=5),
    "reading a block": at("source", "read.read_into_at", "*.vhd", skip=2),
    "looking whether it changed": at("source", "stat", "*.vhd", skip=1),
}
FILES: dict[str, Block] = {
    "the lock of the remote": behind_the_lock_of("remote1"),
    "cleaning before": at("remote1", "list", "xo-vm-backups/*"),
    "listing the remote": at("remote1", "list", "xo-vm-backups/*", skip=1),
    "looking for a base": at("remote1", "list", "*/vdis/*", skip=2),
    "beginning a disk": at("remote1", "create.open", "*.vhd", skip=2),
    "writing a disk": at("remote1", "create.write", "*.vhd", skip=7),
    "naming a disk": at("remote1", "create.commit", "*.vhd", skip=3),
    "a disk has its name": at("remote1", "create.commit", "*.vhd", skip=3, after=True),
    "checksums": at("remote1", "write_file", "*.xxh3", skip=3),
    "removing old metadata": at("remote1", "unlink", "*.json"),
}
DIRECTORIES: dict[str, Block] = {
    "writing a block": at("directories1", "batch.write", skip=12),
    "making blocks durable": at("directories1", "batch.commit", skip=2),
    "before an alias": at("directories1", "batch.commit", skip=2, after=True),
    "an alias": at("directories1", "write_file", "*.alias.vhd", skip=2, after=True),
}
ARCHIVES: dict[str, Block] = {
    "reading": at("archives", "read.*", "*.xva", skip=2),
    "opening": at("remote1", "create.open", "*.xva", skip=1),
    "writing": at("remote1", "create.write", "*.xva", skip=1),
    "naming": at("remote1", "create.commit", "*.xva", skip=1),
    "named": at("remote1", "create.commit", "*.xva", skip=1, after=True),
    "checksum": at("remote1", "write_file", "*.checksum", skip=1),
    "after the checksum": at("remote1", "write_file", "*.checksum", skip=1, after=True),
    "removing old data": at("remote1", "unlink", "*.xva"),
}
STAGES = [
    *((f"source: {name}", stage, "source", "remote1") for name, stage in SOURCE.items()),
    *((f"files: {name}", stage, "source", "remote1") for name, stage in FILES.items()),
    *((f"dirs: {name}", stage, "source", "directories1") for name, stage in DIRECTORIES.items()),
    *((f"archives: {name}", stage, "archives", "remote1") for name, stage in ARCHIVES.items()),
]


async def cancelled(house: House, task: Task, release: Callable[[], None]) -> Outcome:
    """``release``: what was begun and cannot be taken back is waited for."""
    await house.services.tasks.cancel(task.id)
    assert not task.end, "task.cancel answers at once: it waits for nothing of the run"
    await trio.sleep(0.02)
    release()
    with trio.fail_after(5):
        while task.pending:
            await trio.sleep(0.005)
    return await house.outcome(task)


def unheld(house: House) -> None:
    held = [path for each in house.remotes for path in house.folder(each).glob("*/*.lock")]
    assert held == []


@pytest.mark.parametrize(
    ("stage", "source", "target"), [each[1:] for each in STAGES], ids=[each[0] for each in STAGES]
)
async def test_cancelled_at(
    tmp_path: Path, stock: Stock, stage: Block, source: str, target: str
) -> None:
    mode = "full" if source == "archives" else "delta"
    async with house_with(stock, tmp_path, source) as house:
        settings = {"exportRetention": 2}
        first = {"timestamp": {"__or": times(house, source)[:1]}}
        how: dict[str, Any] = {"source": source, "mode": mode, "settings": settings}
        await mirror(house, target, filter=first, **how)
        async with stage(house) as (reached, release):
            task = house.services.start_backup(mirror_request(house, target, **how))
            with trio.fail_after(10):
                await reached()
            outcome = await cancelled(house, task, release)
        assert outcome.status == "canceled"
        assert outcome.log[-1]["status"] == "failure"
        unheld(house)
        if mode == "delta":
            moments = times(house, source)
            found = await contents(house, target)
            assert found == [stock.chain[moments.index(each)] for each in times(house, target)]
        again = await mirror(house, target, **how)
        assert again.status == "success", again.snapshot
        assert times(house, target) == times(house, source)[-2:]
        if mode == "delta":
            assert await contents(house, target) == stock.chain[-2:]
        house.clean_remotes()


async def test_a_cancel_leaves_no_half_backup_at_once(tmp_path: Path, stock: Stock) -> None:
    """Not only after the next run."""
    async with house_with(stock, tmp_path) as house:
        for target, verb in (("remote1", "create.write"), ("directories1", "batch.write")):
            async with at(target, verb, skip=8)(house) as (reached, release):
                task = house.services.start_backup(mirror_request(house, target))
                await reached()
                await cancelled(house, task, release)
            house.clean_remotes()


async def test_a_cancel_at_the_metadata_waits_for_its_outcome(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house:
        async with house.faulty() as faults:
            gate = faults.add("write_file", Gate(), path="*.json")
            task = house.services.start_backup(mirror_request(house, "remote1"))
            await gate.reached.wait()
            await house.services.tasks.cancel(task.id)
            await trio.sleep(0.05)
            assert task.pending
            gate.release.set()
            outcome = await house.outcome(task)
        assert outcome.status == "canceled"
        assert await contents(house, "remote1") == stock.chain[:1]
        house.clean_remotes()


async def test_one_remote_is_cancelled_alone(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house, house.faulty() as faults:
        gate = faults.add("create.write", Gate(), path="*.vhd", skip=12)
        settings = {"nRetriesVmBackupFailures": 3}
        request = mirror_request(house, "remote1", "remote2", settings=settings)
        task = house.services.start_backup(request)
        await gate.reached.wait()
        (vm,) = task.children
        pending = [
            each for each in vm.children if each.pending and each.properties.get("id") == "remote1"
        ]
        await house.services.tasks.cancel(pending[0].id)
        outcome = await house.outcome(task)
        assert outcome.status == "canceled"
        assert await contents(house, "remote2") == stock.chain
        assert len(house.backups("remote1")) == 1
        assert not outcome.of("backup VM")[0]["data"].get("warnings")
        house.clean_remotes()


async def test_a_cancelled_vm_leaves_the_others(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path) as house, house.faulty() as faults:
        base = house.folder("source") / "xo-vm-backups"
        other = "99999999-9999-4999-8999-999999999999"
        (base / stock.vm).rename(base / other)
        for cache in base.glob("*/cache.json.gz"):
            cache.unlink()
        stock_again = stock.root / "source" / "xo-vm-backups" / stock.vm
        shutil.copytree(stock_again, base / stock.vm)
        gate = faults.add("create.write", Gate(), path=f"xo-vm-backups/{other}/*")
        task = house.services.start_backup(mirror_request(house, "remote1"))
        await gate.reached.wait()
        (vm,) = [each for each in task.children if each.properties.get("id") == other]
        await house.services.tasks.cancel(vm.id)
        outcome = await house.outcome(task)
        assert {each["data"]["id"]: each["status"] for each in outcome.of("backup VM")} == {
            other: "canceled",
            stock.vm: "success",
        }
        assert await contents(house, "remote1") == stock.chain
