from __future__ import annotations

import json
from typing import Any

import pytest
import structlog.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import InvalidParams, Many, NoSuchObject, NotFound, Refused, XapiError
from proxy.rpc.envelope import (
    NO_IDENTITY,
    Call,
    Identity,
    Malformed,
    describe,
    failure,
    parse,
    success,
)
from proxy.rpc.registry import MethodNotFound
from proxy.runtime.secrets import remember


def fault(body: bytes) -> tuple[int, str, dict[str, Any]]:
    with pytest.raises(Malformed) as caught:
        parse(body)
    answer = json.loads(failure(caught.value.identity, caught.value))
    assert answer.pop("jsonrpc") == "2.0"
    error = answer.pop("error")
    return error["code"], error["message"], answer


@pytest.mark.parametrize(
    ("body", "code", "message", "identity"),
    [
        (b"", -32700, "invalid JSON", {"id": None}),
        (b"{", -32700, "invalid JSON", {"id": None}),
        (b"\xff\xfe", -32700, "invalid JSON", {"id": None}),
        (b"[" * 100_000, -32700, "invalid JSON", {"id": None}),
        (b"null", -32600, "invalid request: null instead of object", {"id": None}),
        (b"5", -32600, "invalid request: number instead of object", {"id": None}),
        (
            b"{}",
            -32600,
            "invalid identifier: undefined instead of number or string",
            {"id": None},
        ),
        (
            b'{"id":null,"method":"a"}',
            -32600,
            "invalid identifier: null instead of number or string",
            {"id": None},
        ),
        (
            b'{"id":true,"method":"a"}',
            -32600,
            "invalid identifier: boolean instead of number or string",
            {"id": None},
        ),
        (
            b'{"id":1,"method":"a","jsonrpc":1}',
            -32600,
            "invalid version: number instead of undefined or '2.0'",
            {"id": None},
        ),
        (
            b'{"id":1,"method":"a","params":null}',
            -32600,
            "invalid params: null instead of undefined, array or object",
            {"id": None},
        ),
        (b'{"id":7,"result":1}', -32601, "method not found", {"id": 7}),
    ],
)
def test_malformed(body: bytes, code: int, message: str, identity: dict[str, Any]) -> None:
    assert fault(body) == (code, message, identity)


def test_batches_are_refused_as_batches() -> None:
    """Weakness 16: upstream says that the method is not found."""
    code, message, _ = fault(b'[{"id":0,"jsonrpc":"2.0","method":"system.listMethods"}]')
    assert code == -32600
    assert message == "batches are not supported: send one call per request"


def test_notifications_are_calls_without_identity() -> None:
    call = parse(b'{"jsonrpc":"2.0","method":"a"}')
    assert call == Call("a", {}, NO_IDENTITY)
    assert success(call.identity, 1) == b'{"jsonrpc":"2.0","result":1}'


@pytest.mark.parametrize("identifier", [0, -1.5, "x", ""])
def test_the_id_comes_back(identifier: object) -> None:
    call = parse(json.dumps({"id": identifier, "method": "a", "params": [1]}).encode())
    assert call.params == [1]
    assert json.loads(success(call.identity, "r"))["id"] == identifier


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_call_or_malformed(body: bytes) -> None:
    code = 0
    try:
        parse(body)
    except Malformed as error:
        code = error.envelope_code
    assert code in {0, -32700, -32600, -32601}


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["id", "method", "params", "jsonrpc"]),
        st.none()
        | st.text()
        | st.integers()
        | st.lists(st.none())
        | st.dictionaries(st.text(), st.none()),
    )
)
def test_any_object_is_a_call_or_malformed(message: dict[str, Any]) -> None:
    try:
        call = parse(json.dumps(message).encode())
    except Malformed:
        return
    assert call.method == message["method"]


def test_nothing_is_answered_as_true() -> None:
    """XO's client breaks on ``null``."""
    assert json.loads(success(Identity({"id": 0}), None))["result"] is True


def test_errors_of_xo_keep_their_form() -> None:
    assert describe(NoSuchObject("task", "7")) == {
        "message": "no such task 7",
        "code": 1,
        "data": {"id": "7", "type": "task"},
    }
    assert describe(InvalidParams([{"keyword": "type"}])) == {
        "message": "invalid parameters",
        "code": 10,
        "data": {"errors": [{"keyword": "type"}]},
    }
    assert describe(MethodNotFound("no.such")) == {
        "code": -32601,
        "data": "no.such",
        "message": "method not found: no.such",
    }


def test_code_10_is_for_parameters_only() -> None:
    """XO answers it by repeating a backup without logs."""
    others = [NotFound("a"), Refused("b"), XapiError("VM_BAD"), Many("c", []), ValueError("d")]
    with structlog.testing.capture_logs():
        assert all(describe(error)["code"] == -32000 for error in others)


def test_other_errors_say_their_stable_code() -> None:
    error = Refused("disk full", code="ENOSPC", data={"path": "/x"})
    assert describe(error) == {
        "code": -32000,
        "data": {"path": "/x", "code": "ENOSPC"},
        "message": "disk full",
    }


def test_several_failures_are_all_told() -> None:
    """Weakness 7: upstream loses the messages."""
    error = Many("all targets have failed", [NotFound("a"), Refused("b"), KeyError("c")])
    assert describe(error)["data"]["errors"] == [
        {"code": "ENOENT", "message": "a", "data": {}},
        {"code": "EPERM", "message": "b", "data": {}},
        {"code": "EINTERNAL", "message": "KeyError"},
    ]


def test_groups_of_a_nursery_are_opened() -> None:
    assert describe(ExceptionGroup("", [ExceptionGroup("", [NotFound("gone")])])) == {
        "code": -32000,
        "data": {"code": "ENOENT"},
        "message": "gone",
    }
    both = describe(ExceptionGroup("", [NotFound("a"), Refused("b")]))
    assert both["message"] == "a; b"


def test_a_fault_of_ours_shows_a_reference_only() -> None:
    remember("hunter2-secret")
    with structlog.testing.capture_logs() as logs:
        answer = describe(RuntimeError("lost hunter2-secret at 0x77"))
    assert "0x77" not in json.dumps(answer)
    reference = answer["data"]["reference"]
    assert reference in answer["message"]
    assert logs[0]["reference"] == reference
    assert "0x77" in logs[0]["traceback"]
    assert "hunter2" not in logs[0]["traceback"]


def test_no_secret_in_an_error() -> None:
    remember("s3cr3t-key")
    error = Refused(
        "cannot mount smb://joe:pass@host with s3cr3t-key",
        data={"url": "s3://id:s3cr3t-key@bucket", "password": "p"},
    )
    shown = json.dumps(describe(error))
    assert "s3cr3t" not in shown
    assert "pass@" not in shown
    assert '"password": "***"' in shown
