"""Which way to a file server: its export mounted by the kernel, or SMB spoken by ourselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from proxy.errors import Refused
from proxy.remotes.mount_command import nfs_request, smb_request
from proxy.remotes.mounted import open_mounted
from proxy.remotes.mounts import MountOptions, helper_of, may_mount
from proxy.remotes.smb.remote import open_smb_client

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.remotes.factory import RemoteOptions
    from proxy.remotes.interface import Remote
    from proxy.remotes.mount_command import MountRequest
    from proxy.remotes.url import NfsUrl, RemoteUrl, SmbUrl

_log = structlog.get_logger("proxy.remotes")


async def open_nfs(url: NfsUrl, record: Mapping[str, Any], options: RemoteOptions) -> Remote:
    """Mount the export.  ``record`` is XO's, with what the URL's query says over it."""
    return await _open_mount(nfs_request(url, record.get("options")), url, record, options)


async def open_smb(url: SmbUrl, record: Mapping[str, Any], options: RemoteOptions) -> Remote:
    """Mount the share where this system can, else reach it without a mount."""
    request = smb_request(url, record.get("options"))
    reason = _why_no_mount(options)
    if reason is None:
        try:
            return await _open_mount(request, url, record, options)
        except Refused as error:
            if error.code != "ENODEV":
                raise
            reason = error  # the helper is there, but not in the kernel
    _log.info("a share cannot be mounted here", remote=url.public, reason=reason.message)
    return await open_smb_client(url, record, seconds=options.open_seconds)


def _why_no_mount(options: RemoteOptions) -> Refused | None:
    if helper_of("cifs") is None:
        return Refused(
            "ENOENT: mount.cifs is missing: install the package cifs-utils",
            code="EMOUNTHELPER",
            data={"package": "cifs-utils"},
        )
    if not may_mount(sudo=options.use_sudo):
        return Refused(
            "EPERM: mounting needs root: run the daemon as root or set remoteOptions.useSudo",
            code="EPERM",
        )
    return None


async def _open_mount(
    request: MountRequest, url: RemoteUrl, record: Mapping[str, Any], options: RemoteOptions
) -> Remote:
    return await open_mounted(
        request,
        remote_id=record.get("id"),
        options=MountOptions(
            options.mounts_dir,
            sudo=options.use_sudo,
            mount_seconds=float(options.mount_seconds),
            patience=float(options.operation_seconds),
            threads=options.parallel_operations,
        ),
        url=url.public,
        open_seconds=options.open_seconds,
        is_immutable=record.get("immutable") is True,
        use_vhd_directory=bool(record.get("useVhdDirectory")),
        directory_mode=options.directory_mode,
    )
