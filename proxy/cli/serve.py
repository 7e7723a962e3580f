"""``xo-proxy serve``: the daemon."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--config",
    "configs",
    multiple=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="More configuration, TOML or JSON. May be repeated: later files override earlier ones.",
)
def serve(configs: tuple[Path, ...]) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT.

    Prints "listening on URL" once calls are answered. SIGHUP reloads the configuration; a
    second SIGTERM stops without waiting for running jobs.
    """
    # The other commands start quicker without the server.
    import trio  # noqa: PLC0415

    from proxy import logs  # noqa: PLC0415
    from proxy.cli.failures import failure_of  # noqa: PLC0415
    from proxy.config import Config, Places, load  # noqa: PLC0415
    from proxy.config.live import LiveConfig  # noqa: PLC0415
    from proxy.daemon import refuse_optimised, run  # noqa: PLC0415
    from proxy.runtime.allocator import set_up_heaps  # noqa: PLC0415

    refuse_optimised()
    places = Places(explicit=configs)
    loaded = load(places)
    log = logs.set_up(loaded.config.logs)
    live = LiveConfig(places, loaded)
    live.warn()

    def follow(config: Config) -> None:
        log.set(config.logs)

    live.on_change(follow)

    async def main() -> int:
        return await run(live)

    try:
        set_up_heaps()
        code = trio.run(main)
    except BaseExceptionGroup as error:
        raise failure_of(error) or error from error
    raise click.exceptions.Exit(code)
