"""The argument REMOTE of ``xo-proxy backups``: where it is read from, and whether it answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy.cli.client import CallError
from proxy.runtime.secrets import remember

if TYPE_CHECKING:
    from proxy.cli.client import Client

_NO_SUCH_METHOD = -32601


class RemoteUrl(click.ParamType[str]):
    """``@FILE`` is what stands in FILE: a command line, and the secrets in it, can be read by
    every user of the machine."""

    name = "remote"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text.startswith("@"):
            return text
        try:
            text = Path(text[1:]).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            self.fail(f"cannot read {value[1:]}: {reason}", param, ctx)
        if not text:
            self.fail(f"{value[1:]} is empty", param, ctx)
        remember(text)
        return text


remote_argument = click.argument("remote_url", metavar="REMOTE", type=RemoteUrl())


def ask(client: Client, remote_url: str) -> None:
    """Raise ``CallError`` with the reason when the remote cannot be used.

    Before a listing, which only leaves out what fails: asked afterwards, an unreachable store
    would be waited for twice.
    """
    try:
        client.scalar("remote.ping", {"remote": {"url": remote_url}})
    except CallError as error:
        if error.code != _NO_SUCH_METHOD:  # Xen Orchestra's proxy before June 2026
            raise
