"""Does a remote work, and how fast: what ``remote.test`` does."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import Conflict, Corrupt, ProxyError
from proxy.runtime.deadlines import undo_within
from proxy.runtime.secrets import scrub_text
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from proxy.remotes.interface import Remote

TEST_SIZE = 10 * 1024 * 1024
_UNDO_SECONDS = 10


async def test_remote(opening: AbstractAsyncContextManager[Remote]) -> dict[str, Any]:
    """Open the remote, write 10 MiB of random bytes, read them back, remove them.

    ``{success: True, writeRate, readRate}`` in bytes per second, the write up to the disk; or
    ``{success: False, error}`` when it cannot be opened, with ``step`` (``write``, ``read``,
    ``unlink``) and ``file`` when a step fails.  ``error`` is the message itself: upstream
    answers an empty object there.  Only a cancel or a bug raises; the file is removed on a
    cancel too.
    """
    try:
        async with opening as remote:
            return await _measure(remote)
    except ProxyError as error:
        return {"success": False, "error": scrub_text(error.message)}


async def _measure(remote: Remote) -> dict[str, Any]:
    path = f"/{time.time_ns() // 1_000_000}.test"
    data = await in_thread(Work.CPU, os.urandom, TEST_SIZE)
    step = "write"
    try:
        try:
            started = trio.current_time()
            await remote.write_file(path, data, exclusive=True)
            write_rate = TEST_SIZE / _elapsed(started)
            step = "read"
            started = trio.current_time()
            content = await remote.read_file(path, limit=TEST_SIZE)
            read_rate = TEST_SIZE / _elapsed(started)
            if content != data:
                raise Corrupt("output and input did not match", data={"path": path})
        except Conflict:
            raise  # another test's file: not ours to remove
        except BaseException as error:
            try:
                await _remove(remote, path)
            except ProxyError as undo:
                error.add_note(f"and the test file is left behind: {undo.message}")
            raise
        step = "unlink"
        await _remove(remote, path)
    except ProxyError as error:
        text = ", ".join([error.message, *getattr(error, "__notes__", [])])
        return {"success": False, "step": step, "file": path, "error": scrub_text(text)}
    return {"success": True, "writeRate": write_rate, "readRate": read_rate}


async def _remove(remote: Remote, path: str) -> None:
    with undo_within(f"removing '{path}'", _UNDO_SECONDS):
        await remote.unlink(path)


def _elapsed(started: float) -> float:
    return max(trio.current_time() - started, 1e-6)
