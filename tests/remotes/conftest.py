from __future__ import annotations

import contextlib
import secrets
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from moto.server import ThreadedMotoServer

from proxy.formats.encrypted import Algorithm, FileCipher
from proxy.remotes import RemoteOptions, open_remote
from proxy.remotes.bounds import Bounded
from proxy.remotes.encryption import Encrypted
from proxy.remotes.faults import Faults
from proxy.remotes.metrics import Metrics
from proxy.remotes.objects.remote import ObjectRemote
from proxy.remotes.recording import Recording
from proxy.remotes.retry import Retry
from proxy.remotes.wrapper import innermost
from tests.remotes import server as file_server
from tests.remotes.objects.fake_s3 import FakeS3, serving
from tests.remotes.samba import Samba, started, why_not

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from proxy.remotes import Remote
    from tests.azurite import Azurite

OPTIONS = RemoteOptions(disable_file_remotes=False)

# Backends by name: a URL on a fresh directory.
BACKENDS: dict[str, Callable[[pytest.FixtureRequest, Path], str]] = {
    "local": lambda _, root: f"file://{root}",
    "immutable": lambda _, root: f"file://{root}?immutable=true",
    "nfs": lambda _, root: f"nfs://server:{root}",
    "smb-mounted": lambda _, root: (
        "smb://user:pass@DOMAIN\\\\server\\share\0" + str(root).replace("/", "\\")
    ),
    "smb": lambda request, root: served(request).url(root),
    "smb-immutable": lambda request, root: served(request).url(root, query="&immutable=true"),
}
MOUNTED = ("nfs", "smb-mounted")
# Object stores by name: a server of our own that lacks this or that, and moto's.
STORES: dict[str, Callable[[], FakeS3]] = {
    "s3": lambda: FakeS3(page=7),
    "s3-poor": lambda: FakeS3(conditions=False, conditional_delete=False, batches=False),
    "s3-locked": lambda: FakeS3(lock="Enabled"),
}
WRAPPERS: dict[str, Callable[[Remote], Remote]] = {
    "bounds": lambda remote: Bounded(remote, at_once=16, seconds=60),
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
    ("smb-mounted",),
    ("smb",),
    *(("local", name) for name in WRAPPERS),
    ("local", "faults", "retry", "metrics"),
    ("local", "cbc"),
    ("immutable", "chacha"),
    ("local", "recording", "gcm", "faults", "retry", "metrics"),
    *((name,) for name in STORES),
    ("s3", "bounds"),
    ("s3", "gcm"),
    ("nfs", "chacha"),
    ("smb-mounted", "gcm"),
    ("smb", "chacha"),
    ("moto",),
    ("azurite",),
    ("azurite", "chacha"),
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


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of a moto server with a bucket named ``bucket``."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        request = urllib.request.Request(
            f"http://{host}:{port}/bucket",
            method="PUT",
            headers={
                "Authorization": "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request,"
            },
        )
        urllib.request.urlopen(request).close()
        yield f"{host}:{port}"
    finally:
        server.stop()


@pytest.fixture(params=STACKS, ids="+".join)
async def remote(request: pytest.FixtureRequest, root: Path) -> AsyncIterator[Remote]:
    """Every backend and every wrapper, for what holds on all of them."""
    backend, *wrappers = request.param
    options = OPTIONS
    async with contextlib.AsyncExitStack() as stack:
        if backend in MOUNTED:
            options = request.getfixturevalue("server").options
        if backend in STORES:
            fake = await stack.enter_async_context(serving(STORES[backend]()))
            url = fake.url("some dir/é")
        elif backend == "moto":
            moto = request.getfixturevalue("moto")
            url = f"s3+http://key:secretkey@{moto}/bucket/{secrets.token_hex(8)}"
        elif backend == "azurite":
            emulator: Azurite = request.getfixturevalue("azurite")
            url = emulator.url(f"/cont/some dir/é/{secrets.token_hex(8)}")
        else:
            url = BACKENDS[backend](request, root)
        yield await stack.enter_async_context(opened(url, *wrappers, options=options))


def is_flat(remote: Remote) -> bool:
    """Whether the remote is an object store: no empty directories, no name that is refused
    because it is a file or a directory, no bytes before the commit, no change in place."""
    return isinstance(innermost(remote), ObjectRemote)


@pytest.fixture
def flat(remote: Remote) -> bool:
    return is_flat(remote)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[file_server.Server]:
    """A file server that `mount` finds, here by bind mounts; nothing stays mounted."""
    with file_server.serving(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
async def local(root: Path) -> AsyncIterator[Remote]:
    async with opened(f"file://{root}") as built:
        yield built


def tree(root: Path) -> list[str]:
    """Every name below ``root``, hidden ones too."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))
