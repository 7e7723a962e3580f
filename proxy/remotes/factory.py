"""From XO's record of a remote to an open remote."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.errors import NotFound, Refused
from proxy.remotes.bounds import Bounded
from proxy.remotes.local import LocalRemote
from proxy.remotes.network import open_nfs, open_smb
from proxy.remotes.objects.azure_opening import open_azure
from proxy.remotes.objects.opening import open_s3
from proxy.remotes.retry import Retry, Told
from proxy.remotes.unlocking import key_of, unlocked
from proxy.remotes.url import (
    AzureUrl,
    FileUrl,
    NfsUrl,
    S3Url,
    SmbUrl,
    parse_url,
    refuse_placeholder,
)
from proxy.remotes.wrapper import bounds_itself, tries_again
from proxy.runtime.deadlines import deadline, undo_within
from proxy.runtime.secrets import remember_in
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.remotes.interface import Remote
    from proxy.remotes.url import RemoteUrl

_CLOSE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """The daemon's settings for all remotes."""

    disable_file_remotes: bool = True
    """``file://`` would let whoever may call us write anywhere on the appliance."""
    mounts_dir: str = "/run/xo-proxy/mounts"
    directory_mode: int = 0o700
    open_seconds: float = 30
    """How long a file system or a store may take to answer when a remote is opened."""
    mount_seconds: float = 45
    """How long ``mount`` may take."""
    use_sudo: bool = False
    """Mount through ``sudo -n``."""
    operation_seconds: float = 600
    """How long one operation may be silent; 0: for ever."""
    parallel_operations: int = 16
    """How many operations run at once on one remote."""
    set_up: bool = True
    """Set an empty remote up for its encryption key; else
    :func:`proxy.remotes.unlocking.settle` does."""


async def open_remote(spec: Mapping[str, Any], *, options: RemoteOptions) -> Remote:
    """Open what ``spec`` describes: ``{url, options?, id?, name?, …}`` as XO stores it.

    Its root is made when missing (an Azure container too, a bucket is not), and checked.  The
    caller owns the result and calls ``aclose``; :func:`opened_remote` does both.  On cancel
    nothing stays open.

    An encrypted one is opened by its ``encryptionKey`` (:func:`proxy.remotes.unlocking.unlocked`
    says what it raises), and an empty one is set up for it if ``options.set_up``.

    Raises ``Refused``: ``EINVAL`` for a malformed URL, ``ENOTSUP`` for a kind of remote or an
    option that is not built in, ``EPERM`` for a ``file`` remote where they are disabled; and
    the errno of a root that cannot be used.  Of an object store ``Unreachable`` (``ENOBUCKET``)
    and ``Unauthorized`` too, with the URL's part that is wrong in ``data.part``.
    """
    url = spec.get("url")
    if not isinstance(url, str):
        raise Refused("the remote has no url", code="EINVAL", data={"part": "url"})
    parsed = parse_url(url)
    remember_in(dict(spec))
    refuse_placeholder("record", {**spec, "url": None})
    # upstream merges the record under the URL: what the URL says wins
    merged = {**spec, **parsed.options}
    key = key_of(merged)
    storage = await _open_storage(parsed, merged, options)
    try:
        return await unlocked(storage, key, set_up=options.set_up)
    except BaseException:
        with undo_within("closing the remote", _CLOSE_SECONDS):
            await storage.aclose()
        raise


async def _open_storage(
    parsed: RemoteUrl, merged: Mapping[str, Any], options: RemoteOptions
) -> Remote:
    """Whatever is encrypted in it stays so."""
    if isinstance(parsed, NfsUrl):
        return await open_nfs(parsed, merged, options)
    if isinstance(parsed, SmbUrl):
        return await open_smb(parsed, merged, options)
    waits = {"seconds": options.operation_seconds, "open_seconds": options.open_seconds}
    if isinstance(parsed, S3Url):
        return await open_s3(parsed, merged, **waits)
    if isinstance(parsed, AzureUrl):
        return await open_azure(parsed, merged, **waits)
    assert isinstance(parsed, FileUrl)
    if options.disable_file_remotes:
        raise Refused("Local remotes are disabled in proxies", code="EPERM")
    return await LocalRemote.open(
        parsed.path,
        url=parsed.public,
        is_immutable=merged.get("immutable") is True,
        use_vhd_directory=bool(merged.get("useVhdDirectory")),
        directory_mode=options.directory_mode,
        seconds=options.open_seconds,
    )


async def refuse_missing(spec: Mapping[str, Any], *, options: RemoteOptions) -> None:
    """Raise ``NotFound`` when a ``file`` remote's directory does not exist, or is none.

    For those who only look: opening it would make the directory, and a mistyped path would be an
    empty remote.  Everything else that is wrong is told by opening.
    """
    url = spec.get("url")
    if options.disable_file_remotes or not isinstance(url, str):
        return
    parsed = parse_url(url)
    if not isinstance(parsed, FileUrl):
        return
    with deadline("looking for the remote", options.open_seconds):
        try:
            status = await in_thread(Work.DISK, os.stat, parsed.path, abandon=True)
        except FileNotFoundError:
            raise NotFound(
                f"ENOENT: the directory of the remote does not exist, open '{parsed.path}'; "
                "the first backup, or a test of the remote, makes it",
                data={"path": parsed.path},
            ) from None
        except OSError:
            return
    if not stat.S_ISDIR(status.st_mode):
        raise NotFound(
            f"ENOTDIR: the path of the remote is no directory, open '{parsed.path}'",
            code="ENOTDIR",
            data={"path": parsed.path},
        )


@contextlib.asynccontextmanager
async def opened_remote(
    spec: Mapping[str, Any], *, options: RemoteOptions
) -> AsyncIterator[Remote]:
    """:func:`open_remote` for the time of a block, with its operations bounded and tried again
    where that helps."""
    remote = await open_remote(spec, options=options)
    try:
        yield Bounded(
            remote if tries_again(remote) else Retry(remote, told=Told(remote.url)),
            at_once=options.parallel_operations,
            seconds=0 if bounds_itself(remote) else options.operation_seconds,
        )
    finally:
        await remote.aclose()
