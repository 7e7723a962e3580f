"""The real daemon is killed at chosen moments; started anew, it sweeps what it left.

Where ``scripts/torture`` looks for what was not thought of, these are the moments that the
sweep is for.  The pool lives in this process, so that it can stand still where it is to.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.simulator import SimulatedPool, serve
from tests.torture.programs import Daemon

from .conftest import JOB, SCHEDULE, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
MIB = 1024 * 1024
POOL_BACKUPS = "xo-pool-metadata-backups"


@dataclass
class Stage:
    """What is begun, where the pool stands still when the daemon is killed, what may stay."""

    method: str
    gate: tuple[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    swept: frozenset[str] = frozenset()
    """The types that must be among what is swept."""
    stays: frozenset[str] = frozenset()
    """Kinds of what the pool has more afterwards: it was finished, and is its job's."""


STAGES = {
    "blocking migration": Stage(
        "full",
        ("VM.add_to_blocked_operations", {"stage": "after"}),
        swept=frozenset({"blocked_operations"}),
    ),
    "the VM is shut down": Stage(
        "full",
        ("VM.clean_shutdown", {"stage": "after"}),
        {"offlineBackup": True},
        swept=frozenset({"blocked_operations", "shutdown"}),
    ),
    "the snapshot is not marked as finished": Stage(
        "full",
        ("VM.snapshot", {"stage": "after"}),
        swept=frozenset({"VM", "blocked_operations"}),
    ),
    "exporting": Stage(
        "full",
        ("/export", {"at_bytes": MIB}),
        swept=frozenset({"task", "blocked_operations", "lock"}),
        stays=frozenset({"snapshots"}),
    ),
    "restoring": Stage(
        "restore",
        ("VM.add_tags", {}),
        swept=frozenset({"VM", "task"}),
    ),
    "exporting the pool's database": Stage(
        "metadata",
        ("/pool/xmldbdump", {"at_bytes": MIB}),
        swept=frozenset({"task", "lock"}),
    ),
}


@dataclass
class Lab:
    """A pool in this process, and a daemon in lives of its own."""

    pool: SimulatedPool
    folder: Path
    daemon: Daemon | None = None

    @property
    def remote(self) -> Path:
        return self.folder / "remote"

    async def begin(self) -> None:
        self.daemon = await trio.to_thread.run_sync(Daemon, self.folder)

    async def kill(self) -> None:
        assert self.daemon is not None
        await trio.to_thread.run_sync(self.daemon.end)
        self.daemon = None

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        daemon = self.daemon
        assert daemon is not None
        return await trio.to_thread.run_sync(lambda: daemon.call(method, **params))

    async def ended(self, task: str) -> dict[str, Any]:
        with trio.fail_after(30):
            while True:
                found: dict[str, Any] = await self.call("task.get", {"taskId": task})
                if found["status"] != "pending":
                    return found
                await trio.sleep(0.05)

    async def start(self, stage: Stage) -> str:
        spec = {"url": f"file://{self.remote}"}
        xapi = {
            "url": self.pool.url,
            "credentials": {"username": "root", "password": "simulated"},
            "allowUnauthorized": True,
        }
        if stage.method == "restore":
            backups = (await self.call("backup.listVmBackups", {"remotes": {"r": spec}}))["r"]
            sr = self.pool.store.get("SR", self.pool.default_sr)["uuid"]
            (newest, *_) = (each["id"] for of_vm in backups.values() for each in of_vm)
            params: dict[str, Any] = {"backupId": newest, "remote": spec}
            return str(
                await self.call("backup.importVmBackup", {**params, "srUuid": sr, "xapi": xapi})
            )
        vm = self.pool.vm_uuid("vm1")
        pool = str(self.pool.store.get("pool", self.pool.ref)["uuid"])
        job: dict[str, Any] = {
            "id": JOB,
            "name": "job",
            "type": "backup",
            "mode": "full",
            "vms": {"id": vm},
            "settings": {SCHEDULE: {"exportRetention": 9, **stage.settings}},
        }
        if stage.method == "metadata":
            job = {
                "id": "metadata",
                "name": "metadata",
                "type": "metadataBackup",
                "pools": {"id": pool},
                "settings": {SCHEDULE: {"retentionPoolMetadata": 3}},
            }
        return str(
            await self.call(
                "backup.run",
                {
                    "job": {**job, "remotes": {"id": "r"}},
                    "schedule": {"id": SCHEDULE},
                    "remotes": {"r": spec},
                    "xapis": {"p": xapi},
                    "recordToXapi": {vm: "p", pool: "p"},
                },
            )
        )

    async def sweep(self, *, dry_run: bool = False) -> dict[str, list[dict[str, str]]]:
        """What was swept and left, of the pool and the remote together."""
        xapi = {
            "url": self.pool.url,
            "credentials": {"username": "root", "password": "simulated"},
            "allowUnauthorized": True,
        }
        params = {
            "xapis": {"p": xapi},
            "remotes": {"r": {"url": f"file://{self.remote}"}},
            "dryRun": dry_run,
        }
        done = await self.ended(str(await self.call("backup.sweep", params)))
        assert done["status"] == "success", done
        result = done["data"]["result"]
        reports = [result["pools"]["p"], result["remotes"]["r"]]
        return {key: [one for each in reports for one in each[key]] for key in ("swept", "left")}


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Lab]:
    pool = SimulatedPool.small(disk_size=4 * MIB)
    pool.database_filler = 3 * MIB
    lab = Lab(pool, folder)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, pool)
        lab.remote.mkdir()
        await lab.begin()
        try:
            yield lab
        finally:
            with trio.CancelScope(shield=True):
                if lab.daemon is not None:
                    await lab.kill()
        nursery.cancel_scope.cancel()


def grow_old(root: Path) -> None:
    """Let three hours pass for what was not finished; its name tells the time too."""
    then = time.time() - 3 * 3600
    for path in [*root.rglob("*")]:
        os.utime(path, (then, then))
    for path in [*root.glob(f"{POOL_BACKUPS}/*/*/*Z")]:
        if not (path / "metadata.json").exists():
            path.rename(path.with_name("20260101T000000Z"))


async def test_what_a_killed_daemon_left_is_swept(tmp_path: Path) -> None:
    async with opened(tmp_path) as lab:
        pool = lab.pool
        assert (await lab.ended(await lab.start(Stage("full", ("", {})))))["status"] == "success"
        for name, stage in STAGES.items():
            pool.mark()
            running = pool.store.get("VM", pool.vm("vm1"))["power_state"]
            kept = sorted(lab.remote.rglob("*.json"))
            gate = pool.pause_at(stage.gate[0], **stage.gate[1])
            task = await lab.start(stage)
            with trio.fail_after(20):
                await gate.reached()
            if "lock" in stage.swept:  # the target is opened beside the source
                await until(lambda: bool(list(lab.remote.rglob("*.lock"))))
            if stage.method == "metadata":
                await until(lambda: bool(list(lab.remote.glob(f"{POOL_BACKUPS}/*/*/*Z/*"))))
            await lab.kill()
            gate.release()
            with trio.fail_after(10):
                while pool.connections:  # the host notices, and does what it was told before
                    await trio.sleep(0.02)
            await lab.begin()
            planned = await lab.sweep(dry_run=True)
            done = await lab.sweep()
            types = {entry["type"] for entry in done["swept"]}
            assert types >= stage.swept, (name, done)
            assert {entry["run"] for entry in done["swept"]} == {task}, (name, done)
            assert _keys(planned) == _keys(done), name
            assert set(_left(pool)) == stage.stays, (name, _left(pool))
            assert pool.store.get("VM", pool.vm("vm1"))["power_state"] == running, name
            assert sorted(lab.remote.rglob("*.json")) == kept, name
            assert not list(lab.remote.rglob("*.lock")), name
        grow_old(lab.remote)
        done = await lab.sweep()
        assert [entry["path"].rpartition("/")[2] for entry in done["swept"]], done
        assert not [p for p in lab.remote.rglob("*") if p.name.endswith(".tmp")]
        assert not list(lab.remote.glob(f"{POOL_BACKUPS}/*/*/*"))
        for method in ("full", "metadata"):
            again = await lab.ended(await lab.start(Stage(method, ("", {}))))
            assert again["status"] == "success", again
        assert pool.snapshots() == [], "the next run pruned what its job's dead run had finished"
        await until(lambda: _left(pool) == {})


def _left(pool: SimulatedPool) -> dict[str, list[str]]:
    """But for what a host notes of calls that have ended, and forgets after a day."""
    found = pool.leftovers()
    found["tasks"] = [task for task in found.get("tasks", []) if not task.startswith("Async.")]
    return {kind: what for kind, what in found.items() if what}


def _keys(report: Mapping[str, list[dict[str, str]]]) -> list[tuple[str, str]]:
    return sorted((e["type"], e.get("uuid") or e["path"]) for e in report["swept"])
