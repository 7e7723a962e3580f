from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import pytest
import trio

from proxy.config import Config
from proxy.config.schema import RemotesConfig
from proxy.config.values import Seconds
from proxy.formats.encrypted import Algorithm, FileCipher
from proxy.jobs import BackupRequest, RestoreRequest, Services, open_services
from proxy.remotes.factory import RemoteOptions, opened_remote
from proxy.remotes.faults import Faults
from proxy.remotes.metrics import Metrics
from proxy.simulator import SimulatedPool, serve
from proxy.tasks import Task, open_tasks

JOB = "11111111-1111-4111-8111-111111111111"
SCHEDULE = "22222222-2222-4222-8222-222222222222"


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that another task or a thread does."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.005)


def files_of(root: Path) -> list[str]:
    """Every file of the remote at ``root`` but listing caches, from where its VMs are."""
    base = root / "xo-vm-backups"
    return sorted(
        str(path.relative_to(base))
        for path in base.rglob("*")
        if path.is_file() and path.name != "cache.json.gz"
    )


KEY = "an encryption key of 32 letters."


def read_stored(root: Path, path: Path) -> bytes:
    """The content of a file of the remote at ``root``, which may be encrypted."""
    stored, description = path.read_bytes(), root / "encryption.json"
    if not description.exists():
        return stored
    algorithm = Algorithm(json.loads(description.read_bytes())["algorithm"])
    return FileCipher(algorithm, KEY).decrypt(stored)


def explained(root: Path) -> set[str]:
    """The files that the backups of a remote consist of, by what their metadata says."""
    base, names = root / "xo-vm-backups", files_of(root)
    wanted: set[str] = set()
    for name in names:
        if not name.endswith(".json") or "/vdis/" in name:
            continue
        wanted.add(name)
        metadata = json.loads(read_stored(root, base / name))
        directory = name.partition("/")[0]
        if metadata["mode"] == "full":
            stem = name.removesuffix(".json")
            wanted.add(f"{stem}.xva")
            if not (root / "encryption.json").exists():
                wanted.add(f"{stem}.xva.checksum")
            continue
        for disk in metadata["vhds"].values():
            path = f"{directory}/{disk}"
            wanted.add(path)
            folder, _, disk_name = path.rpartition("/")
            wanted.add(f"{folder}/.{disk_name.partition('.')[0]}.xxh3")
            if path.endswith(".alias.vhd"):
                target = read_stored(root, base / path).decode()
                blocks = f"{folder}/{target}/"
                wanted |= {each for each in names if each.startswith(blocks)}
    return wanted


@dataclass
class House:
    """A daemon's services beside a simulated pool and remotes in a temporary folder."""

    pool: SimulatedPool
    services: Services
    root: Path
    remotes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def remote_spec(self, name: str) -> dict[str, Any]:
        """A folder; one whose name starts with ``directories`` keeps disks as directories,
        one that starts with ``encrypted`` is encrypted too."""
        query = "?useVhdDirectory=true" if name.startswith(("directories", "encrypted")) else ""
        if name.startswith("encrypted"):
            query += f"&encryptionKey={quote(json.dumps(KEY))}"
        url = f"file://{self.root / name}{query}"
        return self.remotes.setdefault(name, {"id": name, "name": name, "url": url})

    def folder(self, name: str = "remote1") -> Path:
        return self.root / name

    @property
    def xapi_spec(self) -> dict[str, Any]:
        return {
            "url": self.pool.url,
            "credentials": {"username": "root", "password": "simulated"},
            "allowUnauthorized": True,
        }

    def request(
        self,
        *,
        vms: list[str] | None = None,
        remotes: tuple[str, ...] = ("remote1",),
        settings: dict[str, Any] | None = None,
        mode: str = "full",
        xapi: dict[str, Any] | None = None,
        **job: Any,
    ) -> BackupRequest:
        """A job over the pool's VMs; ``settings`` are the schedule's."""
        uuids = vms if vms is not None else [self.pool.vm_uuid("vm1")]
        levels = {"": {}, SCHEDULE: {"exportRetention": 2, **(settings or {})}}
        return BackupRequest(
            job={
                "id": JOB,
                "name": "lab job",
                "type": "backup",
                "mode": mode,
                "compression": "",
                "vms": {"id": {"__or": uuids}},
                "remotes": {"id": {"__or": list(remotes)}},
                "settings": levels,
                **job,
            },
            schedule={"id": SCHEDULE, "name": "lab schedule"},
            remotes={name: self.remote_spec(name) for name in remotes},
            xapis={"xapi1": {**self.xapi_spec, **(xapi or {})}},
            record_to_xapi=dict.fromkeys(uuids, "xapi1"),
            job_data={
                "jobId": JOB,
                "jobName": "lab job",
                "mode": mode,
                "scheduleId": SCHEDULE,
            },
        )

    @asynccontextmanager
    async def faulty(self, remote: str = "remote1") -> AsyncIterator[Faults]:
        """The remote that runs will use meanwhile, with faults on command."""
        async with self.services.remote(self.remote_spec(remote)) as opened:
            assert isinstance(opened, Metrics)
            faults = opened.inner
            assert isinstance(faults, Faults)
            yield faults

    async def clean(self) -> None:
        """Assert that neither the pool nor a remote holds anything but backups."""
        with trio.move_on_after(5):
            while self.pool.leftovers(connections=True):
                await trio.sleep(0.01)
        assert self.pool.leftovers(connections=True) == {}
        self.clean_remotes()

    def clean_remotes(self) -> None:
        """Assert that no remote holds anything but backups."""
        self.clean_remotes_but()

    def clean_remotes_but(self, *damaged: str) -> None:
        for remote in self.remotes.keys() - set(damaged):
            base = self.folder(remote) / "xo-vm-backups"
            locks = [path.name for path in base.glob("*.lock")] + [
                path.name for path in base.glob(".*")
            ]
            assert locks == []
            assert set(self.files(remote)) == explained(self.folder(remote))

    async def run(self, request: BackupRequest) -> Outcome:
        return await self.outcome(self.services.start_backup(request))

    async def outcome(self, task: Task) -> Outcome:
        with trio.fail_after(30):
            log = [json.loads(record) async for record in self.services.tasks.watch(task)]
        return Outcome(task, log, json.loads(task.snapshot()))

    async def restore(self, backup_id: str, remote: str = "remote1", **settings: Any) -> Task:
        return await self.services.start_restore(
            RestoreRequest(
                backup_id=backup_id,
                remote=self.remote_spec(remote),
                sr_uuid=self.pool.store.get("SR", self.pool.srs[1])["uuid"],
                xapi=self.xapi_spec,
                **settings,
            )
        )

    def chains(self, remote: str = "remote1") -> dict[str, list[str]]:
        """Names of the disks in each directory of disks, in order."""
        base = self.folder(remote) / "xo-vm-backups"
        found: dict[str, list[str]] = {}
        for path in sorted(base.glob("*/vdis/*/*/*.vhd")):
            found.setdefault(path.parent.name, []).append(path.name)
        return found

    def files(self, remote: str = "remote1") -> list[str]:
        """Every file of a remote but the listing cache, relative to the VM's directory."""
        return files_of(self.folder(remote))

    def backups(self, remote: str = "remote1") -> list[str]:
        return [
            f"/xo-vm-backups/{name}"
            for name in self.files(remote)
            if name.endswith(".json") and "/vdis/" not in name
        ]


@dataclass
class Outcome:
    task: Task
    log: list[dict[str, Any]]
    snapshot: dict[str, Any]

    @property
    def status(self) -> str:
        return str(self.snapshot["status"])

    def tree(self) -> list[tuple[str, ...]]:
        """Each record as (task name, what), without progress."""
        names = {r["id"]: r["properties"]["name"] for r in self.log if r["type"] == "start"}
        return [
            (names[r["id"]], r.get("status") or r.get("message") or r["type"])
            for r in self.log
            if r["type"] != "property"
        ]

    def of(self, name: str) -> list[dict[str, Any]]:
        """The snapshots of the tasks with this name, anywhere in the tree."""

        def walk(task: dict[str, Any]) -> list[dict[str, Any]]:
            found = [task] if task["data"]["name"] == name else []
            for child in task.get("tasks", []):
                found += walk(child)
            return found

        return walk(self.snapshot)

    def error(self, name: str) -> dict[str, Any]:
        errors = [task["data"]["error"] for task in self.of(name) if "error" in task["data"]]
        assert len(errors) == 1, errors
        found: dict[str, Any] = errors[0]
        return found


@asynccontextmanager
async def _faulty_remote(
    spec: Mapping[str, Any], *, options: RemoteOptions
) -> AsyncIterator[Faults]:
    async with opened_remote(spec, options=options) as remote:
        yield Faults(remote)


@asynccontextmanager
async def open_house(
    pool: SimulatedPool,
    root: Path,
    *,
    tls: bool = False,
    slave_host: str | None = None,
    config: Config | None = None,
) -> AsyncIterator[House]:
    chosen = config or Config(
        remotes=RemotesConfig(disable_file_remotes=False), resource_cache_delay=Seconds(0)
    )
    async with trio.open_nursery() as nursery:
        patch = mock.patch("proxy.jobs.services.opened_remote", _faulty_remote)
        await nursery.start(partial(serve, pool, tls=tls, slave_host=slave_host))
        async with (
            open_tasks(str(root / "tasks.db"), nursery) as tasks,
            open_services(lambda: chosen, tasks, nursery) as services,
        ):
            try:
                with patch:
                    yield House(pool, services, root)
            finally:  # while the pool still answers
                services.cancel_all("the test is over")
                with trio.CancelScope(shield=True), trio.move_on_after(10):
                    await services.wait_idle()
        nursery.cancel_scope.cancel()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """One running VM of 4 MiB on a pool, one run's worth of services."""
    async with open_house(SimulatedPool.small(), tmp_path) as opened:
        yield opened
