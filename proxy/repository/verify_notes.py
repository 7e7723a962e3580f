"""Keeping the notes of damage in step with what a verify sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.disks.merge_state import is_disk_name
from proxy.errors import ProxyError
from proxy.remotes import paths
from proxy.repository.damage import Damage
from proxy.repository.paths import vm_directory
from proxy.repository.verify_chains import Folder
from proxy.repository.verify_reports import Status, rooted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.remotes.interface import Remote
    from proxy.repository.damage import DamageNotes
    from proxy.repository.verify_disk import Found


async def note_damage(damage: DamageNotes, disks: list[Found], now: int) -> None:
    """Tell the next run what is damaged, and no longer what is seen to be all right."""
    notes = await damage.all()
    for disk in disks:
        status = disk.status
        if status is Status.DAMAGED:
            await damage.add(
                Damage(
                    path=disk.path,
                    uuid=disk.uuid,
                    found=now,
                    depth=disk.needed,
                    message=next(
                        problem.message
                        for problem in disk.problems
                        if problem.status is Status.DAMAGED
                    ),
                )
            )
        elif status is Status.OK and disk.path in notes and not disk.is_merging:
            noted = notes[disk.path]
            if noted.uuid not in (None, disk.uuid) or disk.depth >= noted.depth:
                await damage.clear(disk.path)


async def forget_gone(
    remote: Remote, vm: str, damage: DamageNotes, found: Mapping[str, Found]
) -> None:
    """Forget the damage of disks that are gone, once nothing is left that may have taken it in:
    every disk of the directory is younger, or was seen to be all right."""
    top = f"{vm_directory(vm)}/"
    for path, noted in (await damage.all()).items():
        if not path.startswith(top):
            continue
        try:
            folder = await Folder.look(remote, paths.parent(path))
        except ProxyError:
            continue
        if paths.name(path) in folder.names:
            continue
        directory = paths.parent(path)
        heirs = [
            found.get(rooted(paths.join(directory, name)))
            for name in folder.names
            if is_disk_name(name)
        ]
        if all(heir is not None and _is_free_of(heir, noted) for heir in heirs):
            await damage.clear(path)


def _is_free_of(heir: Found, noted: Damage) -> bool:
    if heir.uuid is not None and heir.timestamp > noted.found:
        return True
    return heir.status is Status.OK and not heir.is_merging and heir.depth >= noted.depth
