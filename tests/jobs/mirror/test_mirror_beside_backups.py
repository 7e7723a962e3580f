"""Backups and mirrors in all directions, by several jobs, on the same remotes."""

from __future__ import annotations

import random
from hashlib import sha256
from pathlib import Path

import pytest

from proxy.runtime.threads import inline_threads
from proxy.simulator import SimulatedPool
from tests.jobs.conftest import House, open_house
from tests.jobs.test_incremental_backup import BLOCK, live

from .mirrors import SIZE, Content, contents, metadata, mirror

REMOTES = ("source", "directories1", "encrypted1", "remote1")
STEPS = 12


async def back_up(house: House, chance: random.Random, known: dict[int, Content]) -> None:
    for uuid in live(house):
        place = chance.randrange(3) * BLOCK + 4096 * chance.randrange(8)
        house.pool.write(uuid, place, bytes([chance.randrange(256)]) * 8192)
    state = {
        uuid: sha256(b"".join(house.pool.disk_bytes(uuid))).hexdigest() for uuid in live(house)
    }
    remotes = ["source"] if chance.random() < 0.6 else chance.sample(REMOTES, 2)
    settings = {"exportRetention": chance.randint(1, 4), "fullInterval": chance.choice([0, 3])}
    request = house.request(mode="delta", remotes=tuple(remotes), settings=settings)
    outcome = await house.run(request)
    assert outcome.status == "success", outcome.snapshot
    for remote in remotes:
        for backup in metadata(house, remote):
            known.setdefault(backup["timestamp"], state)


async def mirror_some(house: House, chance: random.Random) -> None:
    source = chance.choice(there(house))
    targets = chance.sample([each for each in REMOTES if each != source], chance.randint(1, 2))
    settings = {"exportRetention": chance.randint(1, 4), "deleteFirst": chance.random() < 0.2}
    job = chance.choice(["one", "another"])
    outcome = await mirror(house, *targets, source=source, settings=settings, id=job)
    assert outcome.status == "success", outcome.snapshot


def there(house: House) -> list[str]:
    return [each for each in REMOTES if (house.folder(each) / "xo-vm-backups").exists()]


@pytest.mark.parametrize("seed", [3, 5, 11])
async def test_every_backup_stays_what_it_was(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    pool = SimulatedPool.small(disks_per_vm=1, disk_size=SIZE, fill=0.0)
    known: dict[int, Content] = {}
    """What the disks were at the time of each backup."""
    with inline_threads():
        async with open_house(pool, tmp_path) as house:
            for step in range(STEPS):
                if step == 0 or chance.random() < 0.5:
                    await back_up(house, chance, known)
                else:
                    await mirror_some(house, chance)
                for remote in there(house):
                    found = [known[backup["timestamp"]] for backup in metadata(house, remote)]
                    assert await contents(house, remote) == found
            house.clean_remotes()
