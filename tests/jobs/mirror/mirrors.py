"""Sources with a history, and jobs that mirror them."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from proxy.disks.disk import block_pool
from proxy.disks.opening import open_chain
from proxy.jobs import BackupRequest
from proxy.remotes import Remote
from proxy.runtime.threads import inline_threads
from proxy.simulator import SimulatedPool
from tests.jobs.conftest import KEY, House, Outcome, open_house, read_stored
from tests.jobs.test_incremental_backup import BLOCK, MIB, live

MIRROR_JOB = "33333333-3333-4333-8333-333333333333"
MIRROR_SCHEDULE = "44444444-4444-4444-8444-444444444444"
SIZE = 6 * MIB
CHAIN = 4
ARCHIVES = 3

Content = dict[str, str]
"""Of each disk, by its uuid, a digest of all its bytes."""


@dataclass
class Stock:
    """One VM of two disks, backed up several times: a chain, on several kinds of remotes, and
    full backups on one."""

    root: Path
    vm: str = ""
    chain: list[Content] = field(default_factory=list[Content])
    """What the disks were at each backup of the chain, oldest first."""
    raw: list[dict[str, bytes]] = field(default_factory=list[dict[str, bytes]])

    def put(self, house: House, name: str = "source") -> None:
        """Let the remote ``name`` of ``house`` be a copy of the one that is kept here."""
        shutil.copytree(self.root / name, house.folder(name), symlinks=True)
        house.remote_spec(name)

    async def make(self) -> None:
        pool = SimulatedPool.small(disks_per_vm=2, disk_size=SIZE, fill=0.0)
        async with open_house(pool, self.root) as house:
            self.vm = pool.vm_uuid("vm1")
            kept = {"exportRetention": 99}
            kinds = ("source", "directories0", "encrypted0")
            for number in range(CHAIN):
                for disk, uuid in enumerate(live(house)):
                    pool.write(uuid, (number + disk) % 2 * BLOCK + 4096, bytes([number + 1]) * 8192)
                    pool.write(uuid, 2 * BLOCK, bytes([number + 101]) * 512)
                raw = {uuid: b"".join(pool.disk_bytes(uuid)) for uuid in live(house)}
                self.raw.append(raw)
                self.chain.append({uuid: sha256(data).hexdigest() for uuid, data in raw.items()})
                request = house.request(mode="delta", remotes=kinds, settings=kept)
                assert (await house.run(request)).status == "success"
            for _ in range(ARCHIVES):
                outcome = await house.run(house.request(remotes=("archives",), settings=kept))
                assert outcome.status == "success"


@asynccontextmanager
async def house_with(
    stock: Stock, root: Path, *sources: str, **options: Any
) -> AsyncIterator[House]:
    """Files in memory take less time than the hop to a thread that reads them."""
    with inline_threads():
        async with open_house(SimulatedPool.small(), root, **options) as house:
            for name in sources or ("source",):
                stock.put(house, name)
            yield house


def mirror_request(
    house: House,
    *targets: str,
    source: str = "source",
    mode: str = "delta",
    settings: dict[str, Any] | None = None,
    levels: dict[str, Any] | None = None,
    **job: Any,
) -> BackupRequest:
    """``settings`` are the schedule's, ``levels`` others."""
    data = {"jobId": MIRROR_JOB, "jobName": "mirror", "scheduleId": MIRROR_SCHEDULE}
    return BackupRequest(
        job={
            "id": MIRROR_JOB,
            "name": "mirror",
            "type": "mirrorBackup",
            "mode": mode,
            "sourceRemote": source,
            "remotes": {"id": {"__or": list(targets)}},
            "settings": {
                "": {},
                MIRROR_SCHEDULE: {"exportRetention": 9, **(settings or {})},
                **(levels or {}),
            },
            **job,
        },
        schedule={"id": MIRROR_SCHEDULE, "name": "every night"},
        remotes={name: house.remote_spec(name) for name in (source, *targets)},
        xapis={},
        record_to_xapi={},
        job_data={**data, "mode": mode},
    )


async def mirror(house: House, *targets: str, **how: Any) -> Outcome:
    return await house.run(mirror_request(house, *targets, **how))


def metadata(house: House, remote: str) -> list[dict[str, Any]]:
    """Of each backup on a remote, oldest first."""
    base = house.folder(remote)
    found: list[dict[str, Any]] = [
        json.loads(read_stored(base, base / each.removeprefix("/")))
        for each in house.backups(remote)
    ]
    return sorted(found, key=lambda each: each["timestamp"])


def times(house: House, remote: str) -> list[int]:
    return [each["timestamp"] for each in metadata(house, remote)]


def messages(outcome: Outcome, name: str = "backup VM", kind: str = "infos") -> list[str]:
    return [note["message"] for task in outcome.of(name) for note in task["data"].get(kind, [])]


async def contents(house: House, remote: str) -> list[Content]:
    """Of each backup on a remote, oldest first, read back through its whole chain."""
    async with house.services.remote(house.remote_spec(remote)) as opened:
        return await contents_of(opened, metadata(house, remote))


async def contents_of(remote: Remote, backups: list[dict[str, Any]]) -> list[Content]:
    found: list[Content] = []
    pool = block_pool(4)
    for backup in backups:
        content: Content = {}
        for path in backup["vhds"].values():
            full = f"xo-vm-backups/{backup['vm']['uuid']}/{path}"
            async with open_chain(remote, full) as chain:
                data = bytearray(chain.virtual_size)
                async with chain.read(pool) as reader:
                    while (block := await reader.next()) is not None:
                        data[block.index * BLOCK : (block.index + 1) * BLOCK] = block.data
                        block.release()
            content[path.split("/")[2]] = sha256(data).hexdigest()
        found.append(content)
    return found


def disks_of(house: House, remote: str) -> Iterator[Path]:
    return house.folder(remote).glob("xo-vm-backups/*/vdis/*/*/*.vhd")


ENCRYPTED = f"encryptionKey={quote(json.dumps(KEY))}"
