"""Log records of one run, in the shapes that XO's log consumer understands.

Every record has ``id``, ``timestamp`` (ms) and ``type``; ``parentId`` stands only on the
``start`` of a subtask.  Key order is upstream's.  XO drops a log whose records break one of
these rules, so they are kept here and nowhere else: a parent starts before its children, a
child starts before its parent ends, and nothing follows an ``end``.
"""

from __future__ import annotations

import secrets
import traceback
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

import msgspec
import trio

from proxy.errors import Many, ProxyError
from proxy.runtime.secrets import scrub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_STACK_FRAMES = 12

_PROGRESS = b'{"name":"progress"'

_encode = msgspec.json.Encoder().encode


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, rest = divmod(number, 36)
        digits = _DIGITS[rest] + digits
    return digits or "0"


def new_id(now_ms: int) -> str:
    """An id that sorts by time: ``0mwtyqiby-zc9088fvo2f``."""
    return f"{_base36(now_ms).rjust(9, '0')}-{_base36(secrets.randbits(56))}"


def describe_error(error: BaseException) -> dict[str, Any]:
    """An exception as XO shows it: ``message``, ``name``, ``code``, ``stack``, its data.

    Free of secrets and of the appliance's own paths.
    """
    if isinstance(error, ProxyError):
        message, code, data = error.message, error.code, error.data
    else:
        message, code, data = str(error) or type(error).__name__, None, {}
    described: dict[str, Any] = {**data, "message": message, "name": type(error).__name__}
    if code is not None:
        described["code"] = code
    inner: list[BaseException] = []
    if isinstance(error, Many):
        inner = error.errors
    elif isinstance(error, BaseExceptionGroup):
        inner = list(cast("BaseExceptionGroup[BaseException]", error).exceptions)
    if inner:
        described["errors"] = [describe_error(one) for one in inner]
    if error.__cause__ is not None:
        described["cause"] = {
            "message": str(error.__cause__) or type(error.__cause__).__name__,
            "name": type(error.__cause__).__name__,
        }
    described["stack"] = _stack(error, message)  # pyright: ignore[reportUnknownArgumentType]
    return _plain(scrub(described))


def _stack(error: BaseException, message: str) -> str:
    lines = [f"{type(error).__name__}: {message}"]
    for frame in reversed(traceback.extract_tb(error.__traceback__)[-_STACK_FRAMES:]):
        file = "/".join(PurePath(frame.filename).parts[-3:])
        lines.append(f"    at {frame.name} ({file}:{frame.lineno})")
    return "\n".join(lines)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Turn what JSON cannot hold into text: a log must never fail for its content."""
    plain: dict[str, Any] = msgspec.to_builtins(value, enc_hook=str, str_keys=True)
    return plain


class RunLog:
    """The records of one root task, in memory while it runs.

    Any number of watchers read it, each at its own pace and from the beginning; a slow or
    vanished watcher costs an index.  Progress is not stored: a watcher gets the latest value
    of each task when it reads, and the final one comes as a record.
    """

    def __init__(self) -> None:
        self._records: list[bytes] = []
        self._progress: dict[str, bytes] = {}
        self._changed = trio.Event()
        self.ended = False

    def append(self, record: Mapping[str, Any], *, result: Any = None) -> None:
        """Add one record, scrubbed.  After the root's end nothing is accepted.

        ``result``, where given, takes the place of the record's as it is, not scrubbed.
        """
        assert not self.ended, "a record after the root's end"
        task = record["id"]
        if record["type"] == "end":
            last = self._progress.pop(task, None)
            if last is not None:
                self._records.append(last)
        plain = _plain(scrub(dict(record)))
        if result is not None:
            plain["result"] = result
        self._records.append(_encode(plain))
        self._notify()

    def set_progress(self, task: str, percent: int, timestamp: int) -> None:
        """Remember the latest percentage of ``task``."""
        self._progress[task] = _encode(
            {
                "name": "progress",
                "value": percent,
                "id": task,
                "timestamp": timestamp,
                "type": "property",
            }
        )
        self._notify()

    def close(self) -> None:
        """The root has ended: watchers end when they have read everything."""
        self.ended = True
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def watch(self) -> AsyncIterator[bytes]:
        """Every record as encoded JSON, then the end.  Cancel it at any point."""
        position = 0
        seen: dict[str, bytes] = {}
        while True:
            changed = self._changed
            while position < len(self._records):
                record = self._records[position]
                position += 1
                if record.startswith(_PROGRESS) and any(record is one for one in seen.values()):
                    continue  # the last value, already given when it was new
                yield record
            for task, progress in list(self._progress.items()):
                if seen.get(task) is not progress:
                    seen[task] = progress
                    # records that came while a slow client took the last one go first: one
                    # of them may be this task's end
                    if position < len(self._records):
                        break
                    yield progress
            if position < len(self._records):
                continue
            if self.ended:
                return
            if changed is self._changed:
                await changed.wait()
