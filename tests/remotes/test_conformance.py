"""What every remote does, whatever it is made of and wrapped in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Busy, Conflict, Corrupt, NotFound, ProxyError, Refused
from proxy.remotes import Entry, RemoteInfo
from proxy.remotes.objects.remote import ObjectRemote
from proxy.remotes.wrapper import innermost

if TYPE_CHECKING:
    from proxy.remotes import Remote


async def names(remote: Remote, path: str = "") -> list[str]:
    return [entry.name for entry in await remote.list(path)]


async def exists(remote: Remote, path: str) -> bool:
    try:
        await remote.stat(path)
    except NotFound:
        return False
    return True


async def test_a_file_reads_back_as_it_was_written(remote: Remote) -> None:
    await remote.write_file("/a/b/c.json", b"{}")
    assert await remote.read_file("a/b/c.json") == b"{}"
    assert (await remote.stat("a//b/./c.json")).size == 2
    assert await names(remote, "a/b") == ["c.json"]


async def test_an_empty_file_exists(remote: Remote) -> None:
    await remote.write_file("empty", b"")
    assert await remote.read_file("empty") == b""


async def test_write_replaces_unless_files_cannot_be_replaced(remote: Remote) -> None:
    await remote.write_file("f", b"old and longer")
    if remote.is_immutable:
        with pytest.raises(Conflict, match="EEXIST"):
            await remote.write_file("f", b"new")
        assert await remote.read_file("f") == b"old and longer"
    else:
        await remote.write_file("f", b"new")
        assert await remote.read_file("f") == b"new"
    assert await names(remote) == ["f"]


async def test_exclusive_write_of_an_existing_name_is_a_conflict(remote: Remote) -> None:
    await remote.write_file("f", b"1", exclusive=True)
    with pytest.raises(Conflict) as caught:
        await remote.write_file("f", b"2", exclusive=True)
    assert caught.value.code == "EEXIST"
    assert await remote.read_file("f") == b"1"
    assert await names(remote) == ["f"]


async def test_exclusive_writes_at_the_same_time_have_one_winner(remote: Remote) -> None:
    bottom = innermost(remote)
    if isinstance(bottom, ObjectRemote) and not (await bottom.capabilities())["conditionalPut"]:
        pytest.skip("only a store can decide between two, and this one does not")
    outcomes: list[bytes | str] = []

    async def write(content: bytes) -> None:
        try:
            await remote.write_file("f", content, exclusive=True)
            outcomes.append(content)
        except Conflict as error:
            outcomes.append(error.code)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(write, b"%d" % number)
    winners = [outcome for outcome in outcomes if outcome != "EEXIST"]
    assert winners == [await remote.read_file("f")]
    assert await names(remote) == ["f"]


async def test_what_is_missing_is_not_found(remote: Remote) -> None:
    for call in (
        remote.read_file("no/such"),
        remote.list("no"),
        remote.stat("no"),
        remote.unlink("no", missing_ok=False),
        remote.rmdir("no", missing_ok=False),
    ):
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.code == "ENOENT"
    with pytest.raises(NotFound):
        async with remote.open_read("no"):
            pass
    with pytest.raises(NotFound):
        _ = [path async for path in remote.walk("no")]


async def test_weakness_21_removing_what_is_missing_is_done_already(remote: Remote) -> None:
    """Upstream's rmtree fails with ENOENT on a missing directory."""
    await remote.unlink("no/such")
    await remote.rmdir("no/such")
    await remote.rmtree("no/such")


async def test_reading_more_than_the_limit_is_corrupt(remote: Remote) -> None:
    await remote.write_file("f", b"x" * 101)
    assert len(await remote.read_file("f", limit=101)) == 101
    with pytest.raises(Corrupt, match="100"):
        await remote.read_file("f", limit=100)


async def test_many_files_in_one_call_keep_their_order_and_their_errors(remote: Remote) -> None:
    for number in range(40):
        await remote.write_file(f"d/{number}", b"%d" % number)
    got = await remote.read_files([*(f"d/{number}" for number in range(40)), "d/none"])
    assert list(got[:40]) == [b"%d" % number for number in range(40)]
    assert isinstance(got[40], NotFound)


async def test_a_created_file_appears_with_its_commit(remote: Remote, *, flat: bool) -> None:
    async with remote.create("vm/20260101T000000Z.xva") as file:
        await file.write(b"head")
        await file.write(memoryview(bytearray(b"tail")))
        if flat:
            assert file.temporary_path == "vm/20260101T000000Z.xva"
            assert not await exists(remote, "vm")
        elif not remote.is_immutable:
            assert await names(remote, "vm") == [file.temporary_path.rpartition("/")[2]]
        if not flat and not remote.is_encrypted:  # where it lacks its tag until the commit
            async with remote.open_read(file.temporary_path) as written:
                assert await written.read_at(0, 100) == b"headtail"
        await file.commit()
        assert await names(remote, "vm") == ["20260101T000000Z.xva"]
    assert await remote.read_file("vm/20260101T000000Z.xva") == b"headtail"


async def test_a_temporary_file_is_taken_for_nothing_else(remote: Remote, *, flat: bool) -> None:
    """Upstream's `.<ms>.<name>.vhd` is taken for a disk by its own clean."""
    if remote.is_immutable or flat:
        pytest.skip("writes under the final name")
    for name in ("d/x.json", "d/x.vhd", "d/x.xva"):
        async with remote.create(name) as file:
            shown = file.temporary_path.rpartition("/")[2]
            assert shown.startswith(".")
            assert not shown.endswith((".json", ".vhd", ".xva"))


@pytest.mark.parametrize("commits", [False, True])
async def test_a_failed_body_leaves_no_byte(remote: Remote, *, commits: bool) -> None:
    with pytest.raises(RuntimeError, match="body"):  # noqa: PT012 (the body is what fails)
        async with remote.create("f") as file:
            await file.write(b"x")
            if commits:
                await file.commit()
            raise RuntimeError("body")
    assert await names(remote) == (["f"] if commits else [])


async def test_leaving_without_a_commit_leaves_no_byte(remote: Remote) -> None:
    async with remote.create("f") as file:
        await file.write(b"x")
    assert await names(remote) == []


async def test_a_cancelled_body_leaves_no_byte(remote: Remote) -> None:
    with trio.CancelScope() as scope:
        async with remote.create("f") as file:
            await file.write(b"x")
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert await names(remote) == []


async def test_an_exclusive_commit_does_not_replace(remote: Remote) -> None:
    if remote.is_immutable and not isinstance(innermost(remote), ObjectRemote):
        pytest.skip("the name is taken from the start")
    with pytest.raises(Conflict):  # noqa: PT012 (the commit is what fails)
        async with remote.create("f", exclusive=True) as file:
            await file.write(b"late")
            await remote.write_file("f", b"early")
            await file.commit()
    assert await remote.read_file("f") == b"early"
    assert await names(remote) == ["f"]


async def test_reading_in_pieces(remote: Remote) -> None:
    content = bytes(range(256)) * 16
    await remote.write_file("f", content)
    if remote.is_encrypted:
        await check_sequential(remote, content)
        return
    async with remote.open_read("f") as file:
        assert file.size == 4096
        buffer = memoryview(bytearray(4000))
        assert await file.read_into(buffer) == 4000
        assert buffer == content[:4000]
        assert await file.read_at(10, 5) == content[10:15]  # moves no position
        some = memoryview(bytearray(200))
        assert await file.read_into_at(20, some) == 200
        assert some == content[20:220]
        assert await file.read_into_at(4000, some) == 96
        assert some[:96] == content[4000:]
        assert await file.read_into_at(5000, some) == 0
        assert await file.read_into(buffer) == 96
        assert buffer[:96] == content[4000:]
        assert await file.read_into(buffer) == 0
        assert await file.read_at(4090, 100) == content[4090:]
        assert await file.read_at(5000, 1) == b""


async def check_sequential(remote: Remote, content: bytes) -> None:
    """Only a whole file can be authenticated."""
    async with remote.open_read("f") as file:
        assert file.size == 4096
        buffer = memoryview(bytearray(4000))
        assert await file.read_into(buffer[:1000]) == 1000
        for call in (file.read_at(10, 5), file.read_into_at(20, buffer)):
            with pytest.raises(Refused) as caught:
                await call
            assert caught.value.code == "ENOTSUP"
        assert await file.read_into(buffer[1000:]) == 3000
        assert buffer == content[:4000]
        assert await file.read_into(buffer) == 96
        assert buffer[:96] == content[4000:]
        assert await file.read_into(buffer) == 0


async def test_list_is_sorted_and_tells_directories(remote: Remote, *, flat: bool) -> None:
    await remote.mktree("d/b")
    if flat:
        assert not await exists(remote, "d")
        await remote.write_file("d/b/x", b"")
    await remote.write_file("d/c", b"")
    await remote.write_file("d/.a", b"")
    assert await remote.list("d") == [Entry(".a", False), Entry("b", True), Entry("c", False)]


async def test_walk_gives_every_file_once(remote: Remote) -> None:
    for path in ("w/a", "w/d/b", "w/d/e/c"):
        await remote.write_file(path, path.encode())
    found = {path: status.size async for path, status in remote.walk("/w")}
    assert found == {"w/a": 3, "w/d/b": 5, "w/d/e/c": 7}


async def test_rename_replaces_and_makes_directories(remote: Remote) -> None:
    await remote.write_file("a", b"a")
    await remote.write_file("b", b"b")
    if remote.is_immutable:
        with pytest.raises(Refused) as caught:
            await remote.rename("a", "b")
        assert caught.value.code == "EPERM"
        return
    await remote.rename("a", "b")
    await remote.rename("b", "new/deep/c")
    assert await remote.read_file("new/deep/c") == b"a"
    assert await names(remote) == ["new"]
    with pytest.raises(NotFound):
        await remote.rename("b", "other/d")
    assert await names(remote) == ["new"]


async def test_rmdir_takes_only_empty_directories(remote: Remote, *, flat: bool) -> None:
    await remote.write_file("d/f", b"")
    with pytest.raises(Conflict) as caught:
        await remote.rmdir("d")
    assert caught.value.code == "ENOTEMPTY"
    await remote.unlink("d/f")
    assert await exists(remote, "d") is not flat
    await remote.rmdir("d")
    assert await names(remote) == []


async def test_rmtree_takes_all_of_it_and_nothing_else(remote: Remote) -> None:
    for path in ("t/a", "t/b/c", "t/b/d/e", "t/.hidden", "tt"):
        await remote.write_file(path, b"x")
    await remote.rmtree("t")
    assert await names(remote) == ["tt"]
    with pytest.raises(Conflict):
        await remote.rmtree("tt")
    assert await names(remote) == ["tt"]


@pytest.mark.parametrize("path", ["", "/", ".", "..", "a/.."])
async def test_the_root_cannot_be_changed(remote: Remote, path: str) -> None:
    await remote.write_file("a/f", b"")
    for call in (
        remote.rmtree(path),
        remote.unlink(path),
        remote.rmdir(path),
        remote.rename(path, "elsewhere"),
        remote.write_file(path, b""),
    ):
        with pytest.raises(ProxyError):
            await call
    assert await names(remote) == ["a"]


async def test_weakness_20_paths_that_climb_stay_inside(remote: Remote) -> None:
    """Upstream normalises all but some: a copy below a prefix can be written outside of it."""
    await remote.write_file("../../../x/f", b"inside")
    assert await remote.read_file("x/f") == b"inside"
    if not remote.is_immutable:
        await remote.rename("../x/f", "../../y/g")
        assert [path async for path, _ in remote.walk("..")] == ["y/g"]
        assert await remote.rename_all([("../y/g", "/../f")]) == ()
        assert await remote.read_file("f") == b"inside"


async def test_a_nul_byte_is_refused(remote: Remote) -> None:
    with pytest.raises(Refused) as caught:
        await remote.write_file("a\0b", b"")
    assert caught.value.code == "EINVAL"


async def test_a_lock_excludes_and_names_its_holder(remote: Remote) -> None:
    """Two tasks of one daemon exclude each other too."""
    await remote.mktree("xo-vm-backups/vm")
    async with remote.lock("xo-vm-backups/vm", owner="run-1") as lock:
        await lock.check()
        with pytest.raises(Busy, match="Lock file is already being held by run-1") as caught:
            async with remote.lock("xo-vm-backups/vm", owner="run-2"):
                pytest.fail("held twice")
        assert caught.value.code == "ELOCKED"
        assert caught.value.data["holder"]["owner"] == "run-1"
    async with remote.lock("xo-vm-backups/vm", owner="run-3"):
        pass
    assert "vm.lock" not in [path async for path, _ in remote.walk("")]
    await remote.write_file("xo-vm-backups/vm/f", b"")
    assert await names(remote, "xo-vm-backups") == ["vm"]


async def test_a_closed_remote_refuses(remote: Remote) -> None:
    await remote.aclose()
    with pytest.raises(Refused, match="closed"):
        await remote.list("")


async def test_space_adds_up(remote: Remote, *, flat: bool) -> None:
    info = await remote.info()
    if flat:
        assert info == RemoteInfo()
        return
    assert info.size
    assert info.used is not None
    assert info.available is not None
    assert info.used + info.available <= info.size
