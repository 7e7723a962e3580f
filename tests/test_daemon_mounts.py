"""The real daemon with NFS remotes: `mount` is a program of the tests, mounts are real."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from proxy.cli.failures import Failure
from tests.remotes.server import Server, serving
from tests.test_daemon import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def lab(server: Server, tmp_path: Path) -> Iterator[Lab]:
    """Its daemons end before the server does."""
    del server
    with contextlib.ExitStack() as ending:
        yield Lab(tmp_path, ending)


def remote(server: Server, name: str = "r1", **record: Any) -> dict[str, Any]:
    return {"remote": {"id": name, "url": server.url, **record}}


def test_what_is_mounted_is_unmounted_at_the_stop(lab: Lab, server: Server) -> None:
    daemon, client = lab.daemon(lab.config(remoteOptions={"mountsDir": str(server.mounts)}))
    assert client.scalar("remote.getInfo", remote(server))["size"] > 0
    assert client.scalar("remote.test", remote(server))["success"] is True
    assert server.mounted() == ["r1"]
    assert len(server.calls()) == 1
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0, daemon.log()
    assert server.mounted() == []


def test_what_a_killed_daemon_left_mounted_is_replaced_by_the_next(
    lab: Lab, server: Server
) -> None:
    config = lab.config(remoteOptions={"mountsDir": str(server.mounts)})
    daemon, client = lab.daemon(config)
    client.scalar("remote.ping", remote(server))
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    assert server.mounted() == ["r1"]
    daemon, client = lab.daemon(config)
    client.scalar("remote.ping", remote(server))
    assert server.mounted() == ["r1"]
    assert len(server.calls()) == 2
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0, daemon.log()
    assert server.mounted() == []


@pytest.mark.skipif(
    shutil.which("bindfs") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK),
    reason="bindfs or /dev/fuse is missing",
)
def test_a_hung_mount_holds_neither_the_daemon_nor_its_stop(lab: Lab, server: Server) -> None:
    options = {"mountsDir": str(server.mounts), "timeout": "1s"}
    daemon, client = lab.daemon(lab.config(remoteOptions=options))
    server.hang_on_demand()
    client.scalar("remote.ping", remote(server))
    server.behave("")
    os.kill(server.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(Failure, match=r"ETIMEDOUT|does not answer"):
            client.scalar("remote.getInfo", remote(server))
        assert time.monotonic() - started < 5  # Xen Orchestra waits no longer
        assert client.scalar("remote.ping", remote(server, "other", url=f"{server.url}/other"))
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(40) == 0, daemon.log()
        assert server.mounted() == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGKILL)
