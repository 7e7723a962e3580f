from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from .mirrors import Stock

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: what is synced here need not last."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path_factory.mktemp("mirror")
        return
    with tempfile.TemporaryDirectory(prefix="xo-proxy-mirror-", dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(memory: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def stock(memory: Path) -> Stock:
    """Made once: what it holds is copied into each test."""
    made = Stock(memory / "stock")
    made.root.mkdir()
    trio.run(made.make)
    return made
