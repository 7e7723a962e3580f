"""Bases that an old fault of Xen Orchestra may have made without content.

Until it wrote ``includeNonNbdQcow2Fix`` into the metadata, its full exports of qcow2 disks could
hold zeros where data was.  A delta on such a base would go on with the loss; a look at a few
blocks tells.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from proxy.disks.disk import block_pool
from proxy.disks.opening import open_chain
from proxy.errors import ProxyError
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE
from proxy.repository.metadata import read_backup
from proxy.repository.paths import DISKS_NAME

if TYPE_CHECKING:
    from proxy.disks.disk import RandomDisk
    from proxy.remotes.interface import Remote

_ZEROS = bytes(BLOCK_SIZE)
_BLOCKS = 10
"""How many blocks without data make a disk suspect."""


async def is_suspect_base(remote: Remote, path: str) -> bool:
    """Whether the chain of the disk ``path`` may lack data.

    Not when its backup's metadata tells that the fault was mended, or that the disk is no
    qcow2.  Otherwise when the blocks behind the first of its oldest disk hold nothing but
    zeros: ten of them, or all that there are.
    """
    if await _is_cleared(remote, path):
        return False
    async with open_chain(remote, path) as chain:
        return not await _has_data(chain.disks[0])


async def _is_cleared(remote: Remote, path: str) -> bool:
    directory, _, relative = path.partition(f"/{DISKS_NAME}/")
    name = path.rpartition("/")[2].partition(".")[0]
    try:
        metadata = (await read_backup(remote, f"{directory}/{name}.json")).metadata
    except ProxyError:
        return False
    if metadata.get("includeNonNbdQcow2Fix") is True:
        return True
    vhds: dict[str, str] = metadata.get("vhds") or {}
    vdis: dict[str, dict[str, Any]] = metadata.get("vdis") or {}
    for ref, vhd in vhds.items():
        if vhd.removeprefix("./") == f"{DISKS_NAME}/{relative}" and ref in vdis:
            config: dict[str, str] = vdis[ref].get("sm_config") or {}
            return config.get("image-format") != "qcow2"
    return False


async def _has_data(disk: RandomDisk) -> bool:
    buffer = await block_pool(1).acquire()
    for index in islice((each for each in disk.blocks if each > 0), _BLOCKS):
        await disk.read_block(index, buffer.memory)
        if bytes(buffer.memory[BITMAP_SIZE:]) != _ZEROS:
            return True
    return False
