"""Backups that the storage protects, with files that really cannot be changed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from proxy.errors import Many, NotFound, Refused, Unreachable
from proxy.remotes.faults import Fail, Faults
from proxy.remotes.wrapper import Wrapper, protected_of
from proxy.repository import clean_vm, delete_backups, list_all, list_vm_backups, lock_vm
from proxy.repository.immutability import is_declared, is_protection, with_protection
from tests.protection import protection
from tests.repository.conftest import NOON, VM, open_local, write_full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from proxy.remotes.interface import Remote

    Protect = Callable[..., None]

FIRST, SECOND = "20261124T015901Z", "20261124T015902Z"
ID = f"/xo-vm-backups/{VM}/{FIRST}.json"


@pytest.fixture
def protect(tmp_path: Path) -> Iterator[Protect]:
    with protection(tmp_path) as switch:
        yield switch


@pytest.fixture
async def folder(remote: Remote, vm_dir: Path) -> Path:
    """Two full backups."""
    for number in range(2):
        await write_full(remote, NOON + number * 1000)
    return vm_dir


def unit(folder: Path, date: str) -> list[Path]:
    """The files of one backup, which are protected together."""
    return sorted(folder.glob(f"{date}.*"))


def declare(root: Path) -> None:
    value = {"since": 1, "immutable": True, "duration": 86_400_000}
    (root / "immutability.json").write_text(json.dumps(value))


async def shown(remote: Remote) -> dict[str, bool | None]:
    by_vm = await with_protection(remote, await list_all(remote))
    return {backup.id[-21:-5]: backup.is_immutable for backup in by_vm[VM]}


async def test_weakness_22_a_listing_tells_what_is_protected_now(
    remote: Remote, root: Path, folder: Path, protect: Protect
) -> None:
    """Upstream's probe opens for reading, by a misspelt option: it never finds any."""
    declare(root)
    protect(*unit(folder, FIRST))
    assert await shown(remote) == {FIRST: True, SECOND: False}
    protect(*unit(folder, FIRST), on=False)
    assert await shown(remote) == {FIRST: False, SECOND: False}


async def test_an_option_alone_protects_nothing(root: Path, folder: Path, protect: Protect) -> None:
    remote = await open_local(root, is_immutable=True)
    try:
        protect(*unit(folder, SECOND))
        assert await is_declared(remote)
        assert await shown(remote) == {FIRST: False, SECOND: True}
    finally:
        await remote.aclose()


async def test_nothing_is_tried_where_nobody_declares_protection(
    remote: Remote, folder: Path
) -> None:
    faults = Faults(remote)
    assert not any((await shown(faults)).values())
    assert "protected" not in {verb for verb, _ in faults.seen}


async def test_trying_changes_nothing(remote: Remote, folder: Path) -> None:
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in unit(folder, FIRST)]
    assert await protected_of(Wrapper(remote), [ID, "/missing", "/"]) == (False, False, False)
    assert [(p.stat().st_mtime_ns, p.read_bytes()) for p in unit(folder, FIRST)] == before


async def test_a_protected_backup_is_refused_and_stays_whole_and_listed(
    remote: Remote, folder: Path, protect: Protect
) -> None:
    before = unit(folder, FIRST)
    protect(*before)
    with pytest.raises(Refused, match="stays as it is until that ends") as caught:
        await delete_backups(remote, [ID])
    assert (caught.value.code, caught.value.data["id"]) == ("EPERM", ID)
    assert is_protection(caught.value)
    assert unit(folder, FIRST) == before
    assert next(backup.id for backup in await list_vm_backups(remote, VM)) == ID
    protect(*before, on=False)
    await delete_backups(remote, [ID])
    assert unit(folder, FIRST) == []


async def test_others_go_all_the_same(remote: Remote, folder: Path, protect: Protect) -> None:
    protect(*unit(folder, FIRST))
    with pytest.raises(Refused):
        await delete_backups(remote, [ID, ID.replace(FIRST, SECOND)])
    assert [backup.id for backup in await list_vm_backups(remote, VM)] == [ID]


async def test_half_protected_is_never_half_listed(
    remote: Remote, folder: Path, protect: Protect
) -> None:
    """Metadata goes first; the data waits for the clean after the protection's end."""
    data = folder / f"{FIRST}.xva"
    protect(data)
    with pytest.raises(Refused, match="no backup any more; a clean removes its data"):
        await delete_backups(remote, [ID])
    assert [backup.id for backup in await list_vm_backups(remote, VM)] != [ID]
    warnings: list[str] = []

    async def clean() -> None:
        async with lock_vm(remote, VM, owner="test") as lock:
            await clean_vm(
                remote, VM, lock=lock, warn=lambda text, _: warnings.append(text), min_age=0
            )

    await clean()
    assert data.exists()
    assert warnings == [f"Issue removing {FIRST}.xva"]
    protect(data, on=False)
    await clean()
    assert unit(folder, FIRST) == []
    assert len(unit(folder, SECOND)) == 3


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Refused("x", code="EPERM"), True),
        (Refused("x", code="EROFS"), False),
        (NotFound("x"), False),
        (Many("x", [Refused("x", code="EPERM")] * 2), True),
        (Many("x", [Refused("x", code="EPERM"), Refused("x", code="ENOSPC")]), False),
        (Many("x", []), False),
    ],
)
def test_only_a_protection_is_one(error: Exception, *, expected: bool) -> None:
    assert is_protection(error) is expected


async def test_in_doubt_protection_is_looked_for(remote: Remote) -> None:
    faults = Faults(remote)
    faults.add("stat", Fail(Unreachable("gone")))
    assert await is_declared(faults)
    assert not await is_declared(faults)


async def test_a_remote_that_cannot_tell_promises_nothing(remote: Remote) -> None:
    class Store:
        pass

    store: Any = Store()
    assert await protected_of(store, ["a", "b"]) == [False, False]
