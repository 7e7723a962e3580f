"""From XO's record of a remote to an open remote."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.errors import Refused
from proxy.remotes.local import LocalRemote
from proxy.remotes.smb.remote import open_smb_client
from proxy.remotes.url import FileUrl, SmbUrl, parse_url
from proxy.runtime.secrets import remember_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.remotes.interface import Remote


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """The daemon's settings for all remotes."""

    disable_file_remotes: bool = True
    """``file://`` would let whoever may call us write anywhere on the appliance."""
    mounts_dir: str = "/run/xo-proxy/mounts"
    directory_mode: int = 0o700
    open_seconds: float = 30
    """How long a file system may take to answer when a remote is opened."""


async def open_remote(spec: Mapping[str, Any], *, options: RemoteOptions) -> Remote:
    """Open what ``spec`` describes: ``{url, options?, id?, name?, …}`` as XO stores it.

    Its root is made when missing, and checked.  The caller owns the result and calls
    ``aclose``; :func:`opened_remote` does both.  On cancel nothing stays open.

    Raises ``Refused``: ``EINVAL`` for a malformed URL, ``ENOTSUP`` for a kind of remote or an
    option that is not built in, ``EPERM`` for a ``file`` remote where they are disabled; and
    the errno of a root that cannot be used.
    """
    url = spec.get("url")
    if not isinstance(url, str):
        raise Refused("the remote has no url", code="EINVAL", data={"part": "url"})
    parsed = parse_url(url)
    remember_in(dict(spec))
    # upstream merges the record under the URL: what the URL says wins
    merged = {**spec, **parsed.options}
    if not isinstance(parsed, FileUrl | SmbUrl):
        raise Refused(
            f"remotes of type '{parsed.type}' are not supported: only 'file' and 'smb' are",
            code="ENOTSUP",
            data={"type": parsed.type, "supported": ["file", "smb"]},
        )
    if isinstance(parsed, FileUrl) and options.disable_file_remotes:
        raise Refused("Local remotes are disabled in proxies", code="EPERM")
    if merged.get("encryptionKey"):
        raise Refused(
            "encrypted remotes are not supported: nothing was read or written",
            code="ENOTSUP",
            data={"option": "encryptionKey"},
        )
    if isinstance(parsed, SmbUrl):
        return await open_smb_client(parsed, merged, seconds=options.open_seconds)
    return await LocalRemote.open(
        parsed.path,
        url=parsed.public,
        is_immutable=merged.get("immutable") is True,
        use_vhd_directory=bool(merged.get("useVhdDirectory")),
        directory_mode=options.directory_mode,
        seconds=options.open_seconds,
    )


@contextlib.asynccontextmanager
async def opened_remote(
    spec: Mapping[str, Any], *, options: RemoteOptions
) -> AsyncIterator[Remote]:
    """:func:`open_remote` for the time of a block."""
    remote = await open_remote(spec, options=options)
    try:
        yield remote
    finally:
        await remote.aclose()
