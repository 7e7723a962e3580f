from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Conflict, Refused, Unreachable
from proxy.remotes import opened_remote
from proxy.remotes.faults import Fail, Faults, Gate
from proxy.remotes.probe import TEST_SIZE
from proxy.remotes.probe import test_remote as probe
from tests.remotes.conftest import OPTIONS, opened, tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from proxy.remotes import Remote


@pytest.fixture
async def faults(root: Path) -> AsyncIterator[Faults]:
    async with opened(f"file://{root}") as remote:
        yield Faults(remote)


def given(remote: Remote) -> contextlib.AbstractAsyncContextManager[Remote]:
    return contextlib.nullcontext(remote)


async def test_rates(faults: Faults, root: Path) -> None:
    result = await probe(given(faults))
    assert set(result) == {"success", "writeRate", "readRate"}
    assert result["success"] is True
    assert result["writeRate"] > TEST_SIZE / 60
    assert result["readRate"] > TEST_SIZE / 60
    assert tree(root) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/hostname/x", "ENOTDIR: not a directory, mkdir '/etc/hostname/x'"),
        ("ftp://nowhere", "Unhandled remote type"),
    ],
)
async def test_a_remote_that_does_not_open(url: str, message: str) -> None:
    """As recorded from upstream."""
    opening = opened_remote({"url": url}, options=OPTIONS)
    assert await probe(opening) == {"success": False, "error": message}


@pytest.mark.parametrize(
    ("verb", "step"), [("write_file", "write"), ("read_file", "read"), ("unlink", "unlink")]
)
async def test_a_failed_step_keeps_its_message(
    faults: Faults, root: Path, verb: str, step: str
) -> None:
    """Upstream answers the error as an empty object."""
    faults.add(verb, Fail(Refused("ENOSPC: no space", code="ENOSPC"), after=verb == "write_file"))
    result = await probe(given(faults))
    assert result["success"] is False
    assert (result["step"], result["error"]) == (step, "ENOSPC: no space")
    assert result["file"].startswith("/")
    assert result["file"].endswith(".test")
    assert len(tree(root)) == (verb == "unlink")


async def test_other_bytes_than_were_written(
    faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wrong(path: str, *, limit: int = 0) -> bytes:
        del path
        return bytes(limit)

    monkeypatch.setattr(faults, "read_file", wrong)
    result = await probe(given(faults))
    assert (result["step"], result["error"]) == ("read", "output and input did not match")


async def test_a_leftover_is_told(faults: Faults) -> None:
    faults.add("read_file", Fail(Unreachable("gone")))
    faults.add("unlink", Fail(Unreachable("gone too")))
    result = await probe(given(faults))
    assert result["error"] == "gone, and the test file is left behind: gone too"


async def test_somebody_elses_file_is_not_removed(faults: Faults) -> None:
    faults.add("write_file", Fail(Conflict("EEXIST")))
    assert not (await probe(given(faults)))["success"]
    assert "unlink" not in {verb for verb, _ in faults.seen}


@pytest.mark.parametrize("stage", ["write_file", "read_file"])
async def test_a_cancel_removes_the_file(faults: Faults, root: Path, stage: str) -> None:
    """Upstream leaves `*.test` behind."""
    gate = faults.add(stage, Gate(after=True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe, given(faults))
        await gate.reached.wait()
        assert len(tree(root)) == 1
        nursery.cancel_scope.cancel()
    assert tree(root) == []
