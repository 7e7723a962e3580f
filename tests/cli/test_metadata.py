"""``backups metadata`` against answers as the daemon gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .conftest import Stub

RECORDED = Path(__file__).parents[1] / "fixtures" / "repository" / "metadata"
WORDS = ("backups", "metadata", "file:///backups", "--url")


def answer(result: object) -> bytes:
    return json.dumps({"id": 0, "jsonrpc": "2.0", "result": result}).encode()


def recorded(name: str) -> list[dict[str, Any]]:
    found = json.loads((RECORDED / name).read_text().splitlines()[0])["result"]["remote1"]
    (entries,) = found.values() if isinstance(found, dict) else [found]
    return list(entries)


def serve(stub: Stub, pools: object, configs: object) -> None:
    stub.bodies["backup.listPoolMetadataBackups"] = answer(pools)
    stub.bodies["backup.listXoMetadataBackups"] = answer(configs)


def test_a_listing_shows_ids_whole(stub: Stub, xo_proxy: Any) -> None:
    pools, configs = recorded("pools.json"), recorded("configs.json")
    bare = {"id": "/xo-pool-metadata-backups/s/p/20260101T000000Z", "timestamp": "then"}
    serve(stub, {"remote": {"uuid": pools, "other": [bare]}}, {"remote": configs})
    code, out, _ = xo_proxy(*WORDS, stub.url)
    assert code == 0
    lines = [line.split() for line in out.splitlines()[1:]]
    assert [line[-1] for line in lines] == [entry["id"] for entry in [*configs, *pools, bare]]
    assert "Xen Orchestra   metadata job  2026-11-24 01:55:35" in out
    assert "simulated pool  metadata job  2026-11-24 01:55:35" in out
    assert lines[-1] == ["other", bare["id"]]


def test_an_empty_remote_says_so(stub: Stub, xo_proxy: Any) -> None:
    serve(stub, {"remote": {}}, {"remote": []})
    assert xo_proxy(*WORDS, stub.url) == (0, "", "no backups\n")


def test_a_remote_that_cannot_be_listed_says_why(stub: Stub, xo_proxy: Any) -> None:
    serve(stub, {"remote": {}}, {})
    error = {"code": -32000, "message": "ENOTDIR: not a directory, mkdir '/dev/null/x'"}
    stub.bodies["remote.ping"] = json.dumps({"error": error, "id": 0, "jsonrpc": "2.0"}).encode()
    found = xo_proxy(*WORDS, stub.url)
    assert found == (1, "", "xo-proxy: ENOTDIR: not a directory, mkdir '/dev/null/x'\n")
