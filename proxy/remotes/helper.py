"""Runs ``mount``, ``umount`` and the probe of a mount: programs that may hang, and are killed.

A call that hangs in the kernel holds its process, never the daemon.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

from proxy.errors import Refused, Unreachable
from proxy.runtime.background import background

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_log = structlog.get_logger("proxy.remotes")

_LONGEST_OUTPUT = 64 * 1024
_KILL_SECONDS = 2.0
_LAST_WORDS_SECONDS = 0.5

_undead: list[trio.Process] = []
"""Killed, but still in a call that the kernel does not interrupt."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``text`` is what it wrote on both outputs, at most 64 KiB."""

    code: int
    text: str


async def run_helper(
    command: Sequence[str], environment: Mapping[str, str], *, seconds: float, what: str
) -> Answer:
    """Run ``command`` to its end.

    After ``seconds`` (0: never) it is killed with all that it started: ``Unreachable``
    (``ETIMEDOUT``) for ``what``; on cancel too.  What it did until then is for the caller to
    find out.  ``Refused`` when there is no such program.
    """
    _undead[:] = [process for process in _undead if process.poll() is None]
    try:
        process = await trio.lowlevel.open_process(
            list(command),
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise Refused(
            f"ENOENT: '{command[0]}' cannot be run: {error.strerror}",
            code="EMOUNTHELPER",
            data={"program": command[0]},
        ) from error
    text = bytearray()
    try:
        with trio.move_on_after(seconds or float("inf")) as scope:
            async with background() as nursery:
                read = trio.Event()
                nursery.start_soon(_read, process, text, read)
                await process.wait()
                # a daemon that it started may keep the pipe open for good
                with trio.move_on_after(_LAST_WORDS_SECONDS):
                    await read.wait()
    finally:
        if process.returncode is None:
            await _kill(process, what)
        if process.stdout is not None:
            with trio.CancelScope(shield=True):
                await process.stdout.aclose()
    if scope.cancelled_caught:
        raise Unreachable(
            f"ETIMEDOUT: {what}: no answer within {seconds:g} s",
            code="ETIMEDOUT",
            data={"seconds": seconds},
        )
    return Answer(process.returncode or 0, text.decode(errors="replace"))


async def _read(process: trio.Process, text: bytearray, ended: trio.Event) -> None:
    assert process.stdout is not None, "opened with a pipe"
    async for piece in process.stdout:
        text += piece[: _LONGEST_OUTPUT - len(text)]
    ended.set()


async def _kill(process: trio.Process, what: str) -> None:
    # The whole session: mount waits for mount.nfs.  What sudo started may not be ours to kill.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with trio.move_on_after(_KILL_SECONDS, shield=True):
        await process.wait()
    if process.returncode is None:
        _undead.append(process)
        _log.warning("a helper cannot be killed", doing=what, pid=process.pid)
