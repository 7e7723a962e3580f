"""The token that Xen Orchestra leaves in XenStore when it deploys an appliance."""

from __future__ import annotations

import json
import subprocess

import structlog

KEY = "vm-data/xo-proxy-authenticationToken"
_PATIENCE = 10.0

_log = structlog.get_logger("proxy.config")


def read_token() -> str:
    """What XO left (a JSON string), or ''.  The tool is missing outside a Xen guest.  Blocks."""
    try:
        token: object = json.loads(_run("xenstore-read"))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        _log.debug("no token in XenStore", reason=type(error).__name__)
        return ""
    return token.strip() if isinstance(token, str) else ""


def forget_token() -> bool:
    """Remove the key; false when that failed.  Blocks."""
    try:
        _run("xenstore-rm")
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _run(tool: str) -> bytes:
    done = subprocess.run(  # noqa: S603 - constant arguments
        [tool, KEY], capture_output=True, check=True, timeout=_PATIENCE
    )
    return done.stdout
