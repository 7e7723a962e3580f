from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.remotes import open_remote
from proxy.remotes.objects import retrying
from proxy.remotes.objects.remote import ObjectRemote
from tests.remotes.conftest import OPTIONS
from tests.remotes.objects.fake_s3 import FakeS3, serving

TRIES = 3
"""Of one request in these tests."""


@asynccontextmanager
async def opened_s3(
    query: str = "", prefix: str = "dir", **server: Any
) -> AsyncIterator[tuple[ObjectRemote, FakeS3]]:
    """A remote on a server of our own; what the opening asked for is forgotten."""
    async with serving(FakeS3(**server)) as fake:
        remote = await open_remote({"url": fake.url(prefix, query)}, options=OPTIONS)
        assert isinstance(remote, ObjectRemote)
        fake.log.clear()
        try:
            yield remote, fake
        finally:
            await remote.aclose()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries wait for a moment only."""
    waits = (0.01,) * (TRIES - 1)
    monkeypatch.setattr(retrying.RetryingStore.__init__, "__kwdefaults__", {"waits": waits})
