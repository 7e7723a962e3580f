"""Finding disks by name, and the ancestors of a disk by the names in its chain."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from proxy.disks import opening
from proxy.disks.disk import block_pool
from proxy.disks.opening import open_chain, open_disk
from proxy.disks.vhd_directory import VhdDirectory
from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused, Unreachable
from proxy.formats import vhd
from proxy.remotes.faults import Fail, Gate
from tests.disks.directories import (
    MIB,
    content,
    everything,
    identity,
    opened,
    place_alias,
    place_directory,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.remotes.faults import Faults

RECORDED = Path(__file__).parents[1] / "fixtures" / "disks" / "recorded-directories"
GONE = Unreachable("the server went away", code="ECONNRESET")


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Faults]:
    async with opened(tmp_path) as faults:
        yield faults


def place_file(
    path: Path, blocks: Mapping[int, bytes], number: int, parent: tuple[str, int] | None = None
) -> None:
    """A VHD file of 8 MiB laid out as the specification says."""
    disk_type = vhd.DiskType.DYNAMIC if parent is None else vhd.DiskType.DIFFERENCING
    footer = vhd.Footer.make(8 * MIB, disk_type, identity(number), timestamp=1).pack()
    name, parent_number = parent or ("", 0)
    header = vhd.Header(
        max_entries=4,
        parent_name=name,
        parent_uuid=identity(parent_number) if parent else vhd.NO_UUID,
    ).pack()
    table = bytearray(b"\xff" * 512)
    stored = b""
    for place, (index, data) in enumerate(blocks.items()):
        table[4 * index : 4 * index + 4] = (4 + 4097 * place).to_bytes(4, "big")
        stored += vhd.FULL_BITMAP + data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(footer + header + table + stored + footer)


def place_disk(
    root: Path,
    number: int,
    blocks: Mapping[int, bytes],
    parent: int | None = None,
    *,
    size: int = 8 * MIB,
    parent_name: str | None = None,
) -> str:
    """Directory ``number`` behind its alias, made from disk ``parent``; the alias's path."""
    link = None
    if parent is not None:
        link = (parent_name or f"{parent}.alias.vhd", identity(parent))
    data = root / "vdi" / "data" / f"{number}.vhd"
    place_directory(data, blocks, uuid=identity(number), parent=link, size=size)
    place_alias(root / "vdi" / f"{number}.alias.vhd", f"data/{number}.vhd")
    return f"vdi/{number}.alias.vhd"


# -- one disk


async def test_a_directory_by_its_alias_and_by_its_own_name(remote: Faults, tmp_path: Path) -> None:
    place_disk(tmp_path, 1, {2: content(1)})
    for path in ("vdi/1.alias.vhd", "/vdi/1.alias.vhd", "vdi/data/1.vhd"):
        async with open_disk(remote, path) as disk:
            assert isinstance(disk, VhdDirectory)
            assert await everything(disk, block_pool(2)) == {2: content(1)}


async def test_a_file_by_its_alias_and_by_its_own_name(remote: Faults, tmp_path: Path) -> None:
    place_file(tmp_path / "vdi/data/1.vhd", {2: content(1)}, 1)
    place_alias(tmp_path / "vdi/1.alias.vhd", "data/1.vhd")
    for path in ("vdi/1.alias.vhd", "vdi/data/1.vhd"):
        async with open_disk(remote, path) as disk:
            assert disk.uuid == identity(1)
            assert await everything(disk, block_pool(2)) == {2: content(1)}


@pytest.mark.parametrize("path", ["vdi/1.vhd", "vdi/1.alias.vhd", "nowhere/1.vhd"])
async def test_nothing_of_that_name(remote: Faults, tmp_path: Path, path: str) -> None:
    (tmp_path / "vdi").mkdir()
    with pytest.raises(NotFound, match=path):
        async with open_disk(remote, path):
            pass


@pytest.mark.parametrize("empty", [False, True])
async def test_an_alias_of_nothing_names_both(
    remote: Faults, tmp_path: Path, *, empty: bool
) -> None:
    place_alias(tmp_path / "vdi/1.alias.vhd", "data/1.vhd")
    if empty:
        (tmp_path / "vdi/data/1.vhd").mkdir(parents=True)
    with pytest.raises(NotFound, match=r"vdi/data/1\.vhd'.*vdi/1\.alias"):
        async with open_disk(remote, "vdi/1.alias.vhd"):
            pass


async def test_an_alias_that_is_a_directory(remote: Faults, tmp_path: Path) -> None:
    (tmp_path / "1.alias.vhd").mkdir()
    with pytest.raises(Conflict):
        async with open_disk(remote, "1.alias.vhd"):
            pass


async def test_an_encrypted_remote_has_directories_only(remote: Faults, tmp_path: Path) -> None:
    remote.is_encrypted = True
    place_disk(tmp_path, 1, {2: content(1)})
    for path in ("vdi/1.alias.vhd", "vdi/data/1.vhd"):
        async with open_disk(remote, path) as disk:
            assert isinstance(disk, VhdDirectory)
    place_file(tmp_path / "vdi/data/2.vhd", {}, 2)
    place_alias(tmp_path / "vdi/2.alias.vhd", "data/2.vhd")
    for path in ("vdi/2.alias.vhd", "vdi/data/2.vhd"):
        with pytest.raises(Refused, match="encrypted") as caught:
            async with open_disk(remote, path):
                pass
        assert caught.value.code == "ENOTSUP"
    assert not [verb for verb, _ in remote.seen if verb == "read.open"]
    with pytest.raises(NotFound):
        async with open_disk(remote, "vdi/3.vhd"):
            pass


# -- chains


async def test_the_chain_that_xen_orchestra_wrote(remote: Faults, tmp_path: Path) -> None:
    shutil.copytree(RECORDED, tmp_path / "vdi")
    async with open_chain(remote, "/vdi/20261124T015618Z.alias.vhd") as chain:
        assert [disk.virtual_size for disk in chain.disks] == [8 * MIB] * 3
        assert [list(disk.blocks) for disk in chain.disks] == [[0, 2], [3], [1]]
        assert list(chain.blocks) == [0, 1, 2, 3]
        assert not chain.is_differencing
    async with open_chain(
        remote, "vdi/20261124T015618Z.alias.vhd", until="/vdi/20261124T015614Z.alias.vhd"
    ) as chain:
        assert list(chain.blocks) == [1, 3]
        assert chain.is_differencing


async def test_a_chain_reads_what_each_disk_changed(remote: Faults, tmp_path: Path) -> None:
    place_disk(tmp_path, 1, {0: content(1), 1: content(2), 2: content(3)}, size=6 * MIB)
    place_disk(tmp_path, 2, {1: content(4)}, 1, size=6 * MIB)
    path = place_disk(tmp_path, 3, {2: content(5), 3: content(6)}, 2)
    async with open_chain(remote, path) as chain:
        assert chain.virtual_size == 8 * MIB
        found = await everything(chain, block_pool(4))
    assert found == {0: content(1), 1: content(4), 2: content(5), 3: content(6)}


async def test_files_and_directories_in_one_chain(remote: Faults, tmp_path: Path) -> None:
    place_file(tmp_path / "vdi/1.vhd", {0: content(1), 1: content(2)}, 1)
    place_disk(tmp_path, 2, {1: content(3)}, 1, parent_name="1.vhd")
    place_file(tmp_path / "vdi/3.vhd", {2: content(4)}, 3, ("2.alias.vhd", 2))
    async with open_chain(remote, "vdi/3.vhd") as chain:
        found = await everything(chain, block_pool(4))
    assert found == {0: content(1), 1: content(3), 2: content(4)}


async def test_one_full_disk_is_a_chain(remote: Faults, tmp_path: Path) -> None:
    path = place_disk(tmp_path, 1, {0: content(1)})
    async with open_chain(remote, path) as chain:
        assert len(chain.disks) == 1


async def test_a_parent_that_is_missing_names_both(remote: Faults, tmp_path: Path) -> None:
    path = place_disk(tmp_path, 2, {}, 1)
    with pytest.raises(NotFound, match=r"vdi/1\.alias\.vhd'.*vdi/2\.alias\.vhd") as caught:
        async with open_chain(remote, path):
            pass
    assert caught.value.data == {"path": "vdi/1.alias.vhd", "child": path}


async def test_a_parent_that_is_another_disk(remote: Faults, tmp_path: Path) -> None:
    place_disk(tmp_path, 9, {})
    path = place_disk(tmp_path, 2, {}, 1, parent_name="9.alias.vhd")
    with pytest.raises(Corrupt, match=str(identity(9))) as caught:
        async with open_chain(remote, path):
            pass
    assert caught.value.data["what"] == "parent uuid"


@pytest.mark.parametrize("name", ["../1.alias.vhd", "/1.alias.vhd", ".", "..", "x/../..", "x/.."])
async def test_a_parent_outside_of_the_folder(remote: Faults, tmp_path: Path, name: str) -> None:
    place_alias(tmp_path / "1.alias.vhd", "data/1.vhd")
    path = place_disk(tmp_path, 2, {}, 1, parent_name=name)
    with pytest.raises(Corrupt, match="not in its folder"):
        async with open_chain(remote, path):
            pass


async def test_a_differencing_disk_that_names_no_parent(remote: Faults, tmp_path: Path) -> None:
    data = tmp_path / "vdi/data/2.vhd"
    place_directory(data, {}, uuid=identity(2), parent=("", identity(1)))
    with pytest.raises(Corrupt, match="not in its folder"):
        async with open_chain(remote, "vdi/data/2.vhd"):
            pass


@pytest.mark.parametrize("length", [1, 2, 3])
async def test_a_chain_that_bites_its_tail(remote: Faults, tmp_path: Path, length: int) -> None:
    for number in range(length):
        place_disk(tmp_path, number, {}, (number + 1) % length)
    with pytest.raises(Corrupt, match="does not end"):
        async with open_chain(remote, "vdi/0.alias.vhd"):
            pass


async def test_a_chain_of_more_disks_than_is_allowed(
    remote: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "LONGEST_CHAIN", 3)
    place_disk(tmp_path, 1, {})
    paths = [place_disk(tmp_path, number, {}, number - 1) for number in (2, 3, 4)]
    async with open_chain(remote, paths[1]) as chain:
        assert len(chain.disks) == 3
    with pytest.raises(Corrupt, match="more than 3 disks"):
        async with open_chain(remote, paths[2]):
            pass


async def test_until_is_not_opened_and_must_be_met(remote: Faults, tmp_path: Path) -> None:
    place_disk(tmp_path, 1, {})
    place_disk(tmp_path, 2, {}, 1)
    path = place_disk(tmp_path, 3, {}, 2)
    shutil.rmtree(tmp_path / "vdi/data/1.vhd")
    (tmp_path / "vdi/1.alias.vhd").unlink()
    async with open_chain(remote, path, until="vdi/1.alias.vhd") as chain:
        assert len(chain.disks) == 2
    place_disk(tmp_path, 1, {})
    with pytest.raises(NotFound, match="no ancestor"):
        async with open_chain(remote, path, until="vdi/0.alias.vhd"):
            pass
    with pytest.raises(ValueError, match="before its first"):
        async with open_chain(remote, path, until=f"/{path}"):
            pass


@pytest.mark.parametrize("verb", ["read_files", "read_file"])
async def test_what_cannot_be_read_now_is_not_called_missing(
    remote: Faults, tmp_path: Path, verb: str
) -> None:
    place_disk(tmp_path, 1, {})
    path = place_disk(tmp_path, 2, {}, 1)
    for skip in (0, 1):
        remote.add(verb, Fail(GONE), skip=skip)
        with pytest.raises(Unreachable, match="went away"):
            async with open_chain(remote, path):
                pass
    assert remote.unused == []


async def test_the_first_of_many_corrupt_tables_is_told(remote: Faults, tmp_path: Path) -> None:
    place_disk(tmp_path, 1, {})
    path = place_disk(tmp_path, 2, {}, 1)
    for number in (1, 2):
        (tmp_path / f"vdi/data/{number}.vhd/bat").write_bytes(b"")
    with pytest.raises(Corrupt, match=r"data/2\.vhd/bat"):
        async with open_chain(remote, path):
            pass


async def test_tables_are_read_at_once(remote: Faults, tmp_path: Path) -> None:
    place_disk(tmp_path, 1, {})
    path = place_disk(tmp_path, 2, {}, 1)
    gates = [remote.add("read_file", Gate(), path=f"*/{number}.vhd/bat") for number in (1, 2)]
    async with trio.open_nursery() as nursery:

        async def open_it() -> None:
            async with open_chain(remote, path) as chain:
                assert len(chain.disks) == 2

        nursery.start_soon(open_it)
        for gate in gates:
            await gate.reached.wait()
        for gate in gates:
            gate.release.set()


async def test_a_cancel_while_opening(remote: Faults, tmp_path: Path) -> None:
    place_file(tmp_path / "vdi/1.vhd", {}, 1)
    place_disk(tmp_path, 2, {}, 1, parent_name="1.vhd")
    gate = remote.add("read_file", Gate(), path="*/bat")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def open_it() -> None:
                async with open_chain(remote, "vdi/2.alias.vhd"):
                    pass

            nursery.start_soon(open_it)
            await gate.reached.wait()
            scope.cancel()
    assert scope.cancelled_caught


async def test_no_error_leaves_a_group(remote: Faults, tmp_path: Path) -> None:
    path = place_disk(tmp_path, 1, {})
    (tmp_path / "vdi/data/1.vhd/bat").unlink()
    with pytest.raises(ProxyError):
        async with open_disk(remote, path):
            pass
