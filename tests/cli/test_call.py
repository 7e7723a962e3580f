"""``call`` against a server of our own that answers recorded bytes, and the way it fails."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from proxy.cli.call import parse_params
from proxy.cli.failures import failure_of
from proxy.config import ConfigError, Problem
from proxy.errors import NotFound, Unauthorized, Unreachable

from .conftest import Stub


def test_a_value_is_printed_as_json(stub: Stub, xo_proxy: Any) -> None:
    stub.body = b'{"id":0,"jsonrpc":"2.0","result":{"a":"\xc3\xa9"}}'
    assert xo_proxy("call", "x.y", "k=v", "--url", stub.url) == (0, '{\n  "a": "é"\n}\n', "")
    headers, asked = stub.asked[0]
    assert asked == {"id": 0, "jsonrpc": "2.0", "method": "x.y", "params": {"k": "v"}}
    assert headers["cookie"] == "authenticationToken=token-of-tests"
    assert headers["accept-encoding"] == "identity"


def test_raw_prints_text_as_it_is(stub: Stub, xo_proxy: Any) -> None:
    stub.body = b'{"id":0,"jsonrpc":"2.0","result":"1.0.0"}'
    assert xo_proxy("call", "v", "--raw", "--url", stub.url) == (0, "1.0.0\n", "")


def test_a_stream_of_upstream_is_printed_line_by_line(stub: Stub, xo_proxy: Any) -> None:
    """Spaces that keep the connection alive, and separators of Unicode within a value."""
    head = b'  {"id":0,"jsonrpc":"2.0","result":{"$responseType":"ndjson"}}\n'
    stub.body = head + '{"n":1}\n   {"n":"a\u2028b"}\n  '.encode()
    code, out, _ = xo_proxy("call", "x", "--url", stub.url)
    assert (code, out) == (0, '{"n":1}\n{"n":"a\u2028b"}\n')


def test_bytes_go_to_standard_output(
    stub: Stub, xo_proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.kind, stub.body = "application/octet-stream", b"\0\xffbytes"
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    assert xo_proxy("call", "x", "--url", stub.url)[0] == 0
    assert raw.getvalue() == b"\0\xffbytes"


def test_bytes_are_refused_on_a_terminal(
    stub: Stub, xo_proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.kind, stub.body = "application/octet-stream", b"\0\xffbytes"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, err = xo_proxy("call", "x", "--url", stub.url)
    assert (code, out) == (2, "")
    assert "redirect" in err


def test_an_error_is_one_line_and_its_faults(stub: Stub, xo_proxy: Any) -> None:
    fault = {"instancePath": "/a", "message": "must be object"}
    error = {"code": 10, "message": "invalid parameters", "data": {"errors": [fault]}}
    stub.body = json.dumps({"error": error, "id": 0, "jsonrpc": "2.0"}).encode()
    expected = "xo-proxy: invalid parameters\nxo-proxy:   /a: must be object\n"
    assert xo_proxy("call", "x", "--url", stub.url) == (1, "", expected)


@pytest.mark.parametrize(
    ("message", "data", "expected"),
    [
        ("job is already running", {"code": "EJOBRUNNING"}, "job is already running (EJOBRUNNING)"),
        ("ENOENT: no such file", {"code": "ENOENT"}, "ENOENT: no such file"),
        ("no such object", {"code": 7}, "no such object"),
        ("what it was", "text", "what it was"),
    ],
)
def test_an_error_is_told_with_the_code_to_look_it_up_by(
    stub: Stub, xo_proxy: Any, message: str, data: Any, expected: str
) -> None:
    error = {"code": -32000, "message": message, "data": data}
    stub.body = json.dumps({"error": error, "id": 0, "jsonrpc": "2.0"}).encode()
    assert xo_proxy("call", "x", "--url", stub.url) == (1, "", f"xo-proxy: {expected}\n")


@pytest.mark.parametrize(
    ("status", "body", "code", "text"),
    [
        (401, b"Unauthorized", 4, "does not accept the token"),
        (413, b"", 1, "413"),
        (200, b"", 3, "no answer that this program understands"),
        (200, b'{"id":0,', 3, "cut off"),
    ],
)
def test_other_answers_have_their_exit_code(
    stub: Stub, xo_proxy: Any, status: int, body: bytes, code: int, text: str
) -> None:
    stub.status, stub.body = status, body
    found, out, err = xo_proxy("call", "x", "--url", stub.url)
    assert (found, out) == (code, "")
    assert text in err
    assert err.count("\n") == 1


def test_an_unreachable_daemon(xo_proxy: Any) -> None:
    code, _, err = xo_proxy("call", "x", "--url", "http://127.0.0.1:1")
    assert code == 3
    assert err.startswith("xo-proxy: cannot reach http://127.0.0.1:1: ")


def test_without_a_token_it_says_where_to_put_one(
    stub: Stub, xo_proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XO_PROXY_AUTHENTICATION_TOKEN")
    monkeypatch.chdir("/")
    code, _, err = xo_proxy("call", "x", "--url", stub.url)
    assert code == 4
    assert "--token-file" in err


def test_the_token_may_be_the_urls_user(stub: Stub, xo_proxy: Any) -> None:
    xo_proxy("call", "x", "--url", stub.url.replace("://", "://a%2Bb@"))
    assert stub.asked[0][0]["cookie"] == "authenticationToken=a+b"


def test_a_token_that_no_cookie_can_hold_is_encoded(
    stub: Stub, xo_proxy: Any, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text("semi;colon\n")
    xo_proxy("call", "x", "--url", stub.url, "--token-file", str(path))
    assert stub.asked[0][0]["cookie"] == "authenticationToken=semi%3Bcolon"


def test_options_stand_before_or_after_a_subcommand(stub: Stub, xo_proxy: Any) -> None:
    assert xo_proxy("tasks", "cancel", "t1", "--url", stub.url)[0] == 0
    assert xo_proxy("tasks", "--url", stub.url, "cancel", "t1")[0] == 0
    assert [asked["method"] for _, asked in stub.asked] == ["task.cancel"] * 2


def test_a_group_without_default_command_takes_the_connection_too(
    stub: Stub, xo_proxy: Any
) -> None:
    """A remote is told to the daemon by its URL; whether it is there is the daemon's answer."""
    stub.body = b'{"id":0,"jsonrpc":"2.0","result":{"remote":{}}}'
    assert xo_proxy("backups", "--url", stub.url, "list", "file:///backups")[0] == 0
    assert [asked["method"] for _, asked in stub.asked] == ["remote.ping", "backup.listVmBackups"]


@pytest.mark.parametrize(
    "url",
    ["http://t0ken@[::1", "http://t0ken@host:99999", "http://t0ken@host:0", "ftp://t0ken@host"],
)
def test_a_url_of_no_proxy_is_told_without_its_token(xo_proxy: Any, url: str) -> None:
    code, _, err = xo_proxy("call", "x", "--url", url)
    assert code == 2
    assert "is no URL of a proxy" in err
    assert "t0ken" not in err


def test_json_nested_too_deep_is_a_clear_error(stub: Stub, xo_proxy: Any) -> None:
    deep = "[" * 100_000
    code, _, err = xo_proxy("call", "x", "--json", deep, "--url", stub.url)
    assert (code, "is not JSON" in err) == (2, True)
    stub.body = deep.encode()
    code, _, err = xo_proxy("call", "x", "--url", stub.url)
    assert (code, "not JSON" in err) == (3, True)


def test_a_full_disk_behind_the_output_is_one_line(stub: Stub) -> None:
    """In a process of its own: the interpreter flushes its output once more at its end."""
    words = [sys.executable, "-m", "proxy", "call", "x", "--url", stub.url, "--token", "t"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == ["xo-proxy: [Errno 28] No space left on device"]


def test_a_taken_port_is_one_line(xo_proxy: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = xo_proxy("simulate", "--port", str(port))
    assert (code, out) == (1, "")
    assert "in use" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [("--vms", "-1"), ("--port", "70000"), ("--latency", "-1")])
def test_a_pool_that_cannot_be_is_a_usage_error(xo_proxy: Any, words: tuple[str, ...]) -> None:
    assert xo_proxy("simulate", *words)[0] == 2


def test_parameters_of_every_form() -> None:
    words = ("a=text=more", "b:=[1]", 'c=json:{"d":null}', "e=")
    expected = {"z": 1, "a": "text=more", "b": [1], "c": {"d": None}, "e": ""}
    assert parse_params(words, ('{"z": 1, "a": 2}',)) == expected


def test_objects_of_parameters_are_laid_over_each_other(tmp_path: Path) -> None:
    """So that the secrets of pools and remotes stand in a file of their own."""
    places = tmp_path / "places.json"
    places.write_text('{"remotes": {"r1": {}}, "job": 1}')
    given = (f"@{places}", '{"job": {"id": "j1"}}')
    assert parse_params((), given) == {"remotes": {"r1": {}}, "job": {"id": "j1"}}


@pytest.mark.parametrize("content", [None, b"\xff", b"{", b"[]"])
def test_a_file_without_parameters_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "job.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(click.UsageError) as caught:
        parse_params((), (f"@{file}",))
    assert (str(file) in caught.value.message) is (content != b"[]")


def test_parameters_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"a": 1}'))
    assert parse_params((), ("-",)) == {"a": 1}


@pytest.mark.parametrize(
    ("words", "objects"), [(("a",), ()), (("=b",), ()), (("a:=x",), ()), ((), ("[1]",))]
)
def test_other_parameters_are_usage_errors(
    words: tuple[str, ...], objects: tuple[str, ...]
) -> None:
    with pytest.raises(click.UsageError):
        parse_params(words, objects)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("gone"), 1),
        (Unreachable("away"), 3),
        (Unauthorized("no"), 4),
        (ConfigError([Problem(None, ("a",), "wrong")]), 5),
        (ExceptionGroup("", [ExceptionGroup("", [Unreachable("away")])]), 3),
    ],
)
def test_errors_of_the_rooms_have_exit_codes(error: Exception, code: int) -> None:
    failure = failure_of(error)
    assert failure is not None
    assert failure.exit_code == code


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    assert failure_of(ExceptionGroup("", [NotFound("gone"), KeyError("bug")])) is None
