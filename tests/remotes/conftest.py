from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from proxy.formats.encrypted import Algorithm, FileCipher
from proxy.remotes import RemoteOptions, open_remote
from proxy.remotes.encryption import Encrypted
from proxy.remotes.faults import Faults
from proxy.remotes.metrics import Metrics
from proxy.remotes.recording import Recording
from proxy.remotes.retry import Retry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from proxy.remotes import Remote

OPTIONS = RemoteOptions(disable_file_remotes=False)

# Backends by name: a URL on a fresh directory.  Object stores join here.
BACKENDS: dict[str, Callable[[Path], str]] = {
    "local": lambda root: f"file://{root}",
    "immutable": lambda root: f"file://{root}?immutable=true",
}
WRAPPERS: dict[str, Callable[[Remote], Remote]] = {
    "retry": Retry,
    "faults": Faults,
    "recording": Recording,
    "metrics": Metrics,
}
KEY = "0123456789abcdef0123456789abcdef"
ENCRYPTIONS: dict[str, Callable[[Remote], Remote]] = {
    "chacha": lambda inner: Encrypted(inner, FileCipher(Algorithm.CHACHA20_POLY1305, KEY)),
    "gcm": lambda inner: Encrypted(inner, FileCipher(Algorithm.AES_256_GCM, KEY)),
    "cbc": lambda inner: Encrypted(inner, FileCipher(Algorithm.AES_256_CBC, KEY)),
}
STACKS = [
    ("local",),
    ("immutable",),
    *(("local", name) for name in WRAPPERS),
    ("local", "faults", "retry", "metrics"),
    ("local", "cbc"),
    ("immutable", "chacha"),
    ("local", "recording", "gcm", "faults", "retry", "metrics"),
]


@contextlib.asynccontextmanager
async def opened(url: str, *wrappers: str, **record: Any) -> AsyncIterator[Remote]:
    remote = await open_remote({"url": url, **record}, options=OPTIONS)
    for name in wrappers:
        remote = (WRAPPERS | ENCRYPTIONS)[name](remote)
    try:
        yield remote
    finally:
        await remote.aclose()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "remote"


@pytest.fixture(params=STACKS, ids="+".join)
async def remote(request: pytest.FixtureRequest, root: Path) -> AsyncIterator[Remote]:
    """Every backend and every wrapper, for what holds on all of them."""
    backend, *wrappers = request.param
    async with opened(BACKENDS[backend](root), *wrappers) as built:
        yield built


@pytest.fixture
async def local(root: Path) -> AsyncIterator[Remote]:
    async with opened(f"file://{root}") as built:
        yield built


def tree(root: Path) -> list[str]:
    """Every name below ``root``, hidden ones too."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))
