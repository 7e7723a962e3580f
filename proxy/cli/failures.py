"""How a command fails: one line on standard error and an exit code.

==== ==========================================================================
   0 it worked
   1 the call or the operation failed
   2 the command line is wrong
   3 the daemon cannot be reached, or broke off its answer
   4 the daemon does not accept the token
   5 the configuration cannot be used
 130 interrupted from the keyboard
==== ==========================================================================
"""

from __future__ import annotations

from typing import TypeAlias, cast

import click

from proxy.errors import ProxyError, Unauthorized, Unreachable
from proxy.runtime.secrets import scrub_text

Group: TypeAlias = BaseExceptionGroup[BaseException]

FAILED = 1
UNREACHABLE = 3
UNAUTHORIZED = 4
CONFIGURATION = 5
INTERRUPTED = 130


class Failure(Exception):
    """Ends the command with ``exit_code``; every line of ``message`` is shown."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code

    def show(self) -> None:
        for line in scrub_text(self.message).splitlines() or [""]:
            click.echo(f"xo-proxy: {line}", err=True)


def failure_of(error: BaseException) -> Failure | None:
    """The failure that an error of the daemon's rooms means; ``None`` for a fault of ours."""
    if isinstance(error, BaseExceptionGroup):
        parts = [failure_of(inner) for inner in cast("Group", error).exceptions]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return Failure("\n".join(part.message for part in known), known[0].exit_code)
    if not isinstance(error, ProxyError):
        return error if isinstance(error, Failure) else None
    from proxy.config.check import ConfigError  # noqa: PLC0415  only a failure needs it

    codes: list[tuple[type[ProxyError], int]] = [
        (ConfigError, CONFIGURATION),
        (Unauthorized, UNAUTHORIZED),
        (Unreachable, UNREACHABLE),
    ]
    code = next((code for kind, code in codes if isinstance(error, kind)), FAILED)
    if isinstance(error, ConfigError):
        return Failure("\n".join(map(str, error.problems)), code)
    return Failure(error.message, code)
