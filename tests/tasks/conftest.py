from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from proxy.runtime.threads import inline_threads
from proxy.tasks import JournalLimits, Tasks, open_tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import trio


@pytest.fixture
def journal_path(tmp_path: Path) -> str:
    return str(tmp_path / "tasks.db")


@pytest.fixture
async def tasks(journal_path: str, nursery: trio.Nursery) -> AsyncIterator[Tasks]:
    """A task room on a virtual clock; the journal is a real file, written in the test's thread."""
    with inline_threads():
        async with open_tasks(journal_path, nursery, JournalLimits(keep=5, keep_deleted=3)) as room:
            yield room
