from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from proxy.remotes import RemoteOptions, open_remote
from proxy.remotes.faults import Faults
from proxy.remotes.metrics import Metrics
from proxy.remotes.recording import Recording
from proxy.remotes.retry import Retry
from tests.remotes.samba import Samba, started, why_not

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from proxy.remotes import Remote

OPTIONS = RemoteOptions(disable_file_remotes=False)

# Backends by name: a URL on a fresh directory.  Object stores join here.
BACKENDS: dict[str, Callable[[pytest.FixtureRequest, Path], str]] = {
    "local": lambda _, root: f"file://{root}",
    "immutable": lambda _, root: f"file://{root}?immutable=true",
    "smb": lambda request, root: served(request).url(root),
    "smb-immutable": lambda request, root: served(request).url(root, query="&immutable=true"),
}
WRAPPERS: dict[str, Callable[[Remote], Remote]] = {
    "retry": Retry,
    "faults": Faults,
    "recording": Recording,
    "metrics": Metrics,
}
STACKS = [
    ("local",),
    ("immutable",),
    ("smb",),
    *(("local", name) for name in WRAPPERS),
    ("local", "faults", "retry", "metrics"),
]


@contextlib.asynccontextmanager
async def opened(url: str, *wrappers: str, **record: Any) -> AsyncIterator[Remote]:
    remote = await open_remote({"url": url, **record}, options=OPTIONS)
    for name in wrappers:
        remote = WRAPPERS[name](remote)
    try:
        yield remote
    finally:
        await remote.aclose()


@pytest.fixture(scope="session")
def samba(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samba]:
    """One server for all tests, whose shares are the folder of all their directories."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with started(tmp_path_factory.getbasetemp()) as server:
        yield server


def served(request: pytest.FixtureRequest) -> Samba:
    server: Samba = request.getfixturevalue("samba")
    return server


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "remote"


@pytest.fixture(params=STACKS, ids="+".join)
async def remote(request: pytest.FixtureRequest, root: Path) -> AsyncIterator[Remote]:
    """Every backend and every wrapper, for what holds on all of them."""
    backend, *wrappers = request.param
    async with opened(BACKENDS[backend](request, root), *wrappers) as built:
        yield built


@pytest.fixture
async def local(root: Path) -> AsyncIterator[Remote]:
    async with opened(f"file://{root}") as built:
        yield built


def tree(root: Path) -> list[str]:
    """Every name below ``root``, hidden ones too."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))
