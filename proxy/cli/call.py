"""``xo-proxy call``: one call of the API from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import click

from proxy.cli.client import Binary, Client, Stream, connection


@click.command()
@click.argument("method")
@click.argument("params", nargs=-1, metavar="[KEY=TEXT | KEY:=JSON]...")
@click.option(
    "--json",
    "json_params",
    multiple=True,
    metavar="PARAMS|@FILE|-",
    help="Parameters as an object in JSON, in FILE, or from standard input. May be repeated.",
)
@click.option("--raw", is_flag=True, help="Text without quotes, JSON on one line.")
@connection
def call(
    client: Client,
    method: str,
    params: tuple[str, ...],
    json_params: tuple[str, ...],
    raw: bool,
) -> None:
    """Call METHOD and print what it answers.

    A stream is printed line by line as it arrives; bytes go to standard output unless that
    is a terminal.

    \b
    xo-proxy call system.getServerVersion
    xo-proxy call task.getAll limit:=3
    xo-proxy call backup.listVmBackups --json '{"remotes": {"r": {"url": "file:///backups"}}}'
    xo-proxy call backup.run --json @places.json --json @job.json
    """
    with client.call(method, parse_params(params, json_params)) as reply:
        if isinstance(reply, Binary):
            if sys.stdout.isatty():
                raise click.UsageError("the answer is bytes: redirect standard output to a file")
            for chunk in reply.chunks:
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        elif isinstance(reply, Stream):
            for item in reply.items:
                _show(item, raw=raw, indent=None)
        else:
            _show(reply.value, raw=raw, indent=None if raw else 2)


def parse_params(words: tuple[str, ...], objects: tuple[str, ...] = ()) -> dict[str, Any]:
    """``KEY=TEXT`` and ``KEY:=JSON``, laid over ``objects``, of which a later one wins.

    Xen Orchestra's own tool writes ``KEY=json:JSON``, which is read too.
    """
    params: dict[str, Any] = {}
    for text in objects:
        given = _parse(*_read(text))
        if not isinstance(given, dict):
            raise click.UsageError("--json must hold an object")
        params.update(cast("dict[str, Any]", given))
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.rstrip(":"):
            raise click.UsageError(f"{word!r} is no parameter: write KEY=TEXT or KEY:=JSON")
        if key.endswith(":"):
            params[key[:-1]] = _parse(text, key[:-1])
        elif text.startswith("json:"):
            params[key] = _parse(text.removeprefix("json:"), key)
        else:
            params[key] = text
    return params


def _read(text: str) -> tuple[str, str]:
    """What ``--json`` gives, and its name: no JSON begins with ``@``."""
    if text == "-":
        return sys.stdin.read(), "--json"
    if not text.startswith("@"):
        return text, "--json"
    try:
        return Path(text[1:]).read_text("utf-8"), text[1:]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise click.UsageError(f"cannot read {text[1:]}: {reason}") from error


def _parse(text: str, what: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{what} is not JSON: {error}") from error
    return value


def _show(value: Any, *, raw: bool, indent: int | None) -> None:
    if raw and isinstance(value, str):
        click.echo(value)
        return
    separators = (",", ":") if indent is None else None
    click.echo(json.dumps(value, ensure_ascii=False, indent=indent, separators=separators))
