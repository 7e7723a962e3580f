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
from tests.remotes.server import Server, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from proxy.remotes import Remote

OPTIONS = RemoteOptions(disable_file_remotes=False)

# Backends by name: a URL on a fresh directory.  Object stores join here.
BACKENDS: dict[str, Callable[[Path], str]] = {
    "local": lambda root: f"file://{root}",
    "immutable": lambda root: f"file://{root}?immutable=true",
    "nfs": lambda root: f"nfs://server:{root}",
    "smb": lambda root: "smb://user:pass@DOMAIN\\\\server\\share\0" + str(root).replace("/", "\\"),
}
MOUNTED = ("nfs", "smb")
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
    ("nfs",),
    ("smb",),
    *(("local", name) for name in WRAPPERS),
    ("local", "faults", "retry", "metrics"),
    ("local", "cbc"),
    ("immutable", "chacha"),
    ("local", "recording", "gcm", "faults", "retry", "metrics"),
]


@contextlib.asynccontextmanager
async def opened(
    url: str, *wrappers: str, options: RemoteOptions = OPTIONS, **record: Any
) -> AsyncIterator[Remote]:
    remote = await open_remote({"url": url, **record}, options=options)
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
    options = OPTIONS
    if backend in MOUNTED:
        options = request.getfixturevalue("server").options
    async with opened(BACKENDS[backend](root), *wrappers, options=options) as built:
        yield built


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A file server that `mount` finds, here by bind mounts; nothing stays mounted."""
    with serving(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
async def local(root: Path) -> AsyncIterator[Remote]:
    async with opened(f"file://{root}") as built:
        yield built


def tree(root: Path) -> list[str]:
    """Every name below ``root``, hidden ones too."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))
