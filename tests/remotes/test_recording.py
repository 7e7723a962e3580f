from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Conflict, NotFound, ProxyError, Refused
from proxy.remotes.faults import Fail, Faults, Gate, Torn
from proxy.remotes.recording import Recording, crash_states, replay
from proxy.runtime.threads import inline_threads
from tests.remotes.conftest import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.virtual_clock

FULL = Refused("no space left", code="ENOSPC")


@pytest.fixture
async def recording(root: Path) -> AsyncIterator[Recording]:
    with inline_threads():
        async with opened(f"file://{root}") as remote:
            yield Recording(remote)


def content(directory: Path) -> dict[str, bytes | None]:
    """Every file's bytes, ``None`` for a directory; without locks and their records."""
    return {
        path.relative_to(directory).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
        if ".lock" not in path.name
    }


class States:
    """The states of a recording by what is lost, each with the count of changes before it."""

    def __init__(self, recording: Recording, place: Path, start: Path | None = None) -> None:
        self.all: list[tuple[int, str, dict[str, bytes | None]]] = []
        for label, apply in crash_states(recording.changes, start=start):
            apply(place)
            when, _, what = label.partition(": ")
            self.all.append((int(when.split()[1]), what, content(place)))

    def at(self, count: int) -> dict[str, dict[str, bytes | None]]:
        return {what: shown for number, what, shown in self.all if number == count}

    def any(self, shown: dict[str, bytes | None]) -> bool:
        return any(state == shown for _, _, state in self.all)


# -- what is recorded


class Doer:
    """Does something at random, with all verbs that change, on few names."""

    NAMES = ("a", "b", "d/a", "d/b", "d/e/a", "e/a")

    def __init__(self, remote: Recording, seed: int) -> None:
        self.remote = remote
        self.random = random.Random(seed)

    def name(self) -> str:
        return self.random.choice(self.NAMES)

    def data(self) -> bytes:
        return self.random.randbytes(self.random.choice((0, 1, 100, 70_000, 200_000)))

    async def step(self) -> None:
        verb = self.random.choice(
            ("write", "create", "edit", "batch", "rename", "rename_all", "remove", "mktree")
        )
        # a name that was a directory, or was not there
        with contextlib.suppress(Conflict, NotFound):
            await getattr(self, verb)()

    async def write(self) -> None:
        await self.remote.write_file(self.name(), self.data())

    async def create(self) -> None:
        async with self.remote.create(self.name()) as file:
            for _ in range(self.random.randrange(3)):
                await file.write(self.data())
            if self.random.random() < 0.7:
                await file.commit()

    async def edit(self) -> None:
        async with self.remote.edit(self.name()) as file:
            for _ in range(3):
                await file.write_at(self.random.randrange(file.size + 70_000), self.data())
                if self.random.random() < 0.3:
                    await file.truncate(self.random.randrange(file.size + 70_000))
                if self.random.random() < 0.3:
                    await file.sync()

    async def batch(self) -> None:
        async with self.remote.batch() as batch:
            for _ in range(3):
                await batch.write(self.name(), self.data())
            if self.random.random() < 0.7:
                await batch.commit()

    async def rename(self) -> None:
        await self.remote.rename(self.name(), self.name())

    async def rename_all(self) -> None:
        names = self.random.sample(self.NAMES, 6)
        await self.remote.rename_all(list(zip(names[:3], names[3:], strict=True)))

    async def remove(self) -> None:
        verb = self.random.choice(("unlink", "rmdir", "rmtree"))
        await getattr(self.remote, verb)(self.random.choice((*self.NAMES, "d", "d/e", "e")))

    async def mktree(self) -> None:
        await self.remote.mktree(self.random.choice(("d/f/g", "d/a", "e")))


@pytest.mark.parametrize("seed", range(8))
async def test_with_nothing_lost_it_is_the_real_directory(
    recording: Recording, root: Path, tmp_path: Path, seed: int
) -> None:
    doer = Doer(recording, seed)
    real: dict[int, dict[str, bytes | None]] = {}
    for _ in range(60):
        await doer.step()
        real[len(recording.changes)] = content(root)
    states = States(recording, tmp_path / "crash")
    seen: dict[str, bytes | None] = {}
    for count in range(len(recording.changes) + 1):
        seen = states.at(count).get("nothing lost", seen if count else {})
        # a state that was there before is not given again: build those by themselves
        if count in real and seen != real[count]:
            replay(recording.changes[:count], tmp_path / str(count))
            assert content(tmp_path / str(count)) == real[count]
    assert len(states.all) > len(recording.changes)


async def test_every_step_of_a_backup_is_a_state(recording: Recording, tmp_path: Path) -> None:
    async with recording.lock("vm", owner="run"):
        async with recording.create("vm/a.xva") as file:
            await file.write(b"12")
            await file.write(b"34")
            await file.commit()
        with pytest.raises(ProxyError):  # noqa: PT012 (the block is what ends)
            async with recording.create("vm/b.xva") as file:
                await file.write(b"x")
                raise FULL
        await recording.write_file("vm/a.json", b"{}")
        await recording.rename("vm/a.json", "vm/c.json")
        await recording.unlink("vm/none")
    await recording.rmtree("vm")
    kinds = [change.kind for change in recording.changes]
    assert kinds == [
        *("mkdir", "append", "append", "append", "sync", "rename"),
        *("append", "append", "unlink", "put", "rename", "rmdir", "unlink", "unlink", "rmdir"),
    ]
    states = States(recording, tmp_path / "crash")
    assert states.any({"vm": None, "vm/a.xva": b"1234", "vm/a.json": b"{}"})
    assert not any(shown.get("vm/a.xva", b"1234") != b"1234" for _, _, shown in states.all), (
        "the final name never shows less than the whole"
    )


async def test_what_a_fault_let_happen_is_recorded(recording: Recording, tmp_path: Path) -> None:
    """Faults go around the recording."""
    faults = Faults(recording)
    faults.add("write_file", Fail(FULL, after=True))
    with pytest.raises(Refused):
        await faults.write_file("a", b"whole")
    faults.add("batch.write", Torn(3, FULL))
    async with faults.batch() as batch:
        with pytest.raises(Refused):
            await batch.write("b", b"torn!")
    replay(recording.changes, tmp_path / "crash")
    assert content(tmp_path / "crash") == {"a": b"whole", "b": b"tor"}


async def test_renames_that_failed_half_way_are_recorded(
    recording: Recording, root: Path, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        await recording.write_file(name, name.encode())
    await recording.mktree("d")
    with pytest.raises(Conflict):
        await recording.rename_all([("a", "x/a"), ("no", "x/no"), ("b", "d"), ("c", "x/c")])
    assert content(root) == {"x": None, "x/a": b"a", "b": b"b", "c": b"c", "d": None}
    replay(recording.changes, tmp_path / "crash")
    assert content(tmp_path / "crash") == content(root)


async def test_equal_contents_are_kept_once(recording: Recording) -> None:
    for name in ("a", "b"):
        await recording.write_file(name, bytes(bytearray(1000)))
    first, second = recording.changes
    assert first.data is second.data


# -- what a crash leaves of it


async def test_an_edit_is_lost_torn_or_late_until_it_is_synced(
    recording: Recording, tmp_path: Path
) -> None:
    await recording.write_file("f", b"0123456789")
    async with recording.edit("f") as file:
        await file.write_at(0, b"abcd")
        await file.write_at(8, b"WXYZ")
        await file.sync()
        await file.truncate(2)
    states = States(recording, tmp_path / "crash")
    assert states.at(2) == {
        "nothing lost": {"f": b"abcd456789"},
        "last write torn at 1 of 4": {"f": b"a123456789"},
        "last write torn at 2 of 4": {"f": b"ab23456789"},
    }  # lost, and torn at 0, are as after change 1
    assert states.at(3) == {
        "nothing lost": {"f": b"abcd4567WXYZ"},
        "last write torn at 1 of 4": {"f": b"abcd4567W9"},
        "last write torn at 2 of 4": {"f": b"abcd4567WX"},
        "unsynced lost but the last change": {"f": b"01234567WXYZ"},
    }
    assert states.at(4) == {}  # the same bytes, and nothing else can be
    assert states.at(5) == {"nothing lost": {"f": b"ab"}}
    for lost, left in ((True, b"abcd4567WXYZ"), (False, b"ab")):
        replay(recording.changes, tmp_path / str(lost), lose_unsynced=lost)
        assert content(tmp_path / str(lost)) == {"f": left}


async def test_a_batch_is_missing_empty_torn_or_late_until_its_commit(
    recording: Recording, tmp_path: Path
) -> None:
    async with recording.batch() as batch:
        await batch.write("d/a", b"aaaa")
        await batch.write("d/b", b"bb")
        await batch.commit()
        await batch.write("d/c", b"cc")
    states = States(recording, tmp_path / "crash")
    a, b = {"d": None, "d/a": b"aaaa"}, {"d/b": b"bb"}
    assert states.at(0) == {"nothing lost": {}}
    assert states.at(2) == {
        "nothing lost": {**a, **b},
        "unsynced lost, names kept": {"d": None, "d/a": b"", "d/b": b""},
        "last write torn at 0 of 2": {**a, "d/b": b""},
        "last write torn at 1 of 2": {**a, "d/b": b"b"},
        "unsynced lost but the last change": {"d": None, **b},
    }
    assert states.at(3) == {}
    assert "unsynced lost" not in states.at(4)  # the committed ones alone, as before
    replay(recording.changes, tmp_path / "lost", lose_unsynced=True, keep_names=False)
    assert content(tmp_path / "lost") == {**a, **b}


async def test_renames_happen_one_by_one_and_are_lost_until_the_end(
    recording: Recording, tmp_path: Path
) -> None:
    await recording.write_file("c/1", b"new1")
    await recording.write_file("c/2", b"new2")
    await recording.write_file("p/1", b"old1")
    start = tmp_path / "start"
    replay(recording.changes, start)
    recording.changes.clear()
    assert await recording.rename_all([("c/1", "p/1"), ("c/3", "p/3"), ("c/2", "p/2")]) == (1,)
    states = States(recording, tmp_path / "crash", start=start)
    dirs: dict[str, bytes | None] = {"c": None, "p": None}
    before = {**dirs, "c/1": b"new1", "c/2": b"new2", "p/1": b"old1"}
    one = {**dirs, "c/2": b"new2", "p/1": b"new1"}
    both = {**dirs, "p/1": b"new1", "p/2": b"new2"}
    other = {**dirs, "c/1": b"new1", "p/1": b"old1", "p/2": b"new2"}
    assert [(what, shown) for _, what, shown in states.all] == [
        ("nothing lost", before),
        ("nothing lost", one),
        ("nothing lost", both),
        ("unsynced lost but the last change", other),
    ]


@pytest.mark.parametrize("in_order", [True, False])
async def test_it_finds_metadata_that_is_written_too_early(
    recording: Recording, tmp_path: Path, *, in_order: bool
) -> None:
    async with recording.batch() as batch:
        await batch.write("d/block", b"data")
        if in_order:
            await batch.commit()
        await recording.write_file("a.json", b"{}")
        await batch.commit()
    broken = [
        what
        for _, what, shown in States(recording, tmp_path / "crash").all
        if "a.json" in shown and shown.get("d/block") != b"data"
    ]
    assert bool(broken) is not in_order


async def test_a_file_renamed_before_it_is_synced_may_be_empty(
    recording: Recording, tmp_path: Path
) -> None:
    async with recording.batch() as batch:
        await batch.write("a", b"data")
        await recording.rename("a", "b")
    replay(recording.changes, tmp_path / "crash", lose_unsynced=True, keep_names=False)
    assert content(tmp_path / "crash") == {"b": b""}


async def test_a_directory_moves_with_what_is_in_it(recording: Recording, tmp_path: Path) -> None:
    await recording.write_file("d/e/f", b"x")
    await recording.rename("d", "new/d")
    replay(recording.changes, tmp_path / "crash", lose_unsynced=True)
    assert content(tmp_path / "crash") == {
        "new": None,
        "new/d": None,
        "new/d/e": None,
        "new/d/e/f": b"x",
    }


async def test_what_was_done_in_a_state_is_undone_by_the_next(
    recording: Recording, tmp_path: Path
) -> None:
    big = bytes(range(256)) * 1024
    await recording.write_file("d/a", big)
    await recording.write_file("d/b", big)
    await recording.write_file("d/c", b"c")
    await recording.write_file("last", b"")
    place = tmp_path / "crash"
    a = place / "d/a"
    for label, apply in crash_states(recording.changes):
        apply(place)
        shown = content(place)
        if "after 3 " in label:
            with a.open("r+b") as file:
                file.write(b"!")
            (place / "d/c").rename(place / "d/b")
            (place / "new/deep").mkdir(parents=True)
            (place / "new/deep/f").write_bytes(b"x")
        elif "after 4 " in label:
            assert shown == {"d": None, "d/a": big, "d/b": big, "d/c": b"c", "last": b""}
            return
    pytest.fail("no such state")


async def test_only_what_differs_is_written(recording: Recording, tmp_path: Path) -> None:
    await recording.write_file("f", bytes(1 << 20))
    async with recording.edit("f") as file:
        await file.write_at(500_000, b"x")
    place = tmp_path / "crash"
    inodes: set[int] = set()
    for _, apply in crash_states(recording.changes):
        apply(place)
        if (place / "f").exists():
            inodes.add((place / "f").stat().st_ino)
    assert len(inodes) == 1
    assert (place / "f").stat().st_blocks * 512 <= 65536 * 2  # zeros stay holes


async def test_a_cancelled_rename_all_is_recorded(recording: Recording, root: Path) -> None:
    """The renames happened; it is the answer that was lost."""
    await recording.write_file("a", b"a")
    faults = Faults(recording.inner)
    around = Recording(faults)
    gate = faults.add("rename_all", Gate(after=True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(around.rename_all, [("a", "b"), ("c", "d")])
        await gate.reached.wait()
        nursery.cancel_scope.cancel()
    assert content(root) == {"b": b"a"}
    assert [(change.path, change.target) for change in around.changes] == [
        ("a", "b"),
        ("c", "d"),  # was missing before: nothing happens to an image
    ]
