"""The configuration while the daemon runs: reloads, and the token that clients may change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from proxy.config import xenstore
from proxy.config.check import ConfigError, Problem
from proxy.config.durable import replace_file
from proxy.config.layers import Places, Table, read
from proxy.config.loading import TOKEN_VARIABLE, Loaded, load
from proxy.errors import Conflict, Refused, from_os_error
from proxy.runtime.secrets import remember
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from proxy.config.schema import Config

POLL = 2.0
"""Seconds between two looks at the files, as long as XO waits for a new token."""
_LONGEST_TOKEN = 4096

_log = structlog.get_logger("proxy.config")

Fingerprint = dict["Path", tuple[int, int, int] | None]


class LiveConfig:
    """The current configuration; also the ``TokenStore`` of :mod:`proxy.rpc.auth`.

    Safe for concurrent use by the tasks of one Trio run.
    """

    def __init__(self, places: Places, loaded: Loaded) -> None:
        self._places = places
        self._loaded = loaded
        self._lock = trio.Lock()
        self._listeners: list[Callable[[Config], None]] = []

    @property
    def value(self) -> Config:
        """The configuration now.  Immutable: what a run began with does not change under it."""
        return self._loaded.config

    @property
    def token_from(self) -> str:
        return self._loaded.token_from

    def on_change(self, tell: Callable[[Config], None]) -> None:
        """Call ``tell`` with every new configuration; it must neither block nor raise."""
        self._listeners.append(tell)

    def warn(self) -> None:
        """Log what is odd in the files; at the start, when the log is set up."""
        for warning in self._loaded.warnings:
            _log.warning("configuration", problem=str(warning))

    def current(self) -> str:
        """The token; never empty once the daemon serves."""
        return self._loaded.config.authentication_token

    async def reload(self) -> bool:
        """Read the files again; false, with a warning, when they are wrong.

        The old values stay then, and so does the old token when the files give none.  On
        cancel nothing has changed.
        """
        async with self._lock:
            try:
                loaded = await in_thread(Work.DISK, load, self._places)
            except ConfigError as error:
                for problem in error.problems:
                    _log.warning("configuration not reloaded", problem=str(problem))
                return False
            if self.current() and not loaded.config.authentication_token:
                _log.warning("the configuration lost its token, the old one stays in force")
                loaded = _with_token(loaded, self.current(), self.token_from)
            self._use(loaded)
            return True

    def _use(self, loaded: Loaded) -> None:
        old, self._loaded = self._loaded, loaded
        for warning in set(loaded.warnings) - set(old.warnings):
            _log.warning("configuration", problem=str(warning))
        if old.config == loaded.config:
            return
        _log.info("configuration changed", token_from=loaded.token_from)
        for tell in self._listeners:
            tell(loaded.config)

    async def watch(self) -> None:
        """Reload when a file appears, changes or goes.  Runs until cancelled."""
        seen = await in_thread(Work.DISK, self._fingerprint)
        while True:
            await trio.sleep(POLL)
            now = await in_thread(Work.DISK, self._fingerprint)
            if now != seen:
                await self.reload()
            seen = now

    def _fingerprint(self) -> Fingerprint:
        # What was read last stays in view: the token's file, and one that went away.
        try:
            present = self._places.files()
        except OSError:  # a directory that cannot be listed now; the next look may
            present = []
        return {path: _mark(path) for path in {*present, *self._loaded.files}}

    async def rotate(self, new: str) -> None:
        """Write the token where it survives a restart, then use it.

        Both have happened on return.  Raises ``Refused`` when the token is unusable or the
        environment sets it, ``Conflict`` when a file that comes later does.  On cancel
        either nothing or everything happened.
        """
        if not new.strip() or new != new.strip() or len(new) > _LONGEST_TOKEN:
            raise Refused("the token must be text without blanks around it")
        if not new.isprintable():
            raise Refused("the token must not hold control characters")
        if self.token_from == TOKEN_VARIABLE:
            raise Refused(
                f"the token comes from the environment variable {TOKEN_VARIABLE}: change it there"
            )
        remember(new)
        async with self._lock:
            loaded = await in_thread(Work.DISK, _store_token, self._places, new)
            self._use(loaded or _with_token(self._loaded, new, str(self._places.auto)))

    async def ensure_token(self) -> None:
        """Take the token that XO left in XenStore when there is none yet.

        Raises :class:`ConfigError` saying how to set one when there is none there either.
        """
        if self.current():
            return
        token = await in_thread(Work.DISK, xenstore.read_token)
        if not token:
            text = (
                "no token is set, and clients cannot call without one: set it in"
                f" {self._places.system}/config.toml, name a file in authenticationTokenFile,"
                f" or set the environment variable {TOKEN_VARIABLE}"
            )
            raise ConfigError([Problem(None, ("authenticationToken",), text)])
        await self.rotate(token)
        # Only now that it is durable here: XO takes the key's absence as "the proxy is up".
        if not await in_thread(Work.DISK, xenstore.forget_token):
            _log.warning("the token could not be removed from XenStore", key=xenstore.KEY)


def _with_token(loaded: Loaded, token: str, source: str) -> Loaded:
    config = msgspec.structs.replace(loaded.config, authentication_token=token)
    return Loaded(config, loaded.warnings, loaded.files, source)


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _store_token(places: Places, new: str) -> Loaded | None:
    """Write the token; what the files say now, or ``None`` when another one is broken."""
    path = places.auto
    before: Table = {}
    if path.exists():
        try:
            before = read(path)
        except ConfigError as error:
            raise Refused(f"the token cannot be stored: {error.problems[0]}") from error
    existed = path.exists()
    try:
        _write(path, {**before, "authenticationToken": new})
    except OSError as error:
        raise from_os_error(error, "storing the token in", str(path)) from error
    try:
        loaded = load(places)
    except ConfigError:
        return None
    if loaded.config.authentication_token != new:
        if existed:
            _write(path, before)
        else:
            path.unlink()
        raise Conflict(
            f"the token comes from {loaded.token_from}, which overrides {path}: change it there",
            code="EOVERRIDDEN",
        )
    return loaded


def _write(path: Path, table: Table) -> None:
    replace_file(path, json.dumps(table, indent=2).encode(), 0o600)
