"""``xo-proxy backups metadata``: the backups of pools and of Xen Orchestra's configuration."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import click
from rich.console import Console
from rich.table import Table

from proxy.cli.client import Client, connection
from proxy.cli.failures import Failure
from proxy.cli.remote_url import ask, remote_argument

_REMOTE = "remote"
_WIDTH = 240


@click.command()
@remote_argument
@connection
def metadata(client: Client, remote_url: str) -> None:
    """List the backups of pools and of Xen Orchestra's configuration that REMOTE holds."""
    params: dict[str, Any] = {"remotes": {_REMOTE: {"url": remote_url}}}
    ask(client, remote_url)
    pools = client.scalar("backup.listPoolMetadataBackups", params)
    configs = client.scalar("backup.listXoMetadataBackups", params)
    if _REMOTE not in pools or _REMOTE not in configs:
        raise Failure("the remote could not be read, the daemon's log says why")
    entries = [("Xen Orchestra", entry) for entry in configs[_REMOTE]]
    for uuid, of_pool in pools[_REMOTE].items():
        entries += [(_label(entry) or uuid, entry) for entry in of_pool]
    if not entries:
        click.echo("no backups", err=True)
        return
    shown = Table("of", "job", "made (UTC)", box=None, header_style="bold")
    shown.add_column("id", no_wrap=True)
    for of, entry in entries:
        shown.add_row(of, str(entry.get("jobName") or ""), _made(entry), entry["id"])
    # An id is there to be copied: a narrow terminal wraps the line, not its content.
    Console(width=max(Console().width, _WIDTH)).print(shown)


def _label(entry: dict[str, Any]) -> str:
    pool = entry.get("pool")
    if not isinstance(pool, dict):
        return ""
    return str(cast("dict[str, Any]", pool).get("name_label") or "")


def _made(entry: dict[str, Any]) -> str:
    try:
        made = datetime.fromtimestamp(entry["timestamp"] / 1000, UTC)
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return ""
    return f"{made:%Y-%m-%d %H:%M:%S}"
