"""What the backups on a remote hold, read by ourselves and without the daemon."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from proxy.disks.disk import block_pool
from proxy.disks.opening import open_chain
from proxy.formats.vhd import BLOCK_SIZE
from proxy.remotes.factory import RemoteOptions, opened_remote
from tests.jobs import archives

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.remotes import Remote

_OPTIONS = RemoteOptions(disable_file_remotes=False)


def metadata_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The metadata of every backup on a remote by its id; what does not parse is an error."""
    base = folder / "xo-vm-backups"
    return {
        f"/xo-vm-backups/{path.relative_to(base)}": json.loads(path.read_bytes())
        for path in sorted(base.glob("*/*.json"))
    }


async def digests(folder: Path) -> dict[str, dict[str, str]]:
    """Of each backup the SHA-256 of its disks, by the uuid of the snapshot they are from.

    Every backup must be readable, whatever is under way on the remote.
    """
    found: dict[str, dict[str, str]] = {}
    async with opened_remote({"url": f"file://{folder}"}, options=_OPTIONS) as remote:
        for backup, metadata in metadata_of(folder).items():
            directory = backup.strip("/").rpartition("/")[0]
            if metadata["mode"] == "full":
                found[backup] = _of_archive((folder / directory / metadata["xva"]).read_bytes())
                continue
            found[backup] = {
                metadata["vdis"][ref]["uuid"]: await _of_disk(remote, f"{directory}/{path}")
                for ref, path in metadata["vhds"].items()
            }
    return found


def _of_archive(archive: bytes) -> dict[str, str]:
    disks = archives.disks(archive)
    return {
        vdi["uuid"]: hashlib.sha256(disks[vdi["name_label"]]).hexdigest()
        for vdi in archives.records(archive)["VDI"]
    }


async def _of_disk(remote: Remote, path: str) -> str:
    sha = hashlib.sha256()
    async with open_chain(remote, path) as chain, chain.read(block_pool(4)) as reader:
        assert not chain.is_differencing, path
        block = await reader.next()
        for index in range(-(-chain.virtual_size // BLOCK_SIZE)):
            length = min(BLOCK_SIZE, chain.virtual_size - index * BLOCK_SIZE)
            if block is not None and block.index == index:
                sha.update(block.data[:length])
                block.buffer.release()
                block = await reader.next()
            else:
                sha.update(bytes(length))
    return sha.hexdigest()


def unexplained(folder: Path) -> list[str]:
    """What is on a remote beside its backups: unfinished files, data of nobody, locks."""
    from tests.jobs.conftest import explained, files_of

    base = folder / "xo-vm-backups"
    locks = [path.name for path in (*base.glob("*.lock"), *base.glob(".*"))]
    return sorted(set(files_of(folder)) - explained(folder)) + locks
