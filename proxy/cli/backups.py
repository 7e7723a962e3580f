"""``xo-proxy backups``: list, verify, restore and delete what a remote holds."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from proxy.cli.client import Client, Stream, connection
from proxy.cli.failures import Failure
from proxy.cli.metadata import metadata
from proxy.cli.remote_url import ask, remote_argument
from proxy.cli.verifying import verify
from proxy.cli.views import Error

REMOTE = "remote"
_WIDTH = 160


@click.group()
@connection
def backups(client: Client) -> None:
    """Look after the backups of one remote.

    REMOTE is its URL, such as file:///backups, or @FILE, a file that holds it: other users of
    this machine can see what stands on a command line.

    The connection given here is the default of the subcommands.
    """


backups.add_command(verify)
backups.add_command(metadata)


@backups.command("list")
@remote_argument
@click.option("--vm", help="Only this VM's backups (uuid).")
@connection
def list_(client: Client, remote_url: str, vm: str | None) -> None:
    """List the VM backups that REMOTE (a URL, or @FILE with it) holds."""
    params: dict[str, Any] = {"remotes": {REMOTE: {"url": remote_url}}}
    if vm is not None:
        params["vmId"] = vm
    ask(client, remote_url)
    found = client.scalar("backup.listVmBackups", params)
    if REMOTE not in found:
        raise Failure("the remote could not be read, the daemon's log says why")
    if not any(found[REMOTE].values()):
        click.echo("no backups", err=True)
        return
    shown = Table("VM", "mode", "made (UTC)", "size", box=None, header_style="bold")
    shown.add_column("id", no_wrap=True)
    for of_vm in found[REMOTE].values():
        for backup in of_vm:
            made = datetime.fromtimestamp(backup["timestamp"] / 1000, UTC)
            shown.add_row(
                backup["vm"]["name_label"],
                backup["mode"],
                f"{made:%Y-%m-%d %H:%M:%S}",
                decimal(backup.get("size") or 0),
                backup["id"],
            )
    # An id is there to be copied: a narrow terminal wraps the line, not its content.
    Console(width=max(Console().width, _WIDTH)).print(shown)


@backups.command()
@remote_argument
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.confirmation_option(prompt="Delete these backups for good?")
@connection
def delete(client: Client, remote_url: str, ids: tuple[str, ...]) -> None:
    """Delete backups by the ids that `list` shows.

    Ids that name no backup are told: they may be mistyped, or gone already.
    """
    spec = {"url": remote_url}
    ask(client, remote_url)
    found = client.scalar("backup.listVmBackups", {"remotes": {REMOTE: spec}})
    client.scalar("backup.deleteVmBackups", {"filenames": list(ids), "remote": spec})
    listed = {backup["id"] for of_vm in found.get(REMOTE, {}).values() for backup in of_vm}
    # an id is taken with and without its leading slash
    gone = [each for each in ids if f"/{each.lstrip('/')}" not in listed]
    click.echo(f"deleted {len(ids) - len(gone)}")
    for each in gone:
        click.echo(f"there was no backup {each}", err=True)


@backups.command()
@remote_argument
@click.argument("backup_id", metavar="ID")
@click.option("--pool", required=True, help="URL of the pool's master.")
@click.option("--user", default="root", show_default=True)
@click.option("--sr", required=True, help="Uuid of the SR that gets the disks.")
@click.option("--insecure", is_flag=True, help="Do not verify the pool's certificate.")
@click.option("--new-mac", is_flag=True, help="Give the VM new MAC addresses.")
@connection
def restore(
    client: Client,
    remote_url: str,
    backup_id: str,
    pool: str,
    user: str,
    sr: str,
    insecure: bool,
    new_mac: bool,
) -> None:
    """Make a new VM from a backup and print its uuid.

    The pool's password is read from the environment variable XAPI_PASSWORD, or asked for.
    """
    credentials = {"username": user, "password": pool_password(pool)}
    params = {
        "backupId": backup_id,
        "remote": {"url": remote_url},
        "srUuid": sr,
        "settings": {"newMacAddresses": new_mac},
        "streamLogs": True,
        "xapi": {
            "url": pool,
            "allowUnauthorized": insecure,
            **({} if credentials["password"] is None else {"credentials": credentials}),
        },
    }
    with client.call("backup.importVmBackup", params) as reply:
        if not isinstance(reply, Stream):
            raise Failure("the daemon sent no log of the restore")
        end = root_end(reply)
    click.echo(end["id"])


def pool_password(pool: str) -> str | None:
    """``None`` when the pool's URL holds it."""
    with contextlib.suppress(ValueError):  # the daemon says what is wrong with it
        if urlsplit(pool).password is not None:
            return None
    given = os.environ.get("XAPI_PASSWORD")
    if given is None and not sys.stdin.isatty():
        raise click.UsageError("set XAPI_PASSWORD: there is no terminal to ask for the password on")
    return given or click.prompt("Password", hide_input=True, err=True)


def root_end(log: Stream) -> Any:
    """Read a run's log to its end; the root's result.  Raises ``Failure`` with its message."""
    root: str | None = None
    for record in log.items:
        if root is None and record["type"] == "start":
            root = record["id"]
        if record["type"] == "end" and record["id"] == root:
            if record["status"] == "success":
                return record.get("result")
            error = msgspec.convert(record.get("result") or {}, Error)
            raise Failure(error.shown or "it failed")
    raise Failure("the log ended before the run did: the daemon was stopped")
