"""Our answers against those that upstream gave to the same requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from proxy.rpc.methods import backup
from proxy.rpc.methods.system import VERSION

if TYPE_CHECKING:
    from tests.rpc.conftest import Server

UPSTREAM_VERSION = "0.31.6"
THERE: dict[str, dict[str, Any]] = {
    "no token": {"token": None},
    "bad token": {"token": "nope"},
    "not JSON": {"body": b"not json"},
    "not a request": {"body": b"{}"},
    "notification": {"body": b'{"jsonrpc":"2.0","method":"system.getServerVersion"}'},
    "no params": {"body": b'{"id":"x","jsonrpc":"2.0","method":"system.getServerVersion"}'},
    "array params": {
        "body": b'{"id":1,"jsonrpc":"2.0","method":"system.getServerVersion","params":[1]}'
    },
    "trailing slash": {
        "path": "/api/v1/",
        "body": b'{"id":1,"jsonrpc":"2.0","method":"system.getServerVersion"}',
    },
    "GET": {"verb": "GET"},
    "OPTIONS": {"verb": "OPTIONS"},
}
# of the connection or of the moment, and the compression that we do not do
NOT_COMPARED = {"date", "connection", "keep-alive", "vary"}
# upstream sends these errors as text, which its own client refuses
JSON_HERE = {"not JSON", "not a request"}


@pytest.mark.parametrize("case", list(THERE))
async def test_http_as_recorded(
    case: str, server: Server, recorded_http: list[dict[str, Any]]
) -> None:
    recorded = next(one for one in recorded_http if one["case"] == case)
    request: dict[str, Any] = {"body": b"", **THERE[case]}
    async with server.client() as client:
        answer = await client.post(**request)
    expected = {key.lower(): value for key, value in recorded["headers"]}
    for name in NOT_COMPARED:
        expected.pop(name, None)
        answer.headers.pop(name, None)
    body = recorded["body"].replace(UPSTREAM_VERSION, VERSION)
    expected["content-length"] = str(len(body))
    if case in JSON_HERE:
        expected["content-type"] = "application/json"
    assert answer.status == recorded["status"]
    assert answer.body.decode() == body
    assert answer.headers == expected


SAME = [
    "03-system.getServerVersion",
    "04-system.methodSignature",
    "05-system.methodSignature",
    "06-test.range",
    "07-test.range",
    "09-no.such",
    "10-backup.run",
    "11-backup.run",
    "12-backup.listRunningJobs",
]


@pytest.mark.parametrize("name", SAME)
async def test_call_as_recorded(
    name: str, server: Server, recorded_calls: list[dict[str, Any]]
) -> None:
    recorded = next(one for one in recorded_calls if one["name"] == name)
    answer = await server.call(recorded["method"], recorded["params"])
    expected = recorded["answer"]
    if name == "03-system.getServerVersion":
        expected = [{**expected[0], "result": VERSION}]
    if name == "04-system.methodSignature":
        # upstream knows nothing of its results
        expected = [msgspec.json.decode(msgspec.json.encode(expected[0]))]
        expected[0]["result"]["result"] = backup.methods["backup.run"].result
    if name == "05-system.methodSignature":
        # weakness 13: upstream swaps the id and its type
        error = {"message": "no such method nope", "code": 1, "data": {"id": "nope"}}
        error["data"]["type"] = "method"  # type: ignore[index]
        expected = [{**expected[0], "error": error}]
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.lines() == expected


LATER = {
    "backup.fetchPartitionFiles",
    "backup.listDiskPartitions",
    "backup.listPartitionFiles",
    "backup.mountPartition",
    "backup.unmountPartition",
}
"""Not offered yet."""
MORE: dict[str, dict[str, Any]] = {"backup.restoreMetadataBackup": {"dryRun": {"type": "boolean"}}}
"""Parameters that upstream does not have."""


async def test_every_method_of_upstream_has_its_name_and_parameters(
    server: Server, recorded_calls: list[dict[str, Any]]
) -> None:
    recorded = next(one for one in recorded_calls if one["method"] == "system.getMethodsInfo")
    answer = await server.call("system.getMethodsInfo")
    header, *ours = answer.lines()
    assert header == recorded["answer"][0]
    by_name = {method["name"]: method for method in ours}
    for method in recorded["answer"][1:]:
        name = method["name"]
        if name not in LATER:
            assert by_name[name] == {**method, "params": method["params"] | MORE.get(name, {})}
