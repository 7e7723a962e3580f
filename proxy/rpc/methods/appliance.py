"""``appliance.*``: the machine under the proxy.

Upstream's appliance image brings an updater and a support tunnel; here the operator's
package manager and own remote access do that work, and these calls say so.
"""

from __future__ import annotations

import os
import platform
import ssl
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import ProxyError, Refused
from proxy.rpc.methods.system import VERSION, Nothing
from proxy.rpc.registry import Params, Registry
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from proxy.rpc.context import Context

methods = Registry()

OS_RELEASE = Path("/etc/os-release")
_LOW_SPACE = 100 * 1024 * 1024
_EARLIEST = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
_SYNCHRONISED = Path("/run/systemd/timesync/synchronized")
_UPDATES = "this proxy is updated by its operator's package manager, not by Xen Orchestra"


class Channel(Params):
    channel: str


@methods.method("appliance.check", Nothing, result={"type": "string"})
async def check(context: Context, _: Nothing) -> str:
    """A text for people: one line a check, the first word is its outcome."""
    lines = [
        await in_thread(Work.DISK, _check_space, context.services.datadir, abandon=True),
        await _check_journal(context),
        await in_thread(Work.DISK, _check_clock, abandon=True),
        _check_versions(),
    ]
    return "\n".join(lines) + "\n"


def _check_space(datadir: Path) -> str:
    try:
        disk = os.statvfs(datadir)
    except OSError as error:
        return f"FAIL data directory: {(error.strerror or str(error)).lower()}"
    free = disk.f_bavail * disk.f_frsize
    share = 100 * disk.f_bavail / max(disk.f_blocks, 1)
    outcome = "OK  " if free >= _LOW_SPACE else "FAIL"
    return f"{outcome} data directory: {free / 2**20:.0f} MiB free ({share:.0f} %)"


async def _check_journal(context: Context) -> str:
    begun = trio.current_time()
    try:
        with trio.fail_after(10):
            newest = context.services.tasks.list(limit=1)
            async for _ in newest:
                pass
    except (ProxyError, OSError, trio.TooSlowError) as error:
        return f"FAIL task journal: {error or 'no answer within 10 s'}"
    return f"OK   task journal: answers in {(trio.current_time() - begun) * 1000:.0f} ms"


def _check_clock() -> str:
    now = time.time()
    shown = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    if now < _EARLIEST:
        return f"FAIL clock: {shown} is in the past, backups would be named wrongly"
    if _SYNCHRONISED.exists():
        return f"OK   clock: {shown}, synchronised"
    return f"WARN clock: {shown}, not known to be synchronised"


def _check_versions() -> str:
    return (
        f"OK   xo-proxy {VERSION}, Python {platform.python_version()}, Trio {trio.__version__}, "
        f"{ssl.OPENSSL_VERSION.split(' (')[0]}, {sys.platform} {platform.release()}"
    )


@methods.method(
    "appliance.getInfo",
    Nothing,
    description="returns various information about the appliance itself",
    result={
        "type": "object",
        "properties": {
            "build": {"type": "string"},
            "os": {"type": "string"},
            "osVersion": {"type": "string"},
        },
    },
)
async def get_info(_context: Context, _: Nothing) -> dict[str, str]:
    try:
        text = await in_thread(
            Work.DISK, partial(OS_RELEASE.read_text, encoding="utf-8", errors="replace")
        )
    except OSError:
        return {}
    said = _read_os_release(text)
    names = {"build": "XOA_BUILD", "os": "ID", "osVersion": "VERSION_ID"}
    return {key: said[name] for key, name in names.items() if name in said}


def _read_os_release(text: str) -> dict[str, str]:
    """``KEY=value`` lines, values quoted as in a shell (os-release(5))."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and not key.startswith("#"):
            quote = value[:1]
            if len(value) > 1 and quote in {'"', "'"} and value.endswith(quote):
                value = value[1:-1]
            found[key] = value
    return found


@methods.method("appliance.supportTunnel.close", Nothing, description="close the support tunnel")
def close_tunnel(_context: Context, _: Nothing) -> None:
    raise _no_tunnel()


@methods.method(
    "appliance.supportTunnel.getState",
    Nothing,
    description="getState the support tunnel",
    result={
        "type": "object",
        "properties": {"open": {"type": "boolean"}, "stdout": {"type": "string"}},
    },
)
def tunnel_state(_context: Context, _: Nothing) -> dict[str, Any]:
    return {"open": False, "stdout": ""}


@methods.method("appliance.supportTunnel.open", Nothing, description="open the support tunnel")
def open_tunnel(_context: Context, _: Nothing) -> None:
    raise _no_tunnel()


def _no_tunnel() -> Refused:
    return Refused(
        "this proxy has no support tunnel: give support access by your own means", code="ENOTSUP"
    )


@methods.method("appliance.updater.getLocalManifest", Nothing)
def local_manifest(_context: Context, _: Nothing) -> None:
    raise _no_updater()


@methods.method("appliance.updater.getState", Nothing, result={"type": "object"})
def updater_state(_context: Context, _: Nothing) -> dict[str, str]:
    """XO shows ``message`` for a state that it does not know, and needs ``state`` as a string."""
    return {"state": "managed-by-operator", "message": _UPDATES}


@methods.method("appliance.updater.configure", Channel)
def configure_updater(_context: Context, _: Channel) -> None:
    raise _no_updater()


@methods.method("appliance.updater.upgrade", Nothing)
def upgrade(_context: Context, _: Nothing) -> None:
    raise _no_updater()


def _no_updater() -> Refused:
    return Refused(_UPDATES, code="ENOTSUP")
