"""``xo-proxy backups verify``: a line a backup, what is wrong with it, and the sum of it all."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from proxy.cli.client import Client, Stream, connection
from proxy.cli.failures import Failure
from proxy.cli.remote_url import remote_argument

_STYLES = {
    "ok": "green",
    "merging": "cyan",
    "unknown": "yellow",
    "unreadable": "magenta",
    "damaged": "bold red",
}
_HINTS = {
    "damaged": "does not restore, or restores wrong data: the next run starts a new chain",
    "unreadable": "the storage failed: the backup may be fine, look after the storage",
    "unknown": "nothing can be said, see above",
    "merging": "verify again when the merge has ended",
}
_WIDTH = 120


class _Problem(msgspec.Struct):
    message: str = ""


class _Comparison(msgspec.Struct):
    result: str = "unknown"
    message: str = ""


class _Report(msgspec.Struct, rename="camel"):
    """Of a disk or of a backup."""

    type: str
    status: str = ""
    id: str = ""
    path: str = ""
    name_label: str = msgspec.field(default="", name="name_label")
    vm: str = ""
    mode: str = ""
    timestamp: int = 0
    checksum: _Comparison | None = None
    problems: list[_Problem] = []


class _Summary(msgspec.Struct, rename="camel"):
    status: str
    message: str = ""
    backups: dict[str, int] = {}
    disks: dict[str, int] = {}
    checksums: dict[str, int] = {}
    bytes_read: int = 0


@click.command()
@remote_argument
@click.option("--vm", help="Only this VM's backups (uuid).")
@click.option("--backup", "filename", help="Only this backup (the id that `list` shows).")
@click.option("--read", is_flag=True, help="Read all data and compare it with its checksums.")
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    help="Read only this share of the data, another one each day.",
)
@connection
def verify(
    client: Client,
    remote_url: str,
    vm: str | None,
    filename: str | None,
    read: bool,
    sample: float | None,
) -> None:
    """Look at the backups that REMOTE holds: can they be restored?

    Nothing is changed.  The exit code is 1 when anything is damaged or could not be read.
    """
    if sample is not None and not read:
        raise click.UsageError("--sample says how much to read: it needs --read")
    given = {"vmId": vm, "filename": filename, "sample": sample}
    params: dict[str, Any] = {"remote": {"url": remote_url}, "level": "structure"}
    if read:
        params["level"] = "read"
    params |= {key: value for key, value in given.items() if value is not None}
    out = Console()
    if not out.is_terminal:
        out = Console(width=_WIDTH)
    with client.call("backup.verify", params) as reply:
        if not isinstance(reply, Stream):
            raise Failure("the daemon sent no reports")
        summary = _show(reply, out)
    if summary is None:
        raise Failure("the reports ended before the verify did: the daemon was stopped")
    _sum_up(out, summary)
    if summary.message:
        raise Failure(summary.message)
    if summary.status not in ("ok", "merging", "unknown"):
        raise Failure(f"the verify ended: {summary.status}")


def _show(reply: Stream, out: Console) -> _Summary | None:
    count = 0
    with out.status("looking") as status:
        for record in reply.items:
            kind = record.get("type")
            if kind == "summary":
                return msgspec.convert(record, _Summary)
            if kind == "start":
                status.update(f"looking (task {record['taskId']})")
                continue
            report = msgspec.convert(record, _Report)
            if report.type == "backup":
                count += 1
                status.update(f"looking, {count} backups done")
                _show_backup(out, report)
            elif report.status != "ok":
                out.print(_line(report.status, f"disk {report.path}"), soft_wrap=True)
    return None


def _show_backup(out: Console, report: _Report) -> None:
    made = datetime.fromtimestamp(report.timestamp / 1000, UTC)
    what = f"{report.name_label or report.vm}  {report.mode}  {made:%Y-%m-%d %H:%M:%S}  {report.id}"
    out.print(_line(report.status, what), soft_wrap=True)
    for message in dict.fromkeys(problem.message for problem in report.problems):
        out.print(Text(f"            {message}"), soft_wrap=True)


def _line(status: str, what: str) -> Text:
    return Text.assemble((f"{status:<10}", _STYLES.get(status, "")), f"  {what}")


def _sum_up(out: Console, summary: _Summary) -> None:
    def counts(of: dict[str, int]) -> str:
        return ", ".join(f"{number} {name}" for name, number in of.items()) or "none"

    out.print(Text(f"backups: {counts(summary.backups)}"))
    if summary.disks:
        out.print(Text(f"disks: {counts(summary.disks)}"))
    if summary.bytes_read:
        out.print(
            Text(f"read: {decimal(summary.bytes_read)}; checksums: {counts(summary.checksums)}")
        )
    for status, hint in _HINTS.items():
        if summary.backups.get(status):
            out.print(Text(f"{status}: {hint}"))
