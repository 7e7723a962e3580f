"""A store that is not there: how long it takes until somebody is told, and what."""

from __future__ import annotations

import socket

import pytest
import trio

from proxy.errors import Unreachable
from proxy.remotes import open_remote
from proxy.remotes.objects.retrying import OPENING_SECONDS, RetryingStore
from proxy.runtime import transport
from proxy.runtime.deadlines import deadline
from tests.remotes.conftest import OPTIONS
from tests.remotes.objects.memory import MemoryStore

URLS = {
    "s3": "s3+http://key:secret@127.0.0.1:{port}/bucket",
    "azure": "azurite+http://account:c2VjcmV0@127.0.0.1:{port}/container",
}


async def seconds_to(url: str) -> tuple[float, Unreachable]:
    began = trio.current_time()
    with pytest.raises(Unreachable) as caught:
        await open_remote({"url": url}, options=OPTIONS)
    return trio.current_time() - began, caught.value


@pytest.mark.virtual_clock
@pytest.mark.parametrize("kind", URLS)
async def test_a_host_that_refuses_is_told_within_five_seconds(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    async def refuse(*_: object, **__: object) -> None:
        tries.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        raise Unreachable("ECONNREFUSED: host:1: connection refused", code="ECONNREFUSED")

    monkeypatch.setattr(transport, "connect", refuse)
    seconds, error = await seconds_to(URLS[kind].format(port=1))
    assert seconds <= OPENING_SECONDS == 5
    assert len(tries) >= 5, "a server that is being started again is waited for a little"
    assert error.code == "ECONNREFUSED"
    assert error.data["part"] == "host"
    assert "secret" not in f"{error.message} {error.data}"


@pytest.mark.virtual_clock
@pytest.mark.parametrize("kind", URLS)
async def test_a_host_that_swallows_everything_is_told_after_ten_seconds(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def swallow(host: str, port: int, *, seconds: float, **_: object) -> None:
        with deadline(f"connection to {host}:{port}", seconds):
            await trio.sleep_forever()

    monkeypatch.setattr(transport, "connect", swallow)
    seconds, error = await seconds_to(URLS[kind].format(port=1))
    assert seconds == 10
    assert (error.code, error.data["part"]) == ("ETIMEDOUT", "host")
    assert "connection to 127.0.0.1:1: nothing happened for 10 s" in error.message


@pytest.mark.parametrize("kind", URLS)
async def test_a_port_that_is_closed(kind: str, quick: None) -> None:
    del quick
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        port = taken.getsockname()[1]
        _, error = await seconds_to(URLS[kind].format(port=port))
    assert (error.code, error.data["part"]) == ("ECONNREFUSED", "host")
    assert f"127.0.0.1:{port}" in error.message


@pytest.mark.virtual_clock
async def test_work_under_way_has_more_patience_than_an_opening() -> None:
    store = RetryingStore(MemoryStore())
    times: dict[float, list[float]] = {}
    for seconds in (OPENING_SECONDS, float("inf")):
        began = trio.current_time()
        found = times.setdefault(seconds, [])

        async def fail(_: int, found: list[float] = found, began: float = began) -> None:
            found.append(trio.current_time() - began)
            await trio.lowlevel.checkpoint()
            raise Unreachable("gone", code="ECONNRESET")

        with pytest.raises(Unreachable):
            await store.again(fail, seconds=seconds)
    short, long = times.values()
    assert short[-1] <= OPENING_SECONDS
    assert len(long) == 7
    assert long[-1] > 7
