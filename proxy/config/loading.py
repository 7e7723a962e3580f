"""One load: find, read, merge, check, and find the token."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import msgspec

from proxy.config.check import Checker, ConfigError, Key, Problem
from proxy.config.layers import READABLE, Places, Table, merge, origins, read
from proxy.config.schema import IGNORED, Config
from proxy.runtime.secrets import remember

if TYPE_CHECKING:
    from pathlib import Path

TOKEN_VARIABLE = "XO_PROXY_AUTHENTICATION_TOKEN"  # noqa: S105 - a variable's name
_TOKEN = "authenticationToken"  # noqa: S105
_TOKEN_FILE = "authenticationTokenFile"  # noqa: S105


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid configuration and how it came to be."""

    config: Config
    """``authentication_token`` is the effective token, wherever it came from; may be ''."""
    warnings: tuple[Problem, ...]
    files: tuple[Path, ...]
    """Every file that was read, the token's own included: what a watcher watches."""
    token_from: str
    """File or variable that gives the token; '' without one."""


def load(places: Places) -> Loaded:
    """Read every layer.  Blocks on disk.  Raises :class:`ConfigError` with all problems."""
    merged: Table = {}
    known: dict[Key, Path] = {}
    problems: list[Problem] = []
    warnings: list[Problem] = []
    files: list[Path] = []
    for path in places.files():
        if path.suffix not in READABLE:
            if path in places.explicit:
                problems.append(Problem(path, (), "only .toml and .json files can be read"))
            else:
                warnings.append(Problem(path, (), "not read: only .toml and .json files are"))
            continue
        try:
            table = read(path)
        except ConfigError as error:
            problems += error.problems
            continue
        files.append(path)
        _one_token(table, merged, path, problems)
        merged = cast("Table", merge(merged, table))
        origins(table, path, known)
        if table.get(_TOKEN) and _readable_by_all(path):
            warnings.append(Problem(path, (_TOKEN,), "every user can read this file: chmod 0600"))
    checker = Checker(known, IGNORED)
    config = checker.section(Config, merged)
    if config is not None:
        _check_listeners(config, checker)
    problems += checker.problems
    if config is None or problems:
        raise ConfigError(problems)
    token, source = _token(config, known)
    if config.authentication_token_file is not None:
        files.append(config.authentication_token_file)
    remember(token)
    return Loaded(
        msgspec.structs.replace(config, authentication_token=token),
        (*warnings, *checker.warnings),
        tuple(files),
        source,
    )


def _one_token(table: Table, below: Table, path: Path, problems: list[Problem]) -> None:
    """A token and a token's file exclude each other; the later layer wins whichever it has."""
    if table.get(_TOKEN) and table.get(_TOKEN_FILE):
        problems.append(Problem(path, (_TOKEN_FILE,), f"cannot stand beside {_TOKEN}"))
    elif table.get(_TOKEN):
        below.pop(_TOKEN_FILE, None)
    elif table.get(_TOKEN_FILE):
        below.pop(_TOKEN, None)


def _token(config: Config, known: dict[Key, Path]) -> tuple[str, str]:
    if given := os.environ.get(TOKEN_VARIABLE, "").strip():
        return given, TOKEN_VARIABLE
    path = config.authentication_token_file
    if path is not None:
        key = (_TOKEN_FILE,)
        try:
            token = path.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            text = f"cannot read {path}: {reason}"
            raise ConfigError([Problem(known.get(key), key, text)]) from error
        if not token:
            raise ConfigError([Problem(known.get(key), key, f"{path} is empty")])
        return token, str(path)
    token = config.authentication_token.strip()
    return token, str(known[(_TOKEN,)]) if token else ""


def _check_listeners(config: Config, checker: Checker) -> None:
    for name, listener in config.http.listen.items():
        key = ("http", "listen", name)
        if (listener.cert is None) != (listener.key is None):
            missing = "key" if listener.key is None else "cert"
            checker.wrong((*key, missing), "cert and key go together")
        if listener.auto_cert and not listener.tls:
            checker.odd((*key, "autoCert"), "has no effect without cert and key")
        places = [listener.socket, listener.fd, listener.systemd_socket]
        address = listener.hostname is not None or listener.port is not None
        if sum(place is not None for place in places) + address > 1:
            checker.wrong(key, "set only one of hostname/port, socket, fd, systemdSocket")


def _readable_by_all(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
