"""The merges that Xen Orchestra left to its worker: ``.queue/clean-vm/<any name>``.

Each file holds the uuid of a VM whose disks are to be merged.  Nothing is ever added here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from proxy.errors import NotFound, ProxyError
from proxy.repository.paths import ROOT

if TYPE_CHECKING:
    from proxy.remotes.interface import Remote

_log = structlog.get_logger(__name__)

_QUEUE = f"{ROOT}/.queue/clean-vm"
_LIMIT = 1024
"""Bytes of an entry: a uuid."""


async def forget_queued(remote: Remote, vm_uuid: str) -> None:
    """Remove the entries for ``vm_uuid``, whose disks have just been merged.

    An error is logged: the worker would find nothing to do.
    """
    try:
        names = [entry.name for entry in await remote.list(_QUEUE) if not entry.is_dir]
        entries = [f"{_QUEUE}/{name}" for name in names]
        contents = await remote.read_files(entries, limit=_LIMIT)
        for path, content in zip(entries, contents, strict=True):
            if isinstance(content, bytes) and content.strip() == vm_uuid.encode():
                await remote.unlink(path)
    except NotFound:
        return
    except ProxyError as error:
        _log.warning("the queue of merges cannot be read", vm=vm_uuid, error=error.message)
