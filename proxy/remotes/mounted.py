"""The remote that is a directory of a server, mounted for as long as it is open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import ProxyError, Unreachable
from proxy.remotes.local import LocalRemote
from proxy.remotes.mounts import mounts
from proxy.remotes.wrapper import Wrapper
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from proxy.remotes.interface import RemoteInfo
    from proxy.remotes.lane import Lane
    from proxy.remotes.mount_command import MountRequest
    from proxy.remotes.mounts import MountOptions, Mounts

_CLOSE_SECONDS = 10.0
_INFO_SECONDS = 4.0
"""Xen Orchestra gives ``remote.getInfo`` up after 5 s."""


class MountedRemote(Wrapper):
    """A :class:`LocalRemote` on a mount, which its end gives back."""

    def __init__(
        self,
        inner: LocalRemote,
        table: Mounts,
        request: MountRequest,
        options: MountOptions,
        lane: Lane,
    ) -> None:
        super().__init__(inner)
        self.lane = lane
        self._table = table
        self._request = request
        self._options = options
        self._released = False

    async def info(self) -> RemoteInfo:
        """``Unreachable`` when the server does not tell within 4 s."""
        with trio.move_on_after(_INFO_SECONDS):
            return await super().info()
        raise Unreachable(
            f"ETIMEDOUT: {self.url} did not tell its space within {_INFO_SECONDS:g} s",
            code="ETIMEDOUT",
            data={"seconds": _INFO_SECONDS, "retryIn": round(_INFO_SECONDS)},
        )

    async def aclose(self) -> None:
        """Idempotent; unmounts when no other remote uses the mount.  A cancel does not stop it."""
        if self._released:
            return
        self._released = True
        try:
            with undo_within("closing the remote", _CLOSE_SECONDS):
                await self.inner.aclose()
        except ProxyError as error:  # of a server that is gone: the unmount tells more
            tell_trouble("remote not closed", error, remote=self.url)
        finally:
            await self._table.release(self._request, self._options)


async def open_mounted(
    request: MountRequest,
    *,
    remote_id: object,
    options: MountOptions,
    url: str,
    open_seconds: float,
    **kind: Any,
) -> MountedRemote:
    """Mount and open.  ``kind`` goes to :meth:`LocalRemote.open`.

    Raises what :func:`proxy.remotes.mount_command.explain` makes of a failed mount; on an
    error and on cancel nothing stays mounted for it.
    """
    table = mounts()
    mount = await table.acquire(request, remote_id, options, what=url)
    try:
        inner = await LocalRemote.open(
            mount.directory,
            url=url,
            seconds=open_seconds,
            threads=mount.lane,
            check=mount.check,
            **kind,
        )
    except BaseException:
        await table.release(request, options)
        raise
    return MountedRemote(inner, table, request, options, mount.lane)
