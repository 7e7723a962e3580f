"""Files that really cannot be changed, as the immutability daemon of a storage makes them."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _chattr(*words: str | Path) -> str:
    """Its complaint, empty when it worked."""
    try:
        done = subprocess.run(["chattr", *words], capture_output=True, check=False, text=True)
    except FileNotFoundError:
        return "there is no chattr"
    return done.stderr if done.returncode else ""


@contextlib.contextmanager
def protection(below: Path) -> Iterator[Callable[..., None]]:
    """``protect(path, ..., on=True)`` switches ``chattr +i``; all is lifted at the end.

    Skips the test where the effect does not come: no rights, or a file system without the notion.
    """
    probe = below / "protection-probe"
    probe.touch()
    try:
        trouble = _chattr("+i", probe)
        try:
            with probe.open("r+b"):
                trouble = trouble or "chattr +i has no effect here"
        except PermissionError:
            pass
        if trouble:
            pytest.skip(f"files cannot be made immutable: {trouble}")

        def protect(*paths: Path, on: bool = True) -> None:
            assert _chattr("+i" if on else "-i", "-R", *paths) == ""

        yield protect
    finally:
        _chattr("-R", "-i", below)
        probe.unlink()
