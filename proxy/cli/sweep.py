"""``xo-proxy sweep``: what dead runs left on pools and remotes, and what becomes of it."""

from __future__ import annotations

from typing import Any

import click
import msgspec
from rich.console import Console
from rich.text import Text

from proxy.cli.backups import pool_password, root_end
from proxy.cli.client import Client, Stream, connection
from proxy.cli.failures import Failure
from proxy.cli.remote_url import RemoteUrl


class _Entry(msgspec.Struct):
    type: str = ""
    name: str = ""
    uuid: str = ""
    path: str = ""
    run: str = ""
    reason: str = ""


class _Report(msgspec.Struct):
    """Of one pool or remote."""

    swept: list[_Entry] = []
    left: list[_Entry] = []
    error: str = ""


class _Result(msgspec.Struct, rename="camel"):
    dry_run: bool = False
    pools: dict[str, _Report] = {}
    remotes: dict[str, _Report] = {}


@click.command()
@click.option("--pool", "pools", multiple=True, help="URL of a pool's master; may be repeated.")
@click.option("--user", default="root", show_default=True)
@click.option("--insecure", is_flag=True, help="Do not verify the pools' certificates.")
@click.option(
    "--remote",
    "remotes",
    multiple=True,
    type=RemoteUrl(),
    help="URL of a remote, or @FILE with it; may be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@connection
def sweep(
    client: Client,
    pools: tuple[str, ...],
    user: str,
    insecure: bool,
    remotes: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Remove what runs that died left on pools and remotes.

    Only what is unfinished and certainly this daemon's is touched; what is left is told, with
    the reason.  Runs do the same when they come to a pool or remote: this is for the time
    until then, and to look with --dry-run.

    The pools' password is read from the environment variable XAPI_PASSWORD, or asked for.
    """
    if not pools and not remotes:
        raise click.UsageError("say what to sweep: --pool, --remote, or several of them")
    xapis: dict[str, Any] = {}
    for name, url in zip(_names("pool", len(pools)), pools, strict=True):
        password = pool_password(url)
        credentials = {"username": user, "password": password}
        xapis[name] = {"url": url, "allowUnauthorized": insecure} | (
            {} if password is None else {"credentials": credentials}
        )
    named = zip(_names("remote", len(remotes)), remotes, strict=True)
    params: dict[str, Any] = {
        "xapis": xapis,
        "remotes": {name: {"url": url} for name, url in named},
        "dryRun": dry_run,
        "streamLogs": True,
    }
    with client.call("backup.sweep", params) as reply:
        if not isinstance(reply, Stream):
            raise Failure("the daemon sent no log of the sweep")
        result = msgspec.convert(root_end(reply), _Result)
    out = Console(soft_wrap=True)
    reports = {**result.pools, **result.remotes}
    for name, report in reports.items():
        _show(out, name, report, dry_run=result.dry_run)
    failed = [f"{name}: {report.error}" for name, report in reports.items() if report.error]
    if failed:
        raise Failure("\n".join(failed))


def _names(kind: str, count: int) -> list[str]:
    """In the order of the command line: a URL may hold secrets."""
    return [kind] if count == 1 else [f"{kind} {number + 1}" for number in range(count)]


def _show(out: Console, name: str, report: _Report, *, dry_run: bool) -> None:
    if not report.swept and not report.left:
        out.print(Text(f"{name}: " + ("could not be swept" if report.error else "nothing is left")))
        return
    verb = "would be removed or undone" if dry_run else "removed or undone"
    _list(out, f"{name}: {verb}", "green", report.swept)
    _list(out, f"{name}: left as it is", "yellow", report.left)


def _list(out: Console, title: str, style: str, entries: list[_Entry]) -> None:
    if not entries:
        return
    out.print(Text(title, style))
    for entry in entries:
        name = "" if entry.path else f"{entry.name}  "
        out.print(Text(f"  {entry.type:<18}  {name}{entry.path or entry.uuid}"))
        run = f" (run {entry.run})" if entry.run else ""
        out.print(Text(f"  {'':<18}  {entry.reason}{run}"))
