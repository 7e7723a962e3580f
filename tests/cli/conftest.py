"""A server of our own that answers recorded bytes, and the command line run in this process."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proxy.cli import main

JSON = "application/json"


@dataclass
class Stub:
    """Answers every call with ``body``; keeps what was asked."""

    url: str = ""
    status: int = 200
    kind: str = JSON
    body: bytes = b'{"id":0,"jsonrpc":"2.0","result":true}'
    bodies: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """By method, instead of ``body``."""
    asked: list[tuple[dict[str, str], Any]] = field(default_factory=list)


@pytest.fixture
def stub() -> Iterator[Stub]:
    state = Stub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            headers = {name.lower(): value for name, value in self.headers.items()}
            call = json.loads(self.rfile.read(length))
            state.asked.append((headers, call))
            body = state.bodies.get(call["method"], state.body)
            self.send_response(state.status)
            self.send_header("content-type", state.kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture
def xo_proxy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Any:
    monkeypatch.setenv("XO_PROXY_AUTHENTICATION_TOKEN", "token-of-tests")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xo-proxy", *words])
        with pytest.raises(SystemExit) as left:
            main()
        shown = capsys.readouterr()
        return int(left.value.code or 0), shown.out, shown.err

    return run
