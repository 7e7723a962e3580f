"""What every remote does with what becomes durable together: edits, batches, many renames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Conflict, NotFound, ProxyError, Refused, Unreachable
from proxy.remotes.faults import Fail, Faults, Gate, Torn
from tests.remotes.conftest import is_flat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.remotes import Remote

GONE = Unreachable("the server went away", code="ECONNRESET")


async def names(remote: Remote, path: str = "") -> list[str]:
    return [entry.name for entry in await remote.list(path)]


async def write(remote: Remote, path: str, data: bytes) -> None:
    async with remote.batch() as batch:
        await batch.write(path, data)
        await batch.commit()


def is_editable(remote: Remote) -> bool:
    return not (remote.is_immutable or remote.is_encrypted or is_flat(remote))


async def write_at(remote: Remote, path: str, offset: int, data: bytes) -> None:
    async with remote.edit(path) as file:
        await file.write_at(offset, data)
        await file.sync()


# -- edit


async def test_an_edit_changes_what_it_says_and_nothing_else(remote: Remote) -> None:
    await remote.write_file("d/f", b"0123456789")
    if not is_editable(remote):
        with pytest.raises(Refused) as caught:
            await write_at(remote, "d/f", 0, b"x")
        code = "EPERM" if remote.is_immutable and not remote.is_encrypted else "ENOTSUP"
        assert caught.value.code == code
        assert await remote.read_file("d/f") == b"0123456789"
        return
    async with remote.edit("d/f") as file:
        assert file.size == 10
        await file.write_at(2, b"ab")
        await file.write_at(12, memoryview(b"cd"))
        assert file.size == 14
        buffer = memoryview(bytearray(20))
        assert await file.read_into(1, buffer) == 13
        assert bytes(buffer[:13]) == b"1ab456789\0\0cd"
        assert await file.read_into(14, buffer) == 0
        await file.truncate(5)
        await file.truncate(7)
        assert file.size == 7
        await file.write_at(7, b"")
        await file.sync()
    assert await remote.read_file("d/f") == b"01ab4\0\0"
    assert await names(remote, "d") == ["f"]


async def test_only_an_existing_regular_file_can_be_edited(remote: Remote) -> None:
    if not is_editable(remote):
        pytest.skip("nothing can")
    await remote.write_file("d/f", b"")
    for path, kind in (("none", NotFound), ("d/none", NotFound), ("d", Conflict), ("", Refused)):
        with pytest.raises(kind):
            await write_at(remote, path, 0, b"x")
    assert await names(remote) == ["d"]


async def test_a_large_edit_is_read_back(remote: Remote) -> None:
    if not is_editable(remote):
        pytest.skip("nothing can be edited")
    block = bytes(range(256)) * 2048
    await remote.write_file("f", b"head")
    await write_at(remote, "f", 1 << 20, block)
    assert await remote.read_file("f") == b"head".ljust(1 << 20, b"\0") + block


# -- batch


async def test_a_batch_makes_files_and_their_directories(remote: Remote) -> None:
    async with remote.batch() as batch:
        await batch.write("d/e/a", b"a")
        await batch.write("/d//e/./b", memoryview(bytearray(b"bb")))
        await batch.write("d/empty", b"")
        await batch.commit()
        await batch.write("d/later", b"later")
        await batch.commit()
    assert await remote.read_file("d/e/a") == b"a"
    assert await remote.read_file("d/e/b") == b"bb"
    assert await remote.read_file("d/empty") == b""
    assert await remote.read_file("d/later") == b"later"
    assert await names(remote, "d") == ["e", "empty", "later"]


async def test_a_batch_replaces_unless_files_cannot_be_replaced(remote: Remote) -> None:
    await remote.write_file("f", b"old and longer")
    if remote.is_immutable:
        with pytest.raises(Conflict) as caught:
            await write(remote, "f", b"new")
        assert caught.value.code == "EEXIST"
        assert await remote.read_file("f") == b"old and longer"
    else:
        await write(remote, "f", b"new")
        assert await remote.read_file("f") == b"new"


async def test_a_batch_does_not_replace_a_directory(remote: Remote, *, flat: bool) -> None:
    await remote.write_file("d/f", b"x")
    if flat:
        pytest.skip("a name can be both: looking would double the requests")
    with pytest.raises(Conflict):
        await write(remote, "d", b"")
    with pytest.raises(ProxyError):
        await write(remote, "", b"")
    with pytest.raises(NotFound) as caught:
        await write(remote, "d/f/below", b"")
    assert caught.value.code == "ENOTDIR"
    assert await remote.read_file("d/f") == b"x"


async def test_a_batch_writes_several_files_at_once(remote: Remote, *, flat: bool) -> None:
    contents = {
        f"d/{number % 7}/{number}": b"%d" % number * 1000 for number in range(60 if flat else 200)
    }
    async with remote.batch() as batch:
        left = iter(contents.items())

        async def work() -> None:
            for path, content in left:
                await batch.write(path, content)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(work)
        await batch.commit()
    for path, content in contents.items():
        assert await remote.read_file(path) == content


async def test_what_a_batch_wrote_stays_without_a_commit(remote: Remote) -> None:
    with pytest.raises(RuntimeError, match="body"):  # noqa: PT012 (the body is what fails)
        async with remote.batch() as batch:
            await batch.write("d/a", b"a")
            raise RuntimeError("body")
    await remote.rmtree("d")
    assert await names(remote) == []


async def test_paths_of_a_batch_stay_inside(remote: Remote) -> None:
    await write(remote, "../../x/f", b"inside")
    assert await remote.read_file("x/f") == b"inside"
    with pytest.raises(Refused):
        await write(remote, "a\0b", b"")


# -- rename_all


async def test_renames_replace_make_directories_and_tell_what_is_missing(
    remote: Remote, *, flat: bool
) -> None:
    for number in range(4):
        await remote.write_file(f"child/{number}", b"new %d" % number)
    await remote.write_file("parent/1", b"old 1")
    pairs = [
        ("child/0", "parent/0"),
        ("child/none", "nowhere/none"),
        ("child/1", "parent/1"),
        ("nowhere/x", "parent/2"),
        ("child/2", "deep/er/2"),
        ("/child/./3", "../parent/3"),
    ]
    if remote.is_immutable:
        with pytest.raises(Refused) as caught:
            await remote.rename_all(pairs)
        assert caught.value.code == "EPERM"
        assert await names(remote, "child") == ["0", "1", "2", "3"]
        return
    assert list(await remote.rename_all(pairs)) == [1, 3]
    assert await names(remote) == (["deep", "parent"] if flat else ["child", "deep", "parent"])
    if not flat:
        assert await names(remote, "child") == []
    assert await names(remote, "parent") == ["0", "1", "3"]
    assert await remote.read_file("parent/1") == b"new 1"
    assert await remote.read_file("parent/3") == b"new 3"
    assert await remote.read_file("deep/er/2") == b"new 2"
    assert list(await remote.rename_all(pairs)) == list(range(6))  # done already


async def test_nothing_is_renamed_when_there_is_nothing(remote: Remote) -> None:
    assert list(await remote.rename_all([])) == []


async def test_renames_are_done_in_order(remote: Remote, *, flat: bool) -> None:
    if remote.is_immutable:
        pytest.skip("nothing can be renamed")
    await remote.write_file("a", b"a")
    await remote.write_file("d/f", b"f")
    pairs = [
        ("a", "b"),
        ("b", "c"),
        ("b", "x"),
        ("d/f", "d/g"),
        ("d", "e"),
        ("d/g", "y"),
        ("e/g", "z"),
    ]
    assert list(await remote.rename_all(pairs)) == [2, 5]
    assert await names(remote) == (["c", "z"] if flat else ["c", "e", "z"])
    assert await remote.read_file("z") == b"f"


async def test_a_rename_that_cannot_be_ends_it(remote: Remote, *, flat: bool) -> None:
    if remote.is_immutable:
        pytest.skip("nothing can be renamed")
    for name in ("a", "b", "c"):
        await remote.write_file(name, name.encode())
    await remote.write_file("d/f", b"")
    bad_ones = (("d", Conflict), ("", Refused), ("b/x", NotFound))
    for bad, kind in bad_ones[1:2] if flat else bad_ones:
        await remote.write_file("a", b"a")
        with pytest.raises(kind):
            await remote.rename_all([("a", "done"), ("b", bad), ("c", "not")])
        assert await names(remote) == ["b", "c", "d", "done"]


async def test_hundreds_of_renames(remote: Remote, *, flat: bool) -> None:
    count = 60 if flat else 600  # of more directories than are held open
    if remote.is_immutable:
        pytest.skip("nothing can be renamed")
    async with remote.batch() as batch:
        left = iter(range(count))

        async def work() -> None:
            for number in left:
                await batch.write(f"c/{number // 6}/{number}", b"%d" % number)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(work)
    pairs = [(f"c/{number // 6}/{number}", f"p/{number // 7}/{number}") for number in range(count)]
    gaps = [7, count // 2, count - 1]
    for gap in gaps:
        await remote.unlink(pairs[gap][0])
    assert list(await remote.rename_all(pairs)) == gaps
    found = [path async for path, _ in remote.walk("p")]
    assert sorted(found) == sorted(new for n, (_, new) in enumerate(pairs) if n not in gaps)
    assert await remote.read_file(pairs[32][1]) == b"32"
    assert not any(path.startswith("c/") for path in [path async for path, _ in remote.walk("")])


# -- faults and cancels, around every remote

STEPS: dict[str, Callable[[Remote], Awaitable[object]]] = {
    "edit.write_at": lambda remote: write_at(remote, "f", 2, b"xyz"),
    "batch.write": lambda remote: write(remote, "b", b"xyz"),
    "rename_all": lambda remote: remote.rename_all([("f", "g"), ("none", "h")]),
}


def can(remote: Remote, verb: str) -> bool:
    if verb.startswith("edit"):
        return is_editable(remote)
    return verb.startswith("batch") or not remote.is_immutable


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("verb", STEPS)
async def test_an_error_before_the_effect_or_after_it(
    remote: Remote, verb: str, *, after: bool
) -> None:
    if not can(remote, verb):
        pytest.skip("cannot be")
    await remote.write_file("f", b"0123456789")
    faults = Faults(remote)
    faults.add(verb, Fail(GONE, after=after))
    with pytest.raises(Unreachable):
        await STEPS[verb](faults)
    assert faults.unused == []
    found = {name: await remote.read_file(name) for name in await names(remote)}
    done = {
        "edit.write_at": {"f": b"01xyz56789"},
        "batch.write": {"f": b"0123456789", "b": b"xyz"},
        "rename_all": {"g": b"0123456789"},
    }
    assert found == (done[verb] if after else {"f": b"0123456789"})


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("verb", [*STEPS, "edit.open", "edit.sync", "batch.open", "batch.commit"])
async def test_a_cancel_in_the_middle_ends_it(remote: Remote, verb: str, *, after: bool) -> None:
    if not can(remote, verb):
        pytest.skip("cannot be")
    step = {"edit": "edit.write_at", "batch": "batch.write"}.get(verb.partition(".")[0], verb)
    await remote.write_file("f", b"0123456789")
    faults = Faults(remote)
    gate = faults.add(verb, Gate(after=after))
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(STEPS[step], faults)
            await gate.reached.wait()
            nursery.cancel_scope.cancel()
    found = await names(remote)
    assert found in (["f"], ["b", "f"], ["g"])
    assert len(await remote.read_file(found[-1])) == 10
    if not remote.is_immutable:
        await STEPS[step](remote)  # nothing is left in the way


async def test_a_torn_write_is_torn(remote: Remote) -> None:
    faults = Faults(remote)
    faults.add("batch.write", Torn(2, GONE))
    with pytest.raises(Unreachable):
        await write(faults, "f", b"abcdef")
    assert await remote.read_file("f") == b"ab"
    if is_editable(remote):
        faults.add("edit.write_at", Torn(1, GONE))
        with pytest.raises(Unreachable):
            await write_at(faults, "f", 1, b"123")
        assert await remote.read_file("f") == b"a1"


async def test_the_disk_is_full_in_the_middle(remote: Remote) -> None:
    faults = Faults(remote)
    faults.fill_after(8)
    async with faults.batch() as batch:
        await batch.write("d/a", b"12345")
        with pytest.raises(Refused) as caught:
            await batch.write("d/b", b"67890")
        assert caught.value.code == "ENOSPC"
        await batch.commit()
    assert await remote.read_file("d/a") == b"12345"
    assert await remote.read_file("d/b") == b"678"
    if is_editable(remote):
        with pytest.raises(Refused, match="ENOSPC"):
            await write_at(faults, "d/a", 0, b"x")
        assert await remote.read_file("d/a") == b"12345"
    await remote.rmtree("d")
    assert await names(remote) == []
