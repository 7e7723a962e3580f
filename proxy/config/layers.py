"""Which files count, and how one is laid over the other."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from proxy.config.check import ConfigError, Key, Problem

APP = "xo-proxy"
VENDOR = Path(__file__).resolve().parent.parent / "vendor.toml"
"""Package data, so that it is found in a checkout and in an installed wheel alike."""
AUTO = "z-auto.json"
"""Written by the daemon itself; sorts last in its directory, hence wins there."""

Table = dict[str, Any]


def _user_directory() -> Path:
    given = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".config"
    return base / APP


@dataclass(frozen=True, slots=True)
class Places:
    """Where files are looked for; tests point it at a temporary directory."""

    vendor: Path = VENDOR
    system: Path = Path("/etc") / APP
    user: Path = field(default_factory=_user_directory)
    current: Path | None = field(default_factory=Path.cwd)
    """``None``: no ``.xo-proxy.*`` files."""
    explicit: tuple[Path, ...] = ()
    """The files of ``--config``, which must exist."""

    @property
    def auto(self) -> Path:
        """Where the daemon keeps what a client made it change (the token).

        Beside the last ``--config`` file, under its stem, when there is one: two daemons on
        one machine must not share it, and it must win over that file.
        """
        if self.explicit:
            return _auto_beside(self.explicit[-1])
        return self.user / f"config.{AUTO}"

    def files(self) -> list[Path]:
        """Existing files in the order in which they are laid over each other."""
        found = [self.vendor]
        for directory in (self.system, self.user):
            found += sorted(directory.glob("config.*"))
        if self.current is not None:
            for directory in reversed([self.current, *self.current.parents]):
                found += sorted(directory.glob(f".{APP}.*"))
        for path in self.explicit:
            found.append(path)
            beside = _auto_beside(path)
            if beside.exists():
                found.append(beside)
        return found


def _auto_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.{AUTO}")


READABLE = (".toml", ".json")


def read(path: Path) -> Table:
    """Parse one file; relative paths in it become absolute.

    Raises :class:`ConfigError` when it cannot be read or parsed.
    """
    try:
        text = path.read_text("utf-8")
        parsed: object = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError([Problem(path, (), (error.strerror or str(error)).lower())]) from error
    except (ValueError, RecursionError) as error:  # JSON, TOML and UTF-8 errors alike
        raise ConfigError([Problem(path, (), f"cannot be parsed: {error}")]) from error
    if not isinstance(parsed, dict):
        raise ConfigError([Problem(path, (), "must hold a table at the top")])
    return cast("Table", _with_paths(parsed, path.resolve().parent))


def _with_paths(value: Any, directory: Path) -> Any:
    if isinstance(value, str):
        if value.startswith(("./", "../")):
            return os.path.normpath(directory / value)
        if value.startswith("~/"):
            return str(Path.home() / value[2:])
        return value
    if isinstance(value, dict):
        table = cast("Table", value)
        return {key: _with_paths(item, directory) for key, item in table.items()}
    if isinstance(value, list):
        items = cast("list[object]", value)
        return [_with_paths(item, directory) for item in items]
    return value


def merge(base: Any, over: Any) -> Any:
    """``over`` laid over ``base``: tables by key, arrays by index, anything else replaces.

    A shorter array does not shorten a longer one, as in Xen Orchestra.  Neither argument is
    changed.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(cast("Table", base))
        for key, item in cast("Table", over).items():
            merged[key] = merge(merged[key], item) if key in merged else item
        return merged
    if isinstance(base, list) and isinstance(over, list):
        lower, upper = cast("list[object]", base), cast("list[object]", over)
        both = [merge(old, new) for old, new in zip(lower, upper, strict=False)]
        return both + lower[len(both) :] + upper[len(both) :]
    return over


def origins(table: Table, path: Path, known: dict[Key, Path], prefix: Key = ()) -> None:
    """Note in ``known`` that ``path`` is the last file that set each key of ``table``."""
    for name, value in table.items():
        key = (*prefix, name)
        known[key] = path
        if isinstance(value, dict):
            origins(cast("Table", value), path, known, key)
