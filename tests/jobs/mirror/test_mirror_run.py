"""Mirror runs between folders, and what is restored from what they copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from .mirrors import Stock, contents, house_with, messages, metadata, mirror, times


@pytest.mark.parametrize("target", ["remote1", "directories1", "encrypted1"])
@pytest.mark.parametrize("source", ["source", "directories0", "encrypted0"])
async def test_a_chain_is_copied_in_the_form_that_the_remote_keeps(
    tmp_path: Path, stock: Stock, source: str, target: str
) -> None:
    async with house_with(stock, tmp_path, source) as house:
        outcome = await mirror(house, target, source=source)
        assert outcome.status == "success", outcome.snapshot
        assert await contents(house, target) == stock.chain
        assert times(house, target) == times(house, source)
        kinds = [set(each["isVhdDifferencing"].values()) for each in metadata(house, target)]
        assert kinds == [{False}, {True}, {True}, {True}]
        house.clean_remotes()


async def test_archives_are_copied(tmp_path: Path, stock: Stock) -> None:
    async with house_with(stock, tmp_path, "archives") as house:
        outcome = await mirror(house, "remote1", "encrypted1", source="archives", mode="full")
        assert outcome.status == "success", outcome.snapshot
        assert times(house, "remote1") == times(house, "archives") == times(house, "encrypted1")
        house.clean_remotes()
