"""A mirror run after a crash at any change on its remote: what has metadata is whole, before the
next run and after it, and that run brings the rest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from proxy.remotes.recording import Change, crash_states
from tests.jobs.conftest import explained, files_of
from tests.jobs.crashes import recording

from .mirrors import Stock, contents, house_with, metadata, mirror, times


def plain(house_folder: Path) -> set[str]:
    return {name for name in files_of(house_folder) if not name.endswith(".xxh3")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target", "mode"),
    [
        ("source", "remote1", "delta"),
        ("source", "directories1", "delta"),
        ("archives", "remote1", "full"),
    ],
)
async def test_after_a_crash_at_any_change(
    tmp_path: Path, stock: Stock, source: str, target: str, mode: str
) -> None:
    async with house_with(stock, tmp_path, source) as house:
        how: dict[str, Any] = {"source": source, "mode": mode, "settings": {"exportRetention": 2}}
        moments = times(house, source)
        await mirror(house, target, filter={"timestamp": moments[0]}, **how)
        start, lasting = tmp_path / "start", times(house, target)
        shutil.copytree(house.folder(target), start)
        changes: list[Change] = []
        with recording(changes):
            outcome = await mirror(house, target, **how)
        assert outcome.status == "success", outcome.snapshot
        after = times(house, target)
        states = list(crash_states(changes, start=start))
        assert len(states) > 20
        for number, (when, show) in enumerate(states):
            if number % (len(states) // 4):  # each costs a run; the moments are spread evenly
                continue
            show(house.folder(target))
            for lock in house.folder(target).glob("xo-vm-backups/*.lock"):
                lock.rmdir()
            found = times(house, target)
            assert set(found) >= set(lasting) & set(after), when
            if mode == "delta":
                expected = [stock.chain[moments.index(each)] for each in found]
                assert await contents(house, target) == expected, when
            again = await mirror(house, target, **how)
            assert again.status == "success", (when, again.snapshot)
            assert times(house, target) == moments[-2:], when
            if mode == "delta":
                assert await contents(house, target) == stock.chain[-2:], when
            assert plain(house.folder(target)) == {
                name for name in explained(house.folder(target)) if not name.endswith(".xxh3")
            }, when
            assert len(metadata(house, target)) == 2
