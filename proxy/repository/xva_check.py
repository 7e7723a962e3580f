"""Whether the bytes of an ``.xva`` can be a whole XVA.

An XVA is a tar archive, plain or compressed as one gzip or zstd stream.  A plain one ends
with two blocks of zeros, which a cut transfer lacks; a compressed one is only recognised by
its first bytes here, because telling more means reading it all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.errors import Corrupt

if TYPE_CHECKING:
    from proxy.remotes.interface import Remote

_SMALLEST = 20
_TAR_BLOCK = 512
_TAR_END = 2 * _TAR_BLOCK
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


async def is_valid_xva(remote: Remote, path: str, *, size: int | None = None) -> bool:
    """Whether ``path`` looks like a complete XVA of ``size`` bytes (``None``: any).

    On an encrypted remote only its size tells, as parts cannot be authenticated.  A file that
    is missing or cannot be read is an error of the remote and not an answer: unknown is not
    valid.
    """
    if remote.is_encrypted:
        found = (await remote.stat(path)).size
        return found > _SMALLEST and size in (None, found)
    async with remote.open_read(path) as file:
        if file.size < _SMALLEST or (size is not None and file.size != size):
            return False
        start = await file.read_at(0, 4)
        if start.startswith((_GZIP, _ZSTD)):
            return True
        if file.size <= _TAR_END or file.size % _TAR_BLOCK != 0:
            return False
        return await file.read_at(file.size - _TAR_END, _TAR_END) == bytes(_TAR_END)


async def refuse_broken_xva(remote: Remote, path: str, size: int) -> None:
    """A validator for ``open_full_backup``: ``Corrupt`` when the export was cut.

    Before its commit an encrypted file lacks its end, so that what is stored tells nothing yet:
    there ``size``, the bytes that were written, is all that is looked at.
    """
    if remote.is_encrypted:
        is_valid = size > _SMALLEST
    else:
        is_valid = await is_valid_xva(remote, path, size=size)
    if not is_valid:
        raise Corrupt(
            "the exported VM is not a complete XVA: the export was cut; run the backup again",
            data={"size": size},
        )
