"""``xo-proxy simulate``: a pool that exists in memory, to try the daemon on."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import click

from proxy.cli.failures import Failure


class Size(click.ParamType[int]):
    """Bytes, or text such as ``64MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from proxy.config import parse_size  # noqa: PLC0415 - keeps --help quick

        try:
            return int(parse_size(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0: any free one."
)
@click.option("--tls", is_flag=True, help="Speak HTTPS with a self-signed certificate.")
@click.option(
    "--vms", type=click.IntRange(0), default=1, show_default=True, help="How many VMs the pool has."
)
@click.option(
    "--disks", type=click.IntRange(0), default=1, show_default=True, help="Disks of each VM."
)
@click.option("--disk-size", type=Size(), default="64MiB", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Same seed, same pool and content.")
@click.option(
    "--disk-image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A raw image that becomes the first VM's disk.",
)
@click.option(
    "--nbd",
    type=click.Choice(["nbd", "insecure_nbd"]),
    help="Serve disks over NBD: the purpose of the pool's network, with TLS or without.",
)
@click.option("--rate", type=Size(), help="Bytes a second of each transfer; default: no limit.")
@click.option(
    "--latency",
    type=click.FloatRange(0),
    default=0.0,
    help="Seconds that snapshots and similar calls take.",
)
@click.option(
    "--churn",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Share of the running VMs' disks that is written anew, again and again.",
)
@click.option(
    "--churn-seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds from one such write to the next.",
)
def simulate(rate: int | None, **options: Any) -> None:
    """Run a simulated XCP-ng pool until interrupted.

    Prints one line of JSON with its URL, credentials and the ids of SRs, VMs and disks.
    """
    import trio  # noqa: PLC0415

    from proxy.simulator import SimulatorOptions, run_standalone  # noqa: PLC0415

    chosen = SimulatorOptions(rate=None if rate is None else float(rate), **options)

    def ready(info: dict[str, Any]) -> None:
        click.echo(json.dumps(info))

    try:
        trio.run(functools.partial(run_standalone, chosen, ready))
    except* OSError as errors:  # an address that is taken, or is none
        raise Failure("\n".join(_leaves(errors))) from errors


def _leaves(group: BaseExceptionGroup[OSError]) -> list[str]:
    found: list[str] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [str(error)]
    return found
