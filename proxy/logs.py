"""The daemon's log: one line an event on standard error, without secrets.

A logger's name is its module (``structlog.get_logger("proxy.xapi.session")``).  The level of
the configuration applies to all; names that match ``logs.filter`` or the environment
variable ``DEBUG`` pass at every level.  Standard output is left to the program.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO, cast

import msgspec
import structlog

from proxy.runtime.secrets import scrub, scrub_text

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

    from proxy.config import LogsConfig

_LEVELS = {
    "debug": 10,
    "info": 20,
    "msg": 20,
    "warn": 30,
    "warning": 30,
    "error": 40,
    "exception": 40,
    "fatal": 50,
    "critical": 50,
}
_SHOWN = {10: "debug", 20: "info", 30: "warn", 40: "error", 50: "fatal"}
REPEAT_AFTER = 600.0
"""Seconds after which an event that repeats itself is shown again, with its count."""
_LONGEST = 8192
"""Characters of one value: a peer's answer must not fill the disk."""


class Named:
    """What structlog calls a logger: here only the name that filters match."""

    def __init__(self, name: str = "proxy") -> None:
        self.name = name


class Log:
    """Filters, scrubs and writes events.  Thread-safe; changed in place on reload."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._level = _LEVELS["info"]
        self._patterns: list[str] = []
        self._json = False
        self._lock = threading.Lock()
        self._last: EventDict = {}
        self._hidden = 0
        self._shown_at = 0.0

    def set(self, config: LogsConfig) -> None:
        self._level = _LEVELS[config.level]
        debug = os.environ.get("DEBUG", "").replace(",", " ").split()
        self._patterns = [*config.patterns, *debug]
        self._json = config.format == "json"

    def passes(self, name: str, level: int) -> bool:
        return level >= self._level or any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns
        )

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        """Structlog's last processor: writes, and tells structlog that nothing is left."""
        name = logger.name if isinstance(logger, Named) else "proxy"
        self.emit(name, _LEVELS.get(method, 20), dict(event))
        raise structlog.DropEvent

    def emit(self, name: str, level: int, event: EventDict) -> None:
        """Write one event unless it is filtered or repeats its neighbour.

        A standard error that is closed or full loses the line, never the daemon.
        """
        if not self.passes(name, level):
            return
        trace = _trace(event.pop("exc_info", None))
        record: EventDict = {"level": _SHOWN[level], "name": name, "event": event.pop("event", "")}
        record.update({key: _value(item) for key, item in event.items()})
        record = scrub(record)
        if trace:
            record["trace"] = scrub_text(trace)
        now = time.monotonic()
        with self._lock:
            if record == self._last and now - self._shown_at < REPEAT_AFTER:
                self._hidden += 1
                return
            text = ""
            if self._hidden:
                hidden: EventDict = {"event": "the same event was hidden", "times": self._hidden}
                text = self._line({**{k: self._last[k] for k in ("level", "name")}, **hidden})
            try:
                stream = self._stream or sys.stderr
                stream.write(text + self._line(record))
                stream.flush()
            except (OSError, ValueError):
                return
            self._last, self._hidden, self._shown_at = record, 0, now

    def _line(self, record: EventDict) -> str:
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._json:
            return msgspec.json.encode({"time": stamp, **record}, enc_hook=str).decode() + "\n"
        rest = dict(record)
        head = f"{stamp} {rest.pop('level').upper():5} {rest.pop('name')}: "
        trace = rest.pop("trace", "")
        words = [_one_line(str(rest.pop("event")))]
        words += [f"{key}={_shown(value)}" for key, value in rest.items()]
        lines = [head + " ".join(words), *(f"    {line}" for line in trace.splitlines())]
        return "\n".join(lines) + "\n"


class _FromStdlib(logging.Handler):
    """Libraries log through :mod:`logging`; their lines go the same way."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = max((known for known in _SHOWN if known <= record.levelno), default=10)
        event: EventDict = {"event": record.getMessage()}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        self._log.emit(record.name, level, event)


def set_up(config: LogsConfig, stream: TextIO | None = None) -> Log:
    """Make structlog and :mod:`logging` write to ``stream`` (default: standard error).

    Call ``set`` on what it returns when the configuration changes.
    """
    log = Log(stream)
    log.set(config)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, log],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        logger_factory=Named,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_FromStdlib(log)]
    root.setLevel(logging.DEBUG)
    # Their debug lines show request lines and headers, with cookies and session ids.
    for chatty in ("httpx", "httpcore", "hpack", "h2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    return log


def _trace(given: object) -> str:
    """The traceback that ``exc_info`` (an exception, a triple or true) means; '' for none."""
    error: object = given
    if isinstance(given, tuple):
        error = cast("tuple[object, ...]", given)[1]
    elif given and not isinstance(given, BaseException):
        error = sys.exc_info()[1]
    if not isinstance(error, BaseException):
        return ""
    return "".join(traceback.format_exception(error))


def _value(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else value[:_LONGEST] + "…"
    if isinstance(value, dict | list | tuple):
        return value  # pyright: ignore[reportUnknownVariableType] - scrubbed as JSON
    return str(value)[:_LONGEST]


def _shown(value: object) -> str:
    if isinstance(value, str):
        quoted = not value or any(letter in value for letter in ' "=\n\r\t')
        return _one_line(f'"{value}"' if quoted else value)
    try:
        return _one_line(msgspec.json.encode(value, enc_hook=str).decode())
    except (TypeError, ValueError, RecursionError):
        return _one_line(str(value))


def _one_line(text: str) -> str:
    """Keep an event on its line: a peer's text must not forge another one."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
