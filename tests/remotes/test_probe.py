from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.errors import Conflict, Refused, Unreachable
from proxy.remotes import opened_remote
from proxy.remotes.bounds import Bounded
from proxy.remotes.faults import Fail, Faults, Gate
from proxy.remotes.metrics import Metrics
from proxy.remotes.probe import TEST_SIZE
from proxy.remotes.probe import test_remote as probe
from proxy.remotes.retry import Retry
from proxy.remotes.wrapper import Wrapper
from tests.remotes.conftest import OPTIONS, opened, tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
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
async def test_weakness_15_a_failed_step_keeps_its_message(
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
async def test_weakness_15_a_cancel_removes_the_file(
    faults: Faults, root: Path, stage: str
) -> None:
    """Upstream leaves `*.test` behind."""
    gate = faults.add(stage, Gate(after=True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe, given(faults))
        await gate.reached.wait()
        assert len(tree(root)) == 1
        nursery.cancel_scope.cancel()
    assert tree(root) == []


NOW = 1_900_000_000_000


def leave(root: Path, name: str, *, size: int = TEST_SIZE, age: float = 7200) -> None:
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(b"")
    os.truncate(root / name, size)
    changed = NOW / 1000 - age
    os.utime(root / name, (changed, changed))


async def test_weakness_15_what_a_killed_test_left_is_removed_by_a_later_one(
    faults: Faults, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream never does.  Only what is surely a dead test's: its name, its size, both times."""
    monkeypatch.setattr("proxy.remotes.probe.time.time", lambda: NOW / 1000)
    monkeypatch.setattr("proxy.remotes.probe.time.time_ns", lambda: NOW * 1_000_000)
    old, young = NOW - 7_200_000, NOW - 60_000
    leave(root, f"{old}.test")
    leave(root, f"{old + 1}.test", size=123)
    kept = {
        f"{young}.test": {},
        f"{old + 2}.test": {"age": 60},
        f"{old + 3}.test": {"size": TEST_SIZE + 100},
        f"x{old}.test": {},
        f"{old}.test.json": {},
        "results.test": {},
    }
    for name, properties in kept.items():
        leave(root, name, **properties)
    (root / f"{old + 4}.test").mkdir()
    result = await probe(given(faults))
    assert set(result) == {"success", "writeRate", "readRate"}
    assert tree(root) == sorted([*kept, f"{old + 4}.test"])


async def test_a_leftover_that_stays_is_no_failure(faults: Faults, root: Path) -> None:
    root.mkdir(exist_ok=True)
    faults.add("list", Fail(Unreachable("gone")))
    result = await probe(given(faults))
    assert result["success"] is True
    assert result["warnings"] == ["what an earlier test left could not be removed: gone"]


async def test_an_immutable_remote_may_keep_the_file(root: Path) -> None:
    async with opened(f"file://{root}?immutable=true") as remote:
        faults = Faults(remote)
        faults.add("unlink", Fail(Refused("EPERM: not permitted", code="EPERM")))
        result = await probe(given(faults))
    assert result["success"] is True
    assert result["warnings"] == [
        "the test file stays, as on an immutable remote: EPERM: not permitted"
    ]


class Store(Wrapper):
    """An object store, as far as it says what it can do."""

    async def capabilities(self) -> Mapping[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"batchDelete": True, "secretAccessKey": "hunter2Is0nlyOurs"}


async def test_what_the_store_can_do_is_told_through_every_wrapper(root: Path) -> None:
    async with opened(f"file://{root}") as remote:
        wrapped = Faults(Metrics(Bounded(Retry(Store(remote)), at_once=4, seconds=10)))
        result = await probe(given(wrapped))
        assert result["capabilities"]["batchDelete"] is True
        assert "hunter2" not in repr(result)
        wrapped.add("capabilities", Fail(Unreachable("gone")))
        result = await probe(given(wrapped))
        assert result["success"] is True
        assert result["warnings"] == ["it could not be asked what it can do: gone"]
