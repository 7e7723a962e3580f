"""``backups`` against answers as the daemon gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Stub

BACKUP = {
    "id": "/xo-vm-backups/vm-uuid/20260101T000000Z.json",
    "mode": "full",
    "size": 67_229_184,
    "timestamp": 1_767_225_600_000,
    "vm": {"uuid": "vm-uuid", "name_label": "web [1]"},
}
HEAD = b'{"id":0,"jsonrpc":"2.0","result":{"$responseType":"ndjson"}}\n'
RESTORE = ("backups", "restore", "file:///backups", BACKUP["id"], "--sr", "sr-uuid")


def answer(result: object) -> bytes:
    return json.dumps({"id": 0, "jsonrpc": "2.0", "result": result}).encode()


def log(*records: dict[str, Any]) -> bytes:
    return HEAD + b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_listing_shows_ids_whole(stub: Stub, xo_proxy: Any) -> None:
    stub.body = answer({"remote": {"vm-uuid": [BACKUP]}})
    code, out, _ = xo_proxy("backups", "list", "file:///backups", "--url", stub.url)
    assert code == 0
    assert "web [1]  full  2026-01-01 00:00:00  67.2 MB" in out
    assert str(BACKUP["id"]) in out


def test_an_empty_remote_says_so(stub: Stub, xo_proxy: Any) -> None:
    stub.body = answer({"remote": {}})
    found = xo_proxy("backups", "list", "file:///backups", "--url", stub.url)
    assert found == (0, "", "no backups\n")


def test_a_remote_that_cannot_be_listed_says_why(stub: Stub, xo_proxy: Any) -> None:
    """The listing itself leaves out what fails."""
    stub.body = answer({})
    error = {"code": -32000, "message": "ENOTDIR: not a directory, mkdir '/dev/null/x'"}
    stub.bodies["remote.ping"] = json.dumps({"error": error, "id": 0, "jsonrpc": "2.0"}).encode()
    found = xo_proxy("backups", "list", "file:///dev/null/x", "--url", stub.url)
    assert found == (1, "", "xo-proxy: ENOTDIR: not a directory, mkdir '/dev/null/x'\n")


@pytest.mark.parametrize("words", [("list",), ("metadata",), ("delete", "--yes")])
def test_a_remote_that_does_not_answer_is_waited_for_once(
    stub: Stub, xo_proxy: Any, words: tuple[str, ...]
) -> None:
    error = {"code": -32000, "message": "ECONNREFUSED: no"}
    stub.body = json.dumps({"error": error, "id": 0, "jsonrpc": "2.0"}).encode()
    ids = [str(BACKUP["id"])] if "delete" in words else []
    found = xo_proxy("backups", *words, "s3://k:s@h/b", *ids, "--url", stub.url)
    assert found == (1, "", "xo-proxy: ECONNREFUSED: no\n")
    assert len(stub.asked) == 1


def test_a_proxy_that_knows_no_ping_is_listed_all_the_same(stub: Stub, xo_proxy: Any) -> None:
    error = {"code": -32601, "message": "method not found: remote.ping"}
    stub.bodies["remote.ping"] = json.dumps({"error": error, "id": 0, "jsonrpc": "2.0"}).encode()
    stub.body = answer({"remote": {}})
    found = xo_proxy("backups", "list", "file:///backups", "--url", stub.url)
    assert found == (0, "", "no backups\n")


def test_a_mistyped_url_is_answered_with_the_kinds_of_remotes(stub: Stub, xo_proxy: Any) -> None:
    error = {"code": -32000, "message": "Unhandled remote type"}
    stub.body = json.dumps({"error": error, "id": 0, "jsonrpc": "2.0"}).encode()
    code, _, err = xo_proxy("backups", "list", "/backups", "--url", stub.url)
    assert code == 1
    assert "file://, nfs://, smb://, s3://, s3+http://" in err


def test_a_remote_may_be_read_from_a_file(stub: Stub, xo_proxy: Any, tmp_path: Path) -> None:
    """Command lines can be read by every user of the machine."""
    stub.body = answer({"remote": {}})
    file = tmp_path / "remote"
    file.write_text("s3://key:secret@host/bucket\n")
    assert xo_proxy("backups", "list", f"@{file}", "--url", stub.url)[0] == 0
    assert stub.asked[-1][1]["params"]["remotes"]["remote"]["url"] == "s3://key:secret@host/bucket"
    file.write_text("\n")
    for name, reason in ((file, "is empty"), (tmp_path / "none", "No such file")):
        code, _, err = xo_proxy("backups", "list", f"@{name}", "--url", stub.url)
        assert (code, reason in err) == (2, True)


def test_a_deletion_names_its_backups_and_those_that_were_gone(stub: Stub, xo_proxy: Any) -> None:
    there = str(BACKUP["id"])
    stub.bodies["backup.listVmBackups"] = answer({"remote": {"vm-uuid": [BACKUP]}})
    stub.bodies["backup.deleteVmBackups"] = answer(True)
    ids = [there, "/xo-vm-backups/vm-uuid/20250101T000000Z.json"]
    words = ("backups", "delete", "--yes", "file:///backups", *ids, "--url", stub.url)
    assert xo_proxy(*words) == (0, "deleted 1\n", f"there was no backup {ids[1]}\n")
    asked = [request for _, request in stub.asked]
    assert [request["method"] for request in asked] == [
        "remote.ping",
        "backup.listVmBackups",
        "backup.deleteVmBackups",
    ]
    assert asked[2]["params"] == {"filenames": ids, "remote": {"url": "file:///backups"}}


def test_a_restore_prints_the_new_vm(
    stub: Stub, xo_proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XAPI_PASSWORD", "pass-word")
    stub.body = log(
        {"id": "r", "type": "start", "properties": {"name": "restore"}},
        {"id": "t", "type": "start", "parentId": "r", "properties": {"name": "transfer"}},
        {"id": "t", "type": "end", "status": "success", "result": {"id": "other"}},
        {"id": "r", "type": "end", "status": "success", "result": {"id": "new-vm", "size": 1}},
    )
    words = (*RESTORE, "--pool", "https://host", "--new-mac", "--url", stub.url)
    assert xo_proxy(*words) == (0, "new-vm\n", "")
    params = stub.asked[0][1]["params"]
    assert params["xapi"]["credentials"] == {"username": "root", "password": "pass-word"}
    assert params["settings"] == {"newMacAddresses": True}
    assert params["streamLogs"] is True


@pytest.mark.parametrize(
    ("records", "text"),
    [
        (
            [{"id": "r", "type": "end", "status": "failure", "result": {"message": "no such SR"}}],
            "no such SR",
        ),
        ([], "the log ended before the run did"),
    ],
)
def test_a_restore_that_fails_says_why(
    stub: Stub,
    xo_proxy: Any,
    monkeypatch: pytest.MonkeyPatch,
    records: list[dict[str, Any]],
    text: str,
) -> None:
    monkeypatch.setenv("XAPI_PASSWORD", "pass-word")
    stub.body = log({"id": "r", "type": "start", "properties": {}}, *records)
    code, out, err = xo_proxy(*RESTORE, "--pool", "https://host", "--url", stub.url)
    assert (code, out) == (1, "")
    assert text in err


def test_the_pools_url_may_hold_the_password(
    stub: Stub, xo_proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XAPI_PASSWORD", raising=False)
    stub.body = log({"id": "r", "type": "start", "properties": {}})
    xo_proxy(*RESTORE, "--pool", "https://root:secret@host", "--url", stub.url)
    assert "credentials" not in stub.asked[0][1]["params"]["xapi"]


@pytest.mark.parametrize("pool", ["https://host", "https://["])
def test_without_a_terminal_no_password_is_asked_for(
    stub: Stub, xo_proxy: Any, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    monkeypatch.delenv("XAPI_PASSWORD", raising=False)
    code, _, err = xo_proxy(*RESTORE, "--pool", pool, "--url", stub.url)
    assert code == 2
    assert "XAPI_PASSWORD" in err
    assert stub.asked == []
