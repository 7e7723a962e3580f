"""``xo-proxy sweep`` against a daemon's answers: what an operator reads at night."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Stub

RUN = "0mwtyqiby-zc9088fvo2f"


def serve(stub: Stub, result: dict[str, Any], *, dry_run: bool = False) -> None:
    answer = {"dryRun": dry_run, "pools": {}, "remotes": {}, **result}
    records = [
        {"id": 0, "jsonrpc": "2.0", "result": {"$responseType": "ndjson"}},
        {"type": "start", "id": "root", "timestamp": 1, "properties": {"name": "sweep"}},
        {"type": "end", "id": "root", "timestamp": 2, "status": "success", "result": answer},
    ]
    stub.body = "".join(json.dumps(record) + "\n" for record in records).encode()


SWEPT = {
    "type": "VM",
    "uuid": "b6a3",
    "name": "[Importing…] db",
    "run": RUN,
    "reason": "a VM that was not finished",
}
LEFT = {
    "type": "directory",
    "path": "/xo-vm-backups/84e6",
    "name": "84e6",
    "run": "",
    "reason": "Lock file is already being held",
}


def test_it_says_what_went_what_stays_and_why(
    stub: Stub, xo_proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XAPI_PASSWORD", "secret-of-the-pool")
    pools = {"pool": {"swept": [SWEPT], "left": []}}
    remotes = {"remote 1": {"swept": [], "left": [LEFT]}, "remote 2": {"swept": [], "left": []}}
    serve(stub, {"pools": pools, "remotes": remotes})
    words = ("sweep", "--url", stub.url, "--pool", "https://master", "--insecure")
    code, out, err = xo_proxy(*words, "--remote", "file:///a", "--remote", "s3://k:hush@h/b")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "pool: removed or undone",
        "  VM                  [Importing…] db  b6a3",
        f"                      a VM that was not finished (run {RUN})",
        "remote 1: left as it is",
        "  directory           /xo-vm-backups/84e6",
        "                      Lock file is already being held",
        "remote 2: nothing is left",
    ]
    ((_, call),) = stub.asked
    assert call["method"] == "backup.sweep"
    credentials = {"username": "root", "password": "secret-of-the-pool"}
    assert call["params"] == {
        "xapis": {
            "pool": {
                "url": "https://master",
                "allowUnauthorized": True,
                "credentials": credentials,
            }
        },
        "remotes": {"remote 1": {"url": "file:///a"}, "remote 2": {"url": "s3://k:hush@h/b"}},
        "dryRun": False,
        "streamLogs": True,
    }


def test_a_dry_run_says_what_would_go(stub: Stub, xo_proxy: Any) -> None:
    serve(stub, {"remotes": {"remote": {"swept": [SWEPT], "left": []}}}, dry_run=True)
    code, out, _ = xo_proxy("sweep", "--url", stub.url, "--remote", "file:///a", "--dry-run")
    assert code == 0
    assert out.splitlines()[0] == "remote: would be removed or undone"
    assert stub.asked[0][1]["params"]["dryRun"] is True


def test_one_that_fails_is_told_after_the_others(stub: Stub, xo_proxy: Any) -> None:
    remotes = {
        "remote 1": {"swept": [], "left": [], "error": "ENOENT: no such directory"},
        "remote 2": {"swept": [SWEPT], "left": []},
    }
    serve(stub, {"remotes": remotes})
    words = ("sweep", "--url", stub.url, "--remote", "file:///a", "--remote", "file:///b")
    code, out, err = xo_proxy(*words)
    assert code == 1
    assert out.splitlines()[:2] == ["remote 1: could not be swept", "remote 2: removed or undone"]
    assert err == "xo-proxy: remote 1: ENOENT: no such directory\n"


def test_nothing_to_sweep_is_a_wrong_command_line(stub: Stub, xo_proxy: Any) -> None:
    code, _, err = xo_proxy("sweep", "--url", stub.url)
    assert code == 2
    assert "say what to sweep" in err
