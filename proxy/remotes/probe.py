"""Does a remote work, and how fast: what ``remote.test`` does."""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused
from proxy.remotes.wrapper import capabilities_of
from proxy.runtime.deadlines import undo_within
from proxy.runtime.secrets import scrub, scrub_text
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from proxy.remotes.interface import Remote

TEST_SIZE = 10 * 1024 * 1024
_UNDO_SECONDS = 10
_TEST_IS_DEAD = 3600.0
"""Seconds; Xen Orchestra gives a test up after one minute."""
_ENCRYPTION = 64
"""Bytes that encryption may add."""
_LEFTOVER = re.compile(r"([0-9]{13})\.test")


async def test_remote(opening: AbstractAsyncContextManager[Remote]) -> dict[str, Any]:
    """Open the remote, write 10 MiB of random bytes, read them back, remove them.

    ``{success: True, writeRate, readRate}`` in bytes per second, the write up to the disk; or
    ``{success: False, error}`` when it cannot be opened, with ``step`` (``write``, ``read``,
    ``unlink``) and ``file`` when a step fails.  ``error`` is the message itself: upstream
    answers an empty object there.  Only a cancel or a bug raises; the file is removed on a
    cancel too.  ``capabilities`` are what the remote says of itself (object stores do);
    ``warnings`` tell what is no failure, such as an immutable remote that keeps the file.

    The bytes go the way of a backup's: on an encrypted remote they are encrypted, and writing
    them takes the temporary name and the rename of every metadata file.  A file that a killed test
    left behind is removed by a later one.
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
        warnings = await _end(remote, path)
    except ProxyError as error:
        text = ", ".join([error.message, *getattr(error, "__notes__", [])])
        return {"success": False, "step": step, "file": path, "error": scrub_text(text)}
    result: dict[str, Any] = {"success": True, "writeRate": write_rate, "readRate": read_rate}
    try:
        capabilities = await capabilities_of(remote)
    except ProxyError as error:
        warnings.append(f"it could not be asked what it can do: {scrub_text(error.message)}")
    else:
        if capabilities:
            result["capabilities"] = scrub(dict(capabilities))
    if warnings:
        result["warnings"] = warnings
    return result


async def _end(remote: Remote, path: str) -> list[str]:
    """Remove the file, and those of earlier tests; what stands in the way but is no failure."""
    try:
        await _remove(remote, path)
    except Refused as error:
        if not remote.is_immutable:
            raise
        return [f"the test file stays, as on an immutable remote: {scrub_text(error.message)}"]
    try:
        await _remove_leftovers(remote)
    except ProxyError as error:
        return [f"what an earlier test left could not be removed: {scrub_text(error.message)}"]
    return []


async def _remove_leftovers(remote: Remote) -> None:
    """Test files of ours or of Xen Orchestra whose test cannot be alive any more.

    By name, size and both times: of the name, which is its writer's clock, and of the file, which
    is the storage's.
    """
    oldest = time.time() - _TEST_IS_DEAD
    for entry in await remote.list("/"):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or entry.is_dir or int(match[1]) / 1000 > oldest:
            continue
        with contextlib.suppress(NotFound):
            found = await remote.stat(entry.name)
            if found.mtime <= oldest and found.size <= TEST_SIZE + _ENCRYPTION:
                await _remove(remote, f"/{entry.name}")


async def _remove(remote: Remote, path: str) -> None:
    with undo_within(f"removing '{path}'", _UNDO_SECONDS):
        await remote.unlink(path)


def _elapsed(started: float) -> float:
    return max(trio.current_time() - started, 1e-6)
