from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from proxy.systemd import Notifier, passed_socket


@pytest.fixture
def manager() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


@pytest.mark.parametrize("abstract", [False, True])
def test_words_reach_the_manager(manager: socket.socket, tmp_path: Path, abstract: bool) -> None:
    name = f"@xo-proxy-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with manager:
        manager.bind(f"\0{name[1:]}" if abstract else name)
        Notifier({"NOTIFY_SOCKET": name}).tell(READY=1, STATUS="serving")
        assert manager.recv(100) == b"READY=1\nSTATUS=serving"


def test_a_manager_that_went_away_is_no_failure(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell(READY=1)
    Notifier({}).tell(READY=1)


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
        ({}, 0),
    ],
)
def test_the_watchdog_is_fed_at_half_its_interval(
    environment: dict[str, str], seconds: float
) -> None:
    assert Notifier(environment).watchdog_interval == seconds


async def test_signs_of_life_come_in_time(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    notifier = Notifier({"WATCHDOG_USEC": "60000000"})
    told: list[float] = []
    monkeypatch.setattr(notifier, "tell", lambda **_: told.append(trio.current_time()))
    start = trio.current_time()
    with trio.move_on_after(100):
        await notifier.keep_alive()
    assert [round(at - start) for at in told] == [0, 30, 60, 90]


def test_sockets_are_ours_only_when_they_were_meant_for_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert [passed_socket(index) for index in (0, 1, 2)] == [3, 4, None]
    monkeypatch.setenv("LISTEN_PID", "1")
    assert passed_socket(0) is None
