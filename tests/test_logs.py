from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from proxy import logs
from proxy.config import LogsConfig
from proxy.runtime.secrets import remember


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    monkeypatch.delenv("DEBUG", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield io.StringIO()
    root.handlers, root.level = handlers, level
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def lines(out: io.StringIO) -> list[str]:
    """Without the time, which comes first."""
    return [line.partition(" ")[2] for line in out.getvalue().splitlines()]


def test_one_line_an_event(out: io.StringIO) -> None:
    logs.set_up(LogsConfig(), out)
    structlog.get_logger("proxy.jobs").info("run started", job="j1", vms=3, name_label="my VM")
    assert lines(out) == ['INFO  proxy.jobs: run started job=j1 vms=3 name_label="my VM"']


def test_json_lines_hold_the_values(out: io.StringIO) -> None:
    logs.set_up(LogsConfig(format="json"), out)
    structlog.get_logger("proxy.jobs").warning("slow", seconds=1.5, at={"vm": "x"})
    event = json.loads(out.getvalue())
    del event["time"]
    assert event == {
        "level": "warn",
        "name": "proxy.jobs",
        "event": "slow",
        "seconds": 1.5,
        "at": {"vm": "x"},
    }


def test_levels_and_filters(out: io.StringIO) -> None:
    log = logs.set_up(LogsConfig(level="warn", filter="proxy.xapi.*"), out)
    structlog.get_logger("proxy.jobs").info("not shown")
    structlog.get_logger("proxy.xapi.session").debug("shown")
    log.set(LogsConfig(level="error"))
    structlog.get_logger("proxy.xapi.session").warning("not shown any more")
    assert lines(out) == ["DEBUG proxy.xapi.session: shown"]


def test_debug_in_the_environment_is_a_filter(
    out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEBUG", "proxy.rpc*,x")
    logs.set_up(LogsConfig(level="fatal"), out)
    structlog.get_logger("proxy.rpc").debug("shown")
    assert lines(out) == ["DEBUG proxy.rpc: shown"]


def test_no_secret_is_logged(out: io.StringIO) -> None:
    """Upstream's ``call error`` line holds the parameters of the call, credentials included."""
    remember("hunter2hunter2")
    logs.set_up(LogsConfig(), out)
    structlog.get_logger("proxy.rpc").error(
        "call failed",
        params={"xapi": {"credentials": {"password": "pass-of-the-pool"}}},
        url="smb://user:pass-of-smb@host/share",
        error=ValueError("bad hunter2hunter2"),
    )
    shown = out.getvalue()
    assert "call failed" in shown
    for secret in ("pass-of-the-pool", "pass-of-smb", "hunter2hunter2"):
        assert secret not in shown


def test_a_secret_in_a_traceback_is_hidden(out: io.StringIO) -> None:
    remember("hunter2hunter2")
    logs.set_up(LogsConfig(), out)
    try:
        raise ValueError("hunter2hunter2")
    except ValueError:
        structlog.get_logger("proxy").exception("unforeseen")
    assert "ValueError: ***" in out.getvalue()


def test_a_peers_text_cannot_forge_a_line(out: io.StringIO) -> None:
    logs.set_up(LogsConfig(), out)
    structlog.get_logger("proxy.xapi").info("answer", text="x\n2026 INFO  proxy: forged\x1b[2J")
    assert lines(out) == [r'INFO  proxy.xapi: answer text="x\n2026 INFO  proxy: forged\x1b[2J"']


def test_a_repeated_event_is_counted(out: io.StringIO) -> None:
    logs.set_up(LogsConfig(), out)
    log = structlog.get_logger("proxy")
    for _ in range(4):
        log.info("again", n=1)
    log.info("something else")
    assert lines(out) == [
        "INFO  proxy: again n=1",
        "INFO  proxy: the same event was hidden times=3",
        "INFO  proxy: something else",
    ]


def test_libraries_log_the_same_way(out: io.StringIO) -> None:
    logs.set_up(LogsConfig(), out)
    logging.getLogger("hypercorn.error").warning("odd %s", "request")
    logging.getLogger("httpx").info("GET https://host/?session_id=secret")
    assert lines(out) == ["WARN  hypercorn.error: odd request"]


def test_a_closed_standard_error_is_survived(out: io.StringIO) -> None:
    logs.set_up(LogsConfig(), out)
    out.close()
    structlog.get_logger("proxy").error("nobody hears this")


def test_a_huge_value_is_cut(out: io.StringIO) -> None:
    logs.set_up(LogsConfig(), out)
    structlog.get_logger("proxy").info("answer", body="x" * 1_000_000)
    assert len(out.getvalue()) < 10_000


def test_loggers_made_before_the_set_up_follow_it(out: io.StringIO) -> None:
    early = structlog.get_logger("proxy.early")
    logs.set_up(LogsConfig(), out)
    early.info("hello")
    assert lines(out) == ["INFO  proxy.early: hello"]
