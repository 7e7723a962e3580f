"""A full backup against the simulated pool: what the log says, what is on the remote."""

from __future__ import annotations

from .conftest import House


async def test_smoke(house: House) -> None:
    outcome = await house.run(house.request())
    for line in outcome.log:
        print(line)
    print(house.files())
    print(house.pool.leftovers())
    assert outcome.status == "success"
