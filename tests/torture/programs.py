"""The programs under torture: a daemon that can be killed and started again, and a pool."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "token-of-the-torture"
_PATIENCE = 60.0
ROOT_TASK_WAIT = 120.0


class Program:
    """A process with its errors in a file; :attr:`first` is its first line of output."""

    def __init__(self, folder: Path, name: str, *command: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("XO_PROXY_")}
        with (folder / f"{name}.log").open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**kept, "XDG_CONFIG_HOME": str(folder / "no-config")},
            )
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline().strip()
        if not self.first:
            raise RuntimeError(f"{name} did not start: see its log in {folder}")

    def end(self) -> None:
        """By SIGKILL, as a crash would, and wait until it is gone."""
        self.process.kill()
        self.process.wait(_PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Pool(Program):
    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, "pool", "-m", "tests.torture.pool", str(seed))
        self.described: dict[str, Any] = json.loads(self.first)

    @property
    def vms(self) -> list[str]:
        return [vm["uuid"] for vm in self.described["vms"]]

    @property
    def spec(self) -> dict[str, Any]:
        """As calls of the API name a pool."""
        described = self.described
        credentials = {"username": described["user"], "password": described["password"]}
        return {"url": described["url"], "credentials": credentials, "allowUnauthorized": True}

    def ask(self, command: str, **arguments: Any) -> Any:
        """See :mod:`tests.torture.pool`."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())


class Daemon(Program):
    """One life of the daemon; all lives in one folder share their data."""

    def __init__(self, folder: Path) -> None:
        config = folder / "config.json"
        if not config.exists():
            config.touch(mode=0o600)
            listener = {"hostname": "127.0.0.1", "port": 0, "cert": None, "key": None}
            settings = {
                "authenticationToken": TOKEN,
                "datadir": "./data",
                "http": {"listen": {"https": {**listener, "autoCert": False}}},
                "remotes": {"disableFileRemotes": False},
            }
            config.write_text(json.dumps(settings))
        super().__init__(folder, "daemon", "-m", "proxy", "serve", "--config", str(config))
        self._port = urlsplit(self.first.removeprefix("listening on ")).port

    def call(self, method: str, **params: Any) -> Any:
        """The result, or ``LookupError`` with the daemon's error."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port or 0, timeout=_PATIENCE)
        message = {"id": 0, "jsonrpc": "2.0", "method": method, "params": params}
        headers = {
            "Cookie": f"authenticationToken={TOKEN}",
            "Content-Type": "application/json",
        }
        try:
            connection.request("POST", "/api/v1", json.dumps(message), headers)
            first, *others = map(json.loads, connection.getresponse().read().splitlines())
        finally:
            connection.close()
        if "error" in first:
            raise LookupError(first["error"])
        result = first["result"]
        return others if result == {"$responseType": "ndjson"} else result
