"""The commands of ``xo-proxy``, one file each."""

from __future__ import annotations

import importlib
import os
import sys

import click

from proxy import __version__
from proxy.cli import failures

_NAMES = ("backups", "call", "demo", "serve", "simulate", "sweep", "tasks")


class _Commands(click.Group):
    """Loads the file of a command when it is asked for: each needs other libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _NAMES:
            return None
        found: click.Command = getattr(importlib.import_module(f"proxy.cli.{cmd_name}"), cmd_name)
        return found


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="xo-proxy")
def commands() -> None:
    """Back up VMs of XCP-ng and XenServer pools, driven by Xen Orchestra.

    Exit codes: 1 failed, 2 wrong command line, 3 daemon unreachable, 4 token not accepted,
    5 wrong configuration.
    """


def main() -> None:
    """Entry point: runs the command line and exits; never shows a traceback for a known error."""
    try:
        code: object = commands(prog_name="xo-proxy", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        click.echo(err=True)
        sys.exit(failures.INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left, as `head` does
        sys.exit(failures.FAILED)
    except OSError as error:
        # a full disk that our output goes to; what a daemon meets comes in groups
        failures.Failure(str(error)).show()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter fails again at its end
        sys.exit(failures.FAILED)
    except Exception as error:
        # whatever the daemon's rooms raise on purpose; a fault of ours keeps its traceback
        known = failures.failure_of(error)
        if known is None:
            raise
        known.show()
        sys.exit(known.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
