"""What is read without h11 is what h11 reads."""

from __future__ import annotations

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.rpc.quick import read_whole

PLAIN = (
    b"POST /api/v1 HTTP/1.1\r\nHost: p\r\nCookie: a=b; c=d\r\nContent-Length: 3\r\n"
    b"connection: keep-alive\r\naccept-encoding: br, gzip\r\n\r\n{ }"
)


def by_h11(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]], bytes] | None:
    """The request that ``data`` is, when it is one whole request and nothing else."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    body = b""
    try:
        request = connection.next_event()
        if not isinstance(request, h11.Request):
            return None
        while isinstance(event := connection.next_event(), h11.Data):
            body += bytes(event.data)
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, h11.EndOfMessage) or connection.trailing_data[0]:
        return None
    return request.target, list(request.headers), body


def test_a_plain_call_is_read() -> None:
    whole = read_whole(PLAIN)
    assert whole is not None
    assert (whole.target, whole.body) == (b"/api/v1", b"{ }")
    assert (b"cookie", b"a=b; c=d") in whole.headers


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"POST", b"GET"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"HTTP/1.1", b"HTTP/2.0"),
        (b"keep-alive", b"close"),
        (b"keep-alive", b"keep-alive, upgrade"),
        (b"accept-encoding: br", b"Transfer-Encoding: chunked"),
        (b"accept-encoding: br", b"Expect: 100-continue"),
        (b"accept-encoding: br", b"Upgrade: h2c"),
        (b"accept-encoding: br", b"content-length: 3"),
        (b"accept-encoding: br", b"Host: q"),
        (b"Host: p\r\n", b""),
        (b"Content-Length: 3\r\n", b""),
        (b"Content-Length: 3", b"Content-Length: 2"),
        (b"Content-Length: 3", b"Content-Length: 4"),
        (b"Content-Length: 3", b"Content-Length: +3"),
        (b"Content-Length: 3", b"Content-Length: 3, 3"),
        (b"Cookie:", b"Cookie :"),
        (b"Cookie:", b" Cookie:"),
        (b"Cookie: a", b"Cookie: \0a"),
        (b"Cookie: a", b"Cookie: \xe9a"),
        (b"\r\nCookie", b"\nCookie"),
        (b"Cookie: a=b; ", b"Cookie: a=b;\r\n "),
        (b"{ }", b"{ }POST"),
        (b"{ }", b"{"),
    ],
)
def test_anything_unusual_is_left_to_h11(old: bytes, new: bytes) -> None:
    assert PLAIN.count(old) == 1
    assert read_whole(PLAIN.replace(old, new)) is None


lines = st.sampled_from(
    [
        *(b"Host: p", b"host:q", b"Content-Length: 3", b"content-length:  03 ", b"X-Y:\t z \t"),
        *(b"Cookie: a=b", b"connection: Keep-Alive", b"connection: close", b" folded", b"no-colon"),
        *(
            b"Transfer-Encoding: chunked",
            b"a b: c",
            b"empty:",
            b":",
            b"x: \x80",
            b"Content-Length: x",
        ),
    ]
)
requests = st.builds(
    lambda start, headers, body: b"\r\n".join([start, *headers, b"", b""]) + body,
    st.sampled_from([b"POST /api/v1 HTTP/1.1", b"POST  / HTTP/1.1", b"POST / HTTP/1.0"]),
    st.lists(lines, max_size=5),
    st.sampled_from([b"", b"{ }", b"{ }{", b"\r\n\r"]),
)


@given(requests)
@example(PLAIN)
@example(PLAIN.replace(b"br, gzip", b" " * 5000 + b"\x80"))
def test_what_is_accepted_means_the_same_to_h11(data: bytes) -> None:
    whole = read_whole(data)
    if whole is not None:
        assert (whole.target, whole.headers, whole.body) == by_h11(data)


@given(st.data())
def test_one_changed_byte_is_no_hole(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(PLAIN) - 1))
    changed = bytearray(PLAIN)
    changed[at] = data.draw(st.integers(0, 255))
    whole = read_whole(changed)
    if whole is not None:
        assert (whole.target, whole.headers, whole.body) == by_h11(bytes(changed))
