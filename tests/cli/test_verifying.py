"""``backups verify``: what the operator reads at three in the morning, and the exit code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Stub

HEAD: dict[str, Any] = {"id": 0, "jsonrpc": "2.0", "result": {"$responseType": "ndjson"}}
START = {"type": "start", "taskId": "t1", "level": "structure"}
BACKUP = {
    "type": "backup",
    "id": "/xo-vm-backups/vm/20260101T000000Z.json",
    "vm": "vm",
    "name_label": "web [1]",
    "mode": "delta",
    "timestamp": 1_767_225_600_000,
}


def answer(stub: Stub, *records: dict[str, Any]) -> None:
    stub.body = b"\n".join(json.dumps(each).encode() for each in (HEAD, START, *records))


def test_good_backups_exit_with_0(stub: Stub, xo_proxy: Any) -> None:
    disk = {"type": "disk", "path": "/d.vhd", "status": "ok"}
    summary = {"type": "summary", "status": "ok", "backups": {"ok": 1}, "disks": {"ok": 1}}
    answer(stub, disk, {**BACKUP, "status": "ok"}, summary)
    code, out, err = xo_proxy("backups", "verify", "file:///b", "--url", stub.url)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"ok          web [1]  delta  2026-01-01 00:00:00  {BACKUP['id']}",
        "backups: 1 ok",
        "disks: 1 ok",
    ]
    asked = stub.asked[0][1]
    assert asked["method"] == "backup.verify"
    assert asked["params"] == {"remote": {"url": "file:///b"}, "level": "structure"}


def test_options_become_parameters(stub: Stub, xo_proxy: Any) -> None:
    answer(stub, {"type": "summary", "status": "ok"})
    words = ("--vm", "u", "--backup", "/b.json", "--read", "--sample", "0.25")
    assert xo_proxy("backups", "verify", "file:///b", *words, "--url", stub.url)[0] == 0
    assert stub.asked[0][1]["params"] == {
        "remote": {"url": "file:///b"},
        "level": "read",
        "vmId": "u",
        "filename": "/b.json",
        "sample": 0.25,
    }


@pytest.mark.parametrize("words", [("--sample", "0.5"), ("--read", "--sample", "0")])
def test_a_sample_of_nothing_is_a_wrong_command(
    stub: Stub, xo_proxy: Any, words: tuple[str, ...]
) -> None:
    assert xo_proxy("backups", "verify", "file:///b", *words, "--url", stub.url)[0] == 2
    assert stub.asked == []


@pytest.mark.parametrize("status", ["damaged", "unreadable"])
def test_what_is_wrong_is_said_and_exits_with_1(stub: Stub, xo_proxy: Any, status: str) -> None:
    problem = {"status": status, "what": "checksum", "message": "block 3 is [not] what was written"}
    disk = {"type": "disk", "path": "/d.vhd", "status": status, "problems": [problem]}
    summary = {
        "type": "summary",
        "status": status,
        "backups": {status: 1},
        "disks": {status: 1},
        "checksums": {"mismatch": 1},
        "bytesRead": 4_200_000,
    }
    answer(stub, disk, {**BACKUP, "status": status, "problems": [problem]}, summary)
    code, out, err = xo_proxy("backups", "verify", "file:///b", "--read", "--url", stub.url)
    assert code == 1
    assert err == f"xo-proxy: the verify ended: {status}\n"
    lines = out.splitlines()
    assert lines[0] == f"{status:<10}  disk /d.vhd"
    assert lines[1].startswith(f"{status:<10}  web [1]")
    assert lines[2].strip() == problem["message"]
    assert "read: 4.2 MB; checksums: 1 mismatch" in lines
    assert lines[-1].startswith(f"{status}: ")


@pytest.mark.parametrize("status", ["unknown", "merging"])
def test_what_proves_nothing_is_no_failure(stub: Stub, xo_proxy: Any, status: str) -> None:
    summary = {"type": "summary", "status": status, "backups": {status: 1}}
    answer(stub, {**BACKUP, "status": status}, summary)
    code, out, _ = xo_proxy("backups", "verify", "file:///b", "--url", stub.url)
    assert code == 0
    assert status in out


def test_a_verify_that_did_not_end_is_a_failure(stub: Stub, xo_proxy: Any) -> None:
    answer(stub, {**BACKUP, "status": "ok"})
    code, _, err = xo_proxy("backups", "verify", "file:///b", "--url", stub.url)
    assert code == 1
    assert "before the verify did" in err
    answer(stub, {"type": "summary", "status": "canceled"})
    code, _, err = xo_proxy("backups", "verify", "file:///b", "--url", stub.url)
    assert (code, err) == (1, "xo-proxy: the verify ended: canceled\n")
    answer(stub, {"type": "summary", "status": "unreadable", "message": "EIO: no"})
    code, _, err = xo_proxy("backups", "verify", "file:///b", "--url", stub.url)
    assert (code, err) == (1, "xo-proxy: EIO: no\n")
