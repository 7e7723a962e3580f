"""The wrappers' own behaviour; that they change nothing else is the conformance suite's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Conflict, NotFound, Refused, Unreachable
from proxy.remotes.faults import Call, Delay, Fail, Faults, Gate, Torn
from proxy.remotes.metrics import Metrics
from proxy.remotes.retry import Retry
from proxy.runtime.threads import inline_threads
from tests.remotes.conftest import opened, tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.virtual_clock

GONE = Unreachable("the server went away", code="ECONNRESET")


@pytest.fixture
async def faults(root: Path) -> AsyncIterator[Faults]:
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            yield Faults(remote)


async def test_a_fault_strikes_what_it_fits_and_once(faults: Faults) -> None:
    faults.add("write_file", Fail(GONE), path="*.json", skip=1)
    await faults.write_file("a.json", b"")
    await faults.write_file("b.xva", b"")
    with pytest.raises(Unreachable):
        await faults.write_file("b.json", b"")
    await faults.write_file("b.json", b"")
    assert faults.unused == []
    assert faults.seen[0] == ("write_file", "a.json")


async def test_an_error_before_or_after_the_effect(faults: Faults, root: Path) -> None:
    faults.add("write_file", Fail(GONE))
    faults.add("write_file", Fail(GONE, after=True))
    for expected in ([], ["f"]):
        with pytest.raises(Unreachable):
            await faults.write_file("f", b"x")
        assert tree(root) == expected


async def test_a_torn_write(faults: Faults, root: Path) -> None:
    faults.add("create.write", Torn(3, GONE))
    written = b""
    with pytest.raises(Unreachable):  # noqa: PT012 (the block is what ends)
        async with faults.create("f") as file:
            try:
                await file.write(b"abcdef")
            finally:
                written = (root / file.temporary_path).read_bytes()
    assert written == b"abc"
    assert tree(root) == []


async def test_the_disk_is_full_at_a_byte(faults: Faults) -> None:
    faults.fill_after(10)
    await faults.write_file("a", b"12345678")
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            async with faults.create("b") as file:
                await file.write(b"123")
        assert caught.value.code == "ENOSPC"
    faults.fill_after(None)
    await faults.write_file("c", b"x" * 100)


@pytest.mark.parametrize("after", [False, True])
async def test_a_gate_holds_until_released(faults: Faults, root: Path, *, after: bool) -> None:
    gate = faults.add("write_file", Gate(after=after))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(faults.write_file, "f", b"x")
        await gate.reached.wait()
        await trio.sleep(100)
        assert tree(root) == (["f"] if after else [])
        gate.release.set()
    assert tree(root) == ["f"]


STAGES = ["create.open", "create.write", "create.commit", "create.close"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_cancel_at_every_stage_of_a_file_leaves_it_whole_or_absent(
    faults: Faults, root: Path, stage: str, *, after: bool
) -> None:
    gate = faults.add(stage, Gate(after=after))
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                async with faults.create("f") as file:
                    await file.write(b"x")
                    await file.commit()

            nursery.start_soon(write)
            await gate.reached.wait()
            scope.cancel()
    committed = stage == "create.close" or (stage == "create.commit" and after)
    assert tree(root) == (["f"] if committed else [])


async def test_delay_and_call(faults: Faults) -> None:
    paths: list[str] = []
    faults.add("stat", Delay(30))
    faults.add("list", Call(lambda operation: paths.append(operation.path)))
    await faults.stat("")
    await faults.list("")
    assert trio.current_time() >= 30
    assert paths == [""]


# -- retry


async def test_what_passes_is_tried_again_with_upstreams_waits(faults: Faults) -> None:
    faults.add("read_file", Fail(GONE), times=5)
    await faults.write_file("f", b"x")
    told: list[str] = []
    retry = Retry(faults, told=lambda operation, _: told.append(operation.verb))
    start = trio.current_time()
    assert await retry.read_file("f") == b"x"
    assert trio.current_time() - start == pytest.approx(3.8)
    assert told == ["read_file"] * 5


async def test_the_sixth_failure_is_told(faults: Faults) -> None:
    faults.add("list", Fail(GONE), times=99)
    with pytest.raises(Unreachable):
        await Retry(faults).list("")
    assert faults.seen == [("list", "")] * 6


@pytest.mark.parametrize(
    "error",
    [
        NotFound("x"),
        Conflict("x"),
        Refused("x", code="ENOSPC"),
        Refused("x", code="EROFS"),
        Refused("x", code="EACCES"),
        TypeError("a bug"),
    ],
)
async def test_weakness_6_what_does_not_pass_is_not_tried_again(
    faults: Faults, error: Exception
) -> None:
    """Upstream tries a full disk, a refusal and its own bugs six times."""
    faults.add("write_file", Fail(error))
    with pytest.raises(type(error)):
        await Retry(faults).write_file("f", b"x")
    assert len(faults.seen) == 1
    assert trio.current_time() == 0


async def test_an_exclusive_write_is_not_repeated(faults: Faults, root: Path) -> None:
    """Upstream's second try gives up the exclusivity."""
    faults.add("write_file", Fail(GONE, after=True))
    with pytest.raises(Unreachable):
        await Retry(faults).write_file("f", b"x", exclusive=True)
    assert len(faults.seen) == 1
    assert tree(root) == ["f"]


async def test_a_rename_whose_answer_was_lost_has_happened(faults: Faults, root: Path) -> None:
    """Upstream's second try reports ENOENT."""
    await faults.write_file("a", b"new")
    await faults.write_file("b", b"old")
    faults.add("rename", Fail(GONE, after=True))
    await Retry(faults).rename("a", "b")
    assert (root / "b").read_bytes() == b"new"
    assert tree(root) == ["b"]


async def test_a_rename_whose_file_somebody_took_has_not_happened(faults: Faults) -> None:
    await faults.write_file("a", b"new")
    await faults.write_file("b", b"other")
    inner = faults.inner

    async def steal(_operation: object) -> None:
        await inner.unlink("a")
        raise GONE

    faults.add("rename", Call(steal))
    with pytest.raises(NotFound):
        await Retry(faults).rename("a", "b")
    assert await faults.read_file("b") == b"other"


async def test_a_removal_whose_answer_was_lost_has_happened(faults: Faults) -> None:
    await faults.write_file("d/f", b"")
    faults.add("unlink", Fail(GONE, after=True))
    faults.add("rmdir", Fail(GONE, after=True))
    retry = Retry(faults)
    await retry.unlink("d/f", missing_ok=False)
    await retry.rmdir("d", missing_ok=False)
    with pytest.raises(NotFound):
        await retry.unlink("d/f", missing_ok=False)


async def test_the_bytes_of_an_open_file_are_not_written_twice(faults: Faults) -> None:
    faults.add("create.write", Fail(GONE, after=True))
    with pytest.raises(Unreachable):
        async with Retry(faults).create("f") as file:
            await file.write(b"x")
    assert faults.seen.count(("create.write", "f")) == 1


async def test_a_cancel_ends_the_wait(faults: Faults) -> None:
    faults.add("list", Fail(GONE), times=99)
    with trio.move_on_after(0.25) as scope:
        await Retry(faults).list("")
    assert scope.cancelled_caught


# -- metrics


async def test_metrics_count(faults: Faults) -> None:
    metrics = Metrics(faults)
    faults.add("list", Fail(GONE))
    faults.add("stat", Gate())
    await metrics.write_file("f", b"12345")
    await metrics.read_file("f")
    with pytest.raises(Unreachable):
        await metrics.list("")
    with trio.move_on_after(2):
        await metrics.stat("f")
    counts = metrics.statistics()
    assert (counts["write_file"].calls, counts["write_file"].size) == (1, 5)
    assert counts["read_file"].size == 5
    assert counts["list"].failed == {"ECONNRESET": 1}
    assert counts["stat"].failed == {"ECANCELED": 1}
    assert counts["stat"].seconds == pytest.approx(2)
    assert all(count.running == 0 for count in counts.values())


async def test_metrics_count_the_bytes_of_every_verb(faults: Faults) -> None:
    metrics = Metrics(faults)
    async with metrics.batch() as batch:
        await batch.write("a", b"123")
        await batch.write("b", memoryview(b"4567"))
        await batch.commit()
    assert await metrics.rename_all([("a", "c"), ("none", "d")]) == (1,)
    async with metrics.edit("c") as file:
        await file.write_at(2, b"xyz")
        await file.truncate(1 << 30)
        await file.truncate(4)
        assert await file.read_into(1, memoryview(bytearray(10))) == 3
        await file.sync()
    await metrics.read_files(["c", "none", "b"])
    sizes = {verb: counts.size for verb, counts in metrics.statistics().items() if counts.size}
    assert sizes == {
        "batch.write": 7,
        "edit.write_at": 3,
        "edit.read_into": 3,
        "read_files": 8,
    }
    assert metrics.statistics()["rename_all"].calls == 1
