"""The handshake and the replies: every byte from the protocol's document, then hostile ones."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt, Refused
from proxy.formats import nbd, nbd_server
from proxy.formats.nbd import Export, Receive, Send, StartTls

HELLO = b"NBDMAGICIHAVEOPT\x00\x03"
REPLY = bytes.fromhex("0003e889045565a9")
LIMIT = 16 * 1024


class Ended(Exception):
    """The bytes ran out."""


def converse(
    steps: Generator[Any, Any, Any],
    incoming: bytes,
    export: Export | None = None,
    *,
    whole: bool = True,
) -> tuple[list[Any], Any]:
    """Play ``incoming`` to a handshake: what it sent (and StartTls), and what it returned."""
    sent: list[Any] = []
    position = 0
    answer: Any = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as stop:
            assert position == len(incoming) or not whole
            return sent, stop.value
        answer = b""
        if isinstance(step, Receive):
            assert 0 < step.count <= LIMIT
            answer = incoming[position : position + step.count]
            position += step.count
            if len(answer) < step.count:
                raise Ended(sent)
        elif isinstance(step, nbd_server.Lookup):
            sent.append(step)
            answer = export
        else:
            sent.append(step.data if isinstance(step, Send) else step)


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def answer(number: int, kind: int, data: bytes = b"") -> bytes:
    return REPLY + struct.pack(">III", number, kind, len(data)) + data


# The client


@pytest.mark.parametrize("flags", [1, 3], ids=["plain", "with NO_ZEROES"])
def test_greeting_without_tls(flags: int) -> None:
    hello = b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags)
    assert converse(nbd.greet(tls=False, allow_plain=False), hello) == ([b"\0\0\0\1"], False)


def test_greeting_with_tls() -> None:
    sent, secure = converse(nbd.greet(tls=True, allow_plain=False), HELLO + answer(5, 1))
    assert sent == [b"\0\0\0\1", option(5), StartTls()]
    assert secure


@pytest.mark.parametrize("kind", [0x80000001, 0x80000002, 0x80000003])
def test_a_server_that_refuses_tls(kind: int) -> None:
    refusal = HELLO + answer(5, kind, b"not here")
    with pytest.raises(Refused, match="not here") as caught:
        converse(nbd.greet(tls=True, allow_plain=False), refusal)
    assert caught.value.code == "TLS_REFUSED"
    sent, secure = converse(nbd.greet(tls=True, allow_plain=True), refusal)
    assert sent == [b"\0\0\0\1", option(5)]
    assert not secure


@pytest.mark.parametrize(
    "incoming",
    [
        b"NBDMAGIK" + HELLO[8:],
        b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x03",  # oldstyle
        HELLO[:16] + b"\x00\x02",  # newstyle without options
        HELLO + answer(3, 1),  # an answer to another question
        HELLO + bytes(8) + answer(5, 1)[8:],
        HELLO + answer(5, 1, b"?"),
        HELLO + answer(5, 3),
        HELLO + answer(5, 0x80000001, bytes(4097)),
    ],
)
def test_no_greeting(incoming: bytes) -> None:
    with pytest.raises(Corrupt):
        converse(nbd.greet(tls=True, allow_plain=True), incoming)


def test_choosing_an_export() -> None:
    name = "/0f1d?session_id=OpaqueRef:é"
    told = struct.pack(">QH", 5 << 40, 0x103) + bytes(124)
    sent, export = converse(nbd.open_export(name), told)
    assert sent == [option(1, name.encode())]
    assert export == Export(5 << 40, 0x103)


@pytest.mark.parametrize(("size", "flags"), [(2**63, 1), (4096, 2)])
def test_no_export(size: int, flags: int) -> None:
    with pytest.raises(Corrupt):
        converse(nbd.open_export("x"), struct.pack(">QH", size, flags) + bytes(124))


def test_a_name_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="4097 bytes"):
        next(nbd.open_export("x" * 4097))


def test_requests_and_replies_in_any_order() -> None:
    requests = nbd.Requests()
    first, sent = requests.read(2 << 40, 2 << 20)
    assert sent == struct.pack(">IHHQQI", 0x25609513, 0, 0, first, 2 << 40, 2 << 20)
    second, _ = requests.read(0, 512)
    assert requests.reply(struct.pack(">IIQ", 0x67446698, 0, second)) == nbd.Reply(second, 512)
    assert len(requests) == 1
    failed = requests.reply(struct.pack(">IIQ", 0x67446698, 5, first))
    assert failed == nbd.Reply(first, 0, "EIO")
    assert len(requests) == 0
    with pytest.raises(Corrupt, match="never sent"):
        requests.reply(struct.pack(">IIQ", 0x67446698, 0, first))


def test_a_structured_reply_was_not_agreed_on() -> None:
    requests = nbd.Requests()
    handle, _ = requests.read(0, 512)
    with pytest.raises(Corrupt):
        requests.reply(struct.pack(">IHHQ", 0x668E33EF, 1, 1, handle))


def test_the_end() -> None:
    assert nbd.disconnect() == struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0)


# The server

EXPORT = Export(10 << 20)
CLIENT = b"\0\0\0\3"


def served(
    incoming: bytes,
    *,
    tls: nbd_server.Tls = "refused",
    names: tuple[str, ...] | None = None,
    export: Export | None = EXPORT,
) -> tuple[list[Any], Any]:
    sent, value = converse(nbd_server.shake_hands(tls=tls, names=names), incoming, export)
    assert sent[0] == HELLO
    return sent[1:], value


@pytest.mark.parametrize(("flags", "padding"), [(b"\0\0\0\1", 124), (b"\0\0\0\3", 0)])
def test_serving_by_export_name(flags: bytes, padding: int) -> None:
    sent, export = served(flags + option(1, b"/a"))
    told = struct.pack(">QH", 10 << 20, 3) + bytes(padding)
    assert sent == [nbd_server.Lookup("/a", opening=True), told]
    assert export == EXPORT
    sent, export = served(flags + option(1, b"/a"), export=None)
    assert sent == [nbd_server.Lookup("/a", opening=True)]
    assert export is None


def go(name: bytes, *asked: int) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(asked)}H", len(asked), *asked)


def test_serving_by_go() -> None:
    extensions = option(8) + option(10, bytes(8)) + option(99)
    sent, export = served(CLIENT + extensions + option(6, go(b"a")) + option(7, go(b"a", 3)))
    told = struct.pack(">HQH", 0, 10 << 20, 3)
    assert sent == [
        answer(8, 0x80000001),
        answer(10, 0x80000001),
        answer(99, 0x80000001),
        nbd_server.Lookup("a", opening=False),
        answer(6, 3, told),
        answer(6, 1),
        nbd_server.Lookup("a", opening=True),
        answer(7, 3, told),
        answer(7, 3, struct.pack(">HIII", 3, 1, 4096, 32 << 20)),
        answer(7, 1),
    ]
    assert export == EXPORT
    sent, export = served(CLIENT + option(7, go(b"a")) + option(2), export=None)
    assert sent[1:] == [answer(7, 0x80000006), answer(2, 1)]
    assert export is None


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\0\5a\0\0", go(b"a", 1)[:-1], go(b"a") + b"?"])
def test_info_that_does_not_add_up(data: bytes) -> None:
    assert served(CLIENT + option(7, data) + option(2))[0][0] == answer(7, 0x80000003)


def test_listing() -> None:
    names = ("a", "bb")
    sent, _ = served(CLIENT + option(3) + option(3, b"?") + option(2), names=names)
    assert sent == [
        answer(3, 2, b"\0\0\0\1a"),
        answer(3, 2, b"\0\0\0\2bb"),
        answer(3, 1),
        answer(3, 0x80000003),
        answer(2, 1),
    ]
    assert served(CLIENT + option(3) + option(2))[0][0] == answer(3, 0x80000002)


def test_tls_comes_first_where_it_is_required() -> None:
    sent, export = served(
        CLIENT + option(3) + option(7, go(b"a")) + option(5) + option(5) + option(1, b"a"),
        tls="required",
    )
    assert sent[:5] == [
        answer(3, 0x80000005),
        answer(7, 0x80000005),
        answer(5, 1),
        StartTls(),
        answer(5, 0x80000003),
    ]
    assert export == EXPORT
    assert served(CLIENT + option(1, b"a"), tls="required") == ([], None)
    assert served(CLIENT + option(5) + option(2))[0][0] == answer(5, 0x80000002)
    assert served(CLIENT + option(1, b"a"), tls="offered")[1] == EXPORT


@pytest.mark.parametrize(
    "incoming",
    [
        b"\0\0\0\0",
        b"\0\0\0\5",
        CLIENT + b"IHAVEOPS" + bytes(8),
        CLIENT + b"IHAVEOPT" + struct.pack(">II", 7, 8193),
        CLIENT + option(1, b"\xff"),
        CLIENT + option(3) * 64,
    ],
)
def test_the_server_hangs_up(incoming: bytes) -> None:
    with pytest.raises(Corrupt):
        served(incoming)


def test_requests_as_the_server_sees_them() -> None:
    requests = nbd.Requests()
    handle, sent = requests.read(512, 1024)
    request = nbd_server.parse_request(sent)
    assert request == nbd_server.Request(0, 0, handle, 512, 1024)
    assert request.payload == 0
    write = struct.pack(">IHHQQI", 0x25609513, 1, 1, 7, 0, 4096)
    assert nbd_server.parse_request(write).payload == 4096
    with pytest.raises(Corrupt):
        nbd_server.parse_request(bytes(28))
    assert nbd_server.reply(7) == bytes.fromhex("67446698 00000000 0000000000000007")
    assert nbd_server.reply(7, "EPERM") == bytes.fromhex("67446698 00000001 0000000000000007")
    assert nbd_server.reply(7, "EODD") == bytes.fromhex("67446698 00000005 0000000000000007")


# Hostile bytes

Half = Callable[[], Generator[Any, Any, Any]]
HALVES: list[Half] = [
    lambda: nbd.greet(tls=True, allow_plain=False),
    lambda: nbd.greet(tls=False, allow_plain=False),
    lambda: nbd.open_export("name"),
    lambda: nbd_server.shake_hands(tls="refused"),
    lambda: nbd_server.shake_hands(tls="required", names=("a",)),
]
WORDS = [
    b"NBDMAGIC",
    b"IHAVEOPT",
    REPLY,
    b"\0\3",
    b"\0\0\0\1",
    b"\0\0\0\3",
    b"\x80\0\0\1",
    go(b"a"),
]
HOSTILE = st.one_of(
    st.lists(
        st.one_of(
            st.sampled_from(WORDS),
            st.binary(max_size=24),
            st.builds(option, st.integers(0, 11), st.binary(max_size=12)),
            st.builds(
                answer,
                st.integers(0, 11),
                st.sampled_from([1, 2, 3, 0x80000001]),
                st.binary(max_size=8),
            ),
        ),
        max_size=12,
    ).map(b"".join),
    st.binary(max_size=200).map(lambda tail: HELLO + tail),
    st.binary(max_size=200).map(lambda tail: CLIENT + tail),
)


@given(half=st.sampled_from(HALVES), incoming=HOSTILE, found=st.booleans())
def test_whatever_the_bytes_of_a_handshake(half: Half, incoming: bytes, found: bool) -> None:
    with contextlib.suppress(Corrupt, Refused, Ended):
        converse(half(), incoming, EXPORT if found else None, whole=False)


@given(header=st.binary(min_size=16, max_size=16) | st.binary(min_size=12, max_size=12))
def test_whatever_the_bytes_of_a_reply(header: bytes) -> None:
    requests = nbd.Requests()
    handle, _ = requests.read(0, 512)
    if len(header) == 12:
        header = REPLY_MAGIC + header
    try:
        reply = requests.reply(header)
    except Corrupt:
        return
    assert reply.handle == handle


REPLY_MAGIC = bytes.fromhex("67446698")


@given(header=st.binary(min_size=28, max_size=28))
def test_whatever_the_bytes_of_a_request(header: bytes) -> None:
    try:
        nbd_server.parse_request(header)
    except Corrupt:
        assert header[:4] != bytes.fromhex("25609513")
