"""The S3 remote against servers that fail, lie, lack things or are hostile."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from proxy.errors import (
    Conflict,
    Corrupt,
    NotFound,
    ProxyError,
    Refused,
    Unauthorized,
    Unreachable,
)
from proxy.remotes import RemoteOptions, open_remote, opened_remote
from proxy.remotes.objects.parts import BUDGET, Sizes
from proxy.remotes.objects.remote import ObjectRemote
from proxy.remotes.objects.s3 import S3Store
from proxy.remotes.objects.s3_client import S3Client
from proxy.remotes.objects.s3_endpoint import S3Endpoint
from proxy.remotes.url import S3Url, parse_url
from proxy.remotes.wrapper import innermost
from proxy.runtime.background import background
from tests import certificates
from tests.remotes.conftest import OPTIONS
from tests.remotes.objects.conftest import TRIES, opened_s3
from tests.remotes.objects.fake_s3 import Answer, FakeS3, serving

pytestmark = pytest.mark.usefixtures("quick")
MIB = 1024 * 1024


# -- where it is


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://k:s@s3.eu-west-3.amazonaws.com/b", "eu-west-3"),
        ("s3://k:s@s3-us-west-2.amazonaws.com/b", "us-west-2"),
        ("s3://k:s@s3.dualstack.eu-north-1.amazonaws.com/b", "eu-north-1"),
        ("s3://k:s@s3.us-gov-west-1.amazonaws.com:443/b", "us-gov-west-1"),
        ("s3://k:s@s3.amazonaws.com/b", "us-east-1"),
        ("s3://k:s@minio:9000/b#somewhere", "somewhere"),
        ("s3://k:s@s3.eu-west-3.amazonaws.com/b#other", "other"),
        ("s3://k:s@s3.eu-west-3.amazonaws.com.evil.com/b", "us-east-1"),
    ],
)
def test_the_region_is_said_or_guessed_from_amazons_names(url: str, expected: str) -> None:
    assert endpoint(url).region == expected


def endpoint(url: str) -> S3Endpoint:
    parsed = parse_url(url)
    assert isinstance(parsed, S3Url)
    return S3Endpoint.of(parsed)


def test_bucket_prefix_and_port() -> None:
    found = endpoint("s3+http://k:s@[::1]:9000/bkt//dir/sub/")
    assert (found.host, found.port, found.tls) == ("::1", 9000, False)
    assert (found.bucket, found.prefix) == ("bkt", "dir/sub")
    assert endpoint("s3://k:s@h/bkt").port == 443


def test_weakness_23_https_stays_https_through_format() -> None:
    """Upstream writes s3+http:// for a remote without a protocol."""
    parsed = parse_url("s3://k:s3cret@h/b")
    assert parse_url(parsed.format()) == parsed
    assert endpoint(parsed.format()).tls


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("s3://k:s@h", "bucket"),
        ("s3://k:s@h/", "bucket"),
        ("s3://h/b", "username"),
        ("s3://k@h/b", "username"),
        ("s3://k:s@h:99999/b", "host"),
        ("s3://k:s@h:x/b", "host"),
        ("s3://k:s@h/b?minPartSize=1", "minPartSize"),
        ("s3://k:s@h/b?minPartSize=67108865", "minPartSize"),
        ("s3://k:s@h/b?maxPartNumber=10001", "maxPartNumber"),
        ('s3://k:s@h/b?maxPartSize="big"', "maxPartSize"),
    ],
)
async def test_what_is_wrong_in_the_url_is_named(url: str, part: str) -> None:
    with pytest.raises(Refused) as caught:
        await open_remote({"url": url}, options=OPTIONS)
    assert caught.value.code == "EINVAL"
    assert caught.value.data["part"] == part


@pytest.mark.parametrize(
    ("spoil", "kind", "code", "part"),
    [
        (lambda url: url.replace("/bucket", "/nobody"), Unreachable, "ENOBUCKET", "bucket"),
        (lambda url: url.replace("fakekey:", "otherkey:"), Unauthorized, "EACCES", "username"),
        (lambda url: f"{url}x", None, "", ""),
    ],
)
async def test_what_is_wrong_at_the_store_is_named(
    spoil: Any, kind: type[ProxyError] | None, code: str, part: str
) -> None:
    async with serving(FakeS3()) as server:
        spec = {"url": spoil(server.url("dir"))}
        if kind is None:
            async with opened_remote(spec, options=OPTIONS) as remote:
                assert await remote.list("") == []
            return
        with pytest.raises(kind) as caught:
            await open_remote(spec, options=OPTIONS)
        assert caught.value.code == code
        assert caught.value.data["part"] == part
        assert "fakesecretkey" not in f"{caught.value} {caught.value.data}"


@pytest.mark.parametrize(
    ("status", "code", "inside", "part", "text"),
    [
        (403, "SignatureDoesNotMatch", "", "password", "secret is wrong"),
        (403, "RequestTimeTooSkewed", "", "clock", "clock of this machine differs from the store"),
        (
            400,
            "AuthorizationHeaderMalformed",
            "<Region>eu-south-1</Region>",
            "region",
            "eu-south-1",
        ),
        (301, "PermanentRedirect", "", "region", "another region"),
    ],
)
async def test_credentials_clock_and_region_are_told_apart(
    status: int, code: str, inside: str, part: str, text: str
) -> None:
    async with serving(FakeS3()) as server:
        body = f"<Error><Code>{code}</Code>{inside}</Error>".encode()
        server.fail("object-lock", answer=lambda _: Answer(status, body))
        with pytest.raises((Refused, Unauthorized), match=text) as caught:
            await open_remote({"url": server.url()}, options=OPTIONS)
        assert caught.value.data["part"] == part
        assert server.verbs() == ["object-lock"], "nothing of that passes by itself"


@pytest.mark.parametrize(
    ("query", "first", "largest"),
    [
        ("", 8 * MIB, 64 * MIB),
        (f"?minPartSize={16 * MIB}", 16 * MIB, 64 * MIB),
        (f"?minPartSize={64 * MIB}", 64 * MIB, 64 * MIB),
        (f"?maxPartSize={6 * MIB}", 6 * MIB, 6 * MIB),
    ],
)
async def test_a_server_with_narrower_limits_gets_parts_within_them(
    query: str, first: int, largest: int
) -> None:
    async with opened_s3(query) as (remote, _):
        sizes = Sizes(remote._store.limits, BUDGET)
        assert (sizes.of(1), sizes.largest) == (first, largest)


async def test_a_server_that_is_no_s3_is_named() -> None:
    async with serving(FakeS3()) as server:
        for verb in ("object-lock", "list"):
            server.fail(verb, answer=lambda _: Answer(404, b"<html>Not here</html>"))
        with pytest.raises(ProxyError, match="does not answer as S3 does") as caught:
            await open_remote({"url": server.url()}, options=OPTIONS)
        assert (caught.value.code, caught.value.data["part"]) == ("ENOENT", "host")


async def test_a_server_that_is_not_there_is_unreachable() -> None:
    with pytest.raises(Unreachable):
        await open_remote({"url": "s3+http://k:s@127.0.0.1:1/b"}, options=OPTIONS)


async def test_weakness_5_a_silent_server_is_given_up_after_the_configured_time() -> None:
    """Upstream ignores its setting: a call hangs for 20 minutes, six times."""
    async with serving(FakeS3()) as server:
        server.fail("object-lock", times=99, waits=trio.Event())
        options = RemoteOptions(operation_seconds=0.05)
        started = time.monotonic()
        with pytest.raises(Unreachable, match="nothing happened"):
            await open_remote({"url": server.url()}, options=options)
        assert time.monotonic() - started < 10


# -- object lock


@pytest.mark.parametrize(
    ("lock", "immutable", "md5"),
    [
        ("none", False, False),
        ("unknown", False, False),
        ("forbidden", False, True),
        ("Enabled", True, True),
        ("Disabled", False, False),
    ],
)
async def test_object_lock_makes_it_immutable_and_demands_content_md5(
    lock: str, *, immutable: bool, md5: bool
) -> None:
    async with opened_s3(lock=lock) as (remote, server):
        assert remote.is_immutable is immutable
        await remote.write_file("f", b"x")
        puts = [request for request in server.log if request.key == "dir/f"]
        assert all(("content-md5" in request.headers) is md5 for request in puts)
        assert (await remote.capabilities())["objectLock"] is immutable


async def test_the_option_makes_it_immutable_too() -> None:
    async with opened_s3("?immutable=true") as (remote, _):
        await remote.write_file("f", b"1")
        with pytest.raises(Conflict, match="EEXIST"):
            await remote.write_file("f", b"2")
        with pytest.raises(Refused, match="EPERM"):
            await remote.rename("f", "g")


# -- names


NAMES = ["a b+c%20d", "é/ü&=?#", "x<y>&amp;", "tab\there", "new\nline", "~.-_*'()", "🙂"]


async def test_weakness_11_any_name_can_be_written_listed_copied_and_removed() -> None:
    """Upstream does not encode the source of a copy."""
    async with opened_s3(prefix="some dir/é+") as (remote, server):
        for name in NAMES:
            await remote.write_file(name, name.encode())
        found = {path async for path, _ in remote.walk("")}
        assert found == set(NAMES)
        for name in NAMES:
            await remote.rename(name, f"to/{name}")
            assert await remote.read_file(f"to/{name}") == name.encode()
        await remote.rmtree("to")
        assert server.objects == {}


# -- reading


async def test_weakness_10_ranges_are_honoured_and_what_is_missing_is_enoent() -> None:
    """Upstream's streams ignore start and end; size and read of what is missing have no ENOENT."""
    async with opened_s3() as (remote, server):
        await remote.write_file("f", bytes(range(100)))
        async with remote.open_read("f") as file:
            assert await file.read_at(10, 5) == bytes(range(10, 15))
        assert server.log[-1].headers["range"] == "bytes=10-14"
        for call in (remote.stat("no"), remote.read_file("no")):
            with pytest.raises(NotFound) as caught:
                await call
            assert caught.value.code == "ENOENT"


async def test_a_server_without_ranges_still_serves_the_start() -> None:
    async with opened_s3(ranges=False) as (remote, _):
        await remote.write_file("f", bytes(range(100)))
        async with remote.open_read("f") as file:
            assert await file.read_at(0, 7) == bytes(range(7))
            with pytest.raises(Unreachable, match="other bytes"):
                await file.read_at(1, 7)


@pytest.mark.parametrize("conditions", [True, False])
async def test_an_object_that_is_replaced_is_never_mixed(*, conditions: bool) -> None:
    async with opened_s3(conditions=conditions) as (remote, _):
        await remote.write_file("f", b"a" * 100)
        async with remote.open_read("f") as file:
            assert await file.read_at(0, 5) == b"aaaaa"
            await remote.write_file("f", b"b" * 100)
            with pytest.raises(Conflict) as caught:
                await file.read_at(5, 5)
            assert caught.value.code == "ESTALE"


async def test_reading_straight_through_is_read_ahead() -> None:
    content = bytes(range(256)) * 4096 * 13 + b"end"
    async with opened_s3() as (remote, server):
        await remote.write_file("f", content)
        server.log.clear()
        before = server.connections
        got = bytearray()
        async with remote.open_read("f") as file:
            piece = memoryview(bytearray(700_000))
            while count := await file.read_into(piece):
                got += piece[:count]
        assert bytes(got) == content
        assert server.verbs().count("get") < 10
        assert server.connections >= before + 3


async def test_a_torn_body_is_read_again_and_a_reader_goes_on_after_an_error() -> None:
    content = bytes(range(256)) * 4096 * 9
    async with opened_s3() as (remote, server):
        await remote.write_file("f", content)
        server.fail("get", torn=5)
        assert await remote.read_file("f") == content
        got = bytearray()
        failures = 0
        async with remote.open_read("f") as file:
            piece = memoryview(bytearray(1_000_000))
            while True:
                if len(got) == 1_000_000 and not failures:
                    server.fail("get", torn=5, times=TRIES * 5)
                try:
                    count = await file.read_into(piece)
                except Unreachable:
                    failures += 1
                    continue
                if not count:
                    break
                got += piece[:count]
        assert bytes(got) == content
        assert failures > 0


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 0-9/100"},
        {"Content-Range": "bytes 10-99/100"},
        {"Content-Range": "bytes 10-12/100"},
        {"Content-Range": "nonsense"},
    ],
)
async def test_a_server_that_sends_other_bytes_is_not_believed(headers: dict[str, str]) -> None:
    async with opened_s3() as (remote, server):
        await remote.write_file("f", bytes(100))
        async with remote.open_read("f") as file:
            server.fail(
                "get",
                times=99,
                answer=lambda a: Answer(206, bytes(10), {**a.headers, **headers}),
            )
            with pytest.raises(Unreachable, match="other bytes"):
                await file.read_at(10, 10)


async def test_a_huge_object_is_not_read_into_memory() -> None:
    async with opened_s3() as (remote, server):
        server.fail("get", answer=lambda _: Answer(200, b"x", {"content-length": str(1 << 40)}))
        with pytest.raises(Corrupt):
            await remote.read_file("f")


# -- listings


def listing(inside: str) -> Answer:
    return Answer(200, f"<ListBucketResult>{inside}</ListBucketResult>".encode())


@pytest.mark.parametrize(
    "inside",
    [
        "<IsTruncated>true</IsTruncated>",
        "",
        "<IsTruncated>perhaps</IsTruncated>",
        "<IsTruncated>false</IsTruncated><Contents><Key>other/f</Key></Contents>",
        "<IsTruncated>false</IsTruncated><Contents><Size>1</Size></Contents>",
        "<IsTruncated>false</IsTruncated><Contents><Key>dir/f</Key><Size>x</Size></Contents>",
        "<IsTruncated>false</IsTruncated><CommonPrefixes/>",
    ],
)
async def test_a_listing_that_is_not_whole_is_an_error_and_nothing_is_deleted(inside: str) -> None:
    async with opened_s3() as (remote, server):
        await remote.write_file("t/f", b"x")
        server.fail("list", times=999, answer=lambda _: listing(inside))
        for call in (remote.list(""), remote.rmtree("t"), remote.stat("none")):
            with pytest.raises(Unreachable) as caught:
                await call
            assert caught.value.code == "EPROTO"
        assert "dir/t/f" in server.objects


async def test_a_listing_that_goes_in_circles_ends() -> None:
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t{}</NextContinuationToken>"
    async with opened_s3() as (remote, server):
        turns = iter(range(1000))
        server.fail("list", times=999, answer=lambda _: listing(more.format(next(turns) % 3)))
        with pytest.raises(Unreachable, match="circles"):
            await remote.list("")


async def test_a_page_that_fails_in_the_middle_is_no_partial_list() -> None:
    async with opened_s3(page=3) as (remote, server):
        for number in range(10):
            await remote.write_file(f"{number}", b"")
        second = [0]

        def later(request: Any) -> bool:
            second[0] += "continuation-token" in request.query
            return second[0] > 1

        server.fail("list", times=999, status=500, code="InternalError", when=later)
        with pytest.raises(Unreachable):
            await remote.list("")


@pytest.mark.parametrize(
    "document",
    [
        b'<!DOCTYPE x [<!ENTITY a "aaaa">]><ListBucketResult>&a;</ListBucketResult>',
        b"<a>" * 100,
        b"<ListBucketResult>" + b"<x/>" * 40_000 + b"</ListBucketResult>",
        b"no xml at all",
        b"\xff\xfe\x00",
        b"<html><body>proxy</body></html>",
    ],
)
async def test_hostile_documents_are_refused(document: bytes) -> None:
    async with opened_s3() as (remote, server):
        server.fail("list", times=99, answer=lambda _: Answer(200, document))
        with pytest.raises(Unreachable) as caught:
            await remote.list("")
        assert caught.value.code == "EPROTO"


async def test_console_markers_and_unreachable_names_do_not_disturb() -> None:
    async with opened_s3() as (remote, server):
        for key in ("dir/empty/", "dir/d//x", "dir/d/../y", "dir/d/f"):
            server._store(key, b"")
        assert [entry.name for entry in await remote.list("")] == ["d", "empty"]
        assert await remote.list("empty") == []
        assert [entry.name for entry in await remote.list("d")] == ["f"]
        assert [path async for path, _ in remote.walk("")] == ["d/f"]
        await remote.rmdir("empty")
        await remote.rmtree("d")
        assert server.objects == {}


async def test_a_bucket_that_vanishes_is_not_an_empty_one() -> None:
    async with opened_s3() as (remote, server):
        server.fail("*", times=99, status=404, code="NoSuchBucket")
        for call in (remote.list(""), remote.read_file("f"), remote.stat("f"), remote.rmtree("d")):
            with pytest.raises(Unreachable) as caught:
                await call
            assert caught.value.code == "ENOBUCKET"


# -- what passes and what does not


LARGE = bytes(range(256)) * 4096 * 9


async def write_large(remote: Any, **how: Any) -> None:
    async with remote.create("large", **how) as file:
        for first in range(0, len(LARGE), MIB):
            await file.write(LARGE[first : first + MIB])
        await file.commit()


STEPS: dict[str, Any] = {
    "get": lambda remote: remote.read_file("f"),
    "head": lambda remote: remote.stat("f"),
    "list": lambda remote: remote.list(""),
    "put": lambda remote: remote.write_file("g", b"new"),
    "copy": lambda remote: remote.rename("f", "g"),
    "delete": lambda remote: remote.unlink("f"),
    "batch": lambda remote: remote.rmtree("t"),
    "begin": write_large,
    "part": write_large,
    "complete": write_large,
}


@pytest.mark.parametrize("verb", STEPS)
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500, "code": "InternalError"},
        {"status": 503, "code": "SlowDown"},
        {"reset": True},
        {"reset": True, "after": True},
        {"status": 500, "code": "InternalError", "after": True},
    ],
    ids=["500", "503", "reset", "reset-after", "500-after"],
)
async def test_what_passes_is_tried_again_with_one_effect(verb: str, fault: dict[str, Any]) -> None:
    async with opened_s3() as (remote, server):
        for name in ("f", "t/a", "t/b"):
            await remote.write_file(name, b"old")
        server.fail(verb, times=2, **fault)
        await STEPS[verb](remote)
        assert all(each.times == 0 for each in server.faults)
        expected = {"dir/f", "dir/t/a", "dir/t/b"}
        expected -= {"copy": {"dir/f"}, "delete": {"dir/f"}}.get(verb, set())
        expected -= {"dir/t/a", "dir/t/b"} if verb == "batch" else set()
        expected |= {"put": {"dir/g"}, "copy": {"dir/g"}}.get(verb, set())
        expected |= {"dir/large"} if verb in ("begin", "part", "complete") else set()
        assert set(server.objects) == expected
        if "dir/large" in expected:
            assert server.objects["dir/large"].data == LARGE
        if verb == "begin" and fault.get("after"):
            return  # an upload that we do not know holds no part
        assert server.uploads == {}


@pytest.mark.parametrize("status", [401, 403, 404, 405])
@pytest.mark.parametrize("verb", ["get", "put", "list"])
async def test_weakness_6_what_does_not_pass_is_asked_once(verb: str, status: int) -> None:
    """Upstream repeats whatever it does not know, refusals and its own bugs as well."""
    async with opened_s3() as (remote, server):
        server.fail(verb, times=99, status=status)
        with pytest.raises((Unauthorized, NotFound, Refused)):
            await STEPS[verb](remote)
        assert server.verbs().count(verb) == 1


async def test_a_store_that_stays_away_is_an_error_after_all_tries() -> None:
    async with opened_s3() as (remote, server):
        server.fail("get", times=99, status=503, code="SlowDown")
        with pytest.raises(Unreachable, match="go slower"):
            await remote.read_file("f")
        assert server.verbs().count("get") == TRIES


@pytest.mark.parametrize("verb", ["copy", "complete"])
async def test_an_error_inside_a_good_answer_is_an_error(verb: str) -> None:
    async with opened_s3() as (remote, server):
        await remote.write_file("f", b"old")
        server.fail(verb, times=99, status=200, code="InternalError")
        with pytest.raises(Unreachable, match="internal error"):
            await STEPS[verb](remote)
        assert set(server.objects) == {"dir/f"}
        assert server.uploads == {}


@pytest.mark.parametrize("verb", ["copy", "complete"])
async def test_an_answer_that_confirms_nothing_is_an_error(verb: str) -> None:
    async with opened_s3() as (remote, server):
        await remote.write_file("f", b"old")
        name = {"copy": "CopyObjectResult", "complete": "CompleteMultipartUploadResult"}[verb]
        server.fail(verb, times=99, answer=lambda _: Answer(200, f"<{name}/>".encode()))
        with pytest.raises((Unreachable, Corrupt)):
            await STEPS[verb](remote)
        assert "dir/f" in server.objects


async def test_a_refusal_in_the_middle_of_a_body_is_told() -> None:
    """The server answers and closes without reading everything."""
    async with trio.open_nursery() as nursery:

        async def refuse(stream: trio.SocketStream) -> None:
            async with stream:
                received = b""
                while b"\r\n\r\n" not in received:
                    received += await stream.receive_some(100)
                await stream.send_all(
                    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
                stream.socket.shutdown(trio.socket.SHUT_WR)

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, refuse, listeners)
        client = S3Client(
            endpoint(f"s3+http://k:s@127.0.0.1:{port}/b"), access_key="k", secret_key="s"
        )
        with pytest.raises(Unauthorized):
            await S3Store(client).put("f", bytes(32 * MIB))
        nursery.cancel_scope.cancel()


# -- exclusive


async def test_weakness_13_exclusive_is_decided_by_the_store() -> None:
    """Upstream's `wx` overwrites on object stores."""
    async with opened_s3() as (remote, server):
        await remote.write_file("f", b"1", exclusive=True)
        with pytest.raises(Conflict, match="EEXIST"):
            await remote.write_file("f", b"2", exclusive=True)
        assert "head" not in server.verbs()[-1:]
        assert server.objects["dir/f"].data == b"1"


@pytest.mark.parametrize("fault", [{"reset": True, "after": True}, {"status": 500, "after": True}])
async def test_weakness_13_a_repeated_exclusive_write_knows_its_own(fault: dict[str, Any]) -> None:
    """Upstream gives up exclusivity on a retry."""
    async with opened_s3() as (remote, server):
        await remote.capabilities()
        server.fail("put", **fault)
        await remote.write_file("f", b"ours", exclusive=True)
        server.fail("put", **{**fault, "after": False}, when=lambda _: foreign())

        def foreign() -> bool:
            server._store("dir/g", b"theirs")
            return True

        with pytest.raises(Conflict, match="EEXIST"):
            await remote.write_file("g", b"ours", exclusive=True)
        assert server.objects["dir/g"].data == b"theirs"


async def test_weakness_13_a_repeated_exclusive_upload_knows_its_own() -> None:
    async with opened_s3() as (remote, server):
        server.fail("complete", reset=True, after=True)
        await write_large(remote, exclusive=True)
        assert server.objects["dir/large"].data == LARGE
        with pytest.raises(Conflict, match="EEXIST"):
            await write_large(remote, exclusive=True)


# -- removing


async def test_weakness_11_errors_inside_a_good_answer_of_a_batch_are_told() -> None:
    """Upstream does not look at them; the others are removed all the same."""
    async with opened_s3() as (remote, server):
        for name in ("a", "b"):
            await remote.write_file(f"t/{name}", b"")
        server._store("dir/t/forbidden", b"")
        with pytest.raises(Unauthorized, match="forbidden"):
            await remote.rmtree("t")
        assert set(server.objects) == {"dir/t/forbidden"}


async def test_weakness_11_one_failure_does_not_switch_to_slow_deletes_for_good() -> None:
    async with opened_s3() as (remote, server):
        for turn in ("t", "u"):
            for number in range(5):
                await remote.write_file(f"{turn}/{number}", b"")
        server.fail("batch", status=503, code="SlowDown")
        await remote.rmtree("t")
        await remote.rmtree("u")
        assert server.objects == {}
        assert server.verbs().count("batch") == 3
        assert "delete" not in server.verbs()


async def test_a_store_without_batches_is_asked_once_for_them() -> None:
    async with opened_s3(batches=False) as (remote, server):
        for turn in ("t", "u"):
            for number in range(20):
                await remote.write_file(f"{turn}/{number}", b"")
        await remote.rmtree("t")
        await remote.rmtree("u")
        assert server.objects == {}
        assert server.verbs().count("batch") == 1
        assert server.verbs().count("delete") == 40


async def test_a_batch_that_is_silent_about_a_key_is_not_believed() -> None:
    async with opened_s3() as (remote, server):
        for number in range(3):
            await remote.write_file(f"t/{number}", b"")
        silent = Answer(200, b"<DeleteResult></DeleteResult>")
        server.fail("batch", times=99, answer=lambda _: silent)
        with pytest.raises(Unreachable, match="does not say whether"):
            await remote.rmtree("t")


async def test_rmtree_removes_what_a_late_listing_shows() -> None:
    async with opened_s3() as (remote, server):
        for number in range(3):
            await remote.write_file(f"t/{number}", b"")
        server.hidden = {"dir/t/1"}

        def catches_up(answer: Answer) -> Answer:
            server.hidden = set()
            return answer

        fault = server.fail("batch", answer=catches_up)
        await remote.rmtree("t")
        assert fault.times == 0
        assert server.objects == {}


async def test_weakness_11_unlink_is_one_request() -> None:
    """Upstream sends four: it removes before it looks for a directory, and a checksum as well."""
    async with opened_s3() as (remote, server):
        await remote.write_file("d/f", b"")
        server.log.clear()
        await remote.unlink("d/f")
        assert server.verbs() == ["delete"]


async def test_a_rename_is_never_a_loss() -> None:
    """Weakness 11: a crash between copy and removal shows both names; an error does too."""
    async with opened_s3() as (remote, server):
        await remote.write_file("f", b"x")
        server.fail("delete", times=99, status=403, code="AccessDenied")
        with pytest.raises(Unauthorized):
            await remote.rename("f", "g")
        assert set(server.objects) == {"dir/f", "dir/g"}
        server.faults.clear()
        server.fail("copy", times=99, status=403, code="AccessDenied")
        with pytest.raises(Unauthorized):
            await remote.rename("g", "h")
        assert set(server.objects) == {"dir/f", "dir/g"}


async def test_a_rename_to_itself_keeps_it() -> None:
    async with opened_s3() as (remote, server):
        await remote.write_file("f", b"x")
        await remote.rename("f", "./f")
        assert server.objects["dir/f"].data == b"x"


async def test_an_abort_is_verified() -> None:
    """Parts under way may arrive behind an abort and would be paid for until somebody looks."""
    async with opened_s3() as (remote, server):
        kept: dict[str, Any] = {}

        def late(answer: Answer) -> Answer:
            server.uploads.update(kept)
            return answer

        server.fail("abort", answer=late)
        async with remote.create("large") as file:
            await file.write(LARGE)
            while not server.uploads:
                await trio.sleep(0.01)
            kept.update(server.uploads)
        assert server.uploads == {}
        assert server.verbs().count("abort") == 2


# -- what it can do


async def test_capabilities_are_found_out_once_and_leave_nothing() -> None:
    async with opened_s3() as (remote, server):
        found = await remote.capabilities()
        assert found == {
            "conditionalPut": True,
            "conditionalDelete": True,
            "checksums": True,
            "copy": True,
            "batchDelete": True,
            "objectLock": False,
            "contentMd5": False,
            "lock": "conditional",
        }
        count = len(server.log)
        assert await remote.capabilities() == found
        assert len(server.log) == count < 14
        assert server.objects == {}


async def test_what_a_server_lacks_is_said() -> None:
    lacking: dict[str, Any] = {"conditions": False, "conditional_delete": False, "batches": False}
    async with opened_s3(**lacking) as (remote, server):
        server.fail("copy", times=9, status=501)
        found = await remote.capabilities()
        wrong = {name for name, can in found.items() if not can} - {"objectLock", "contentMd5"}
        assert wrong == {"conditionalPut", "conditionalDelete", "batchDelete", "copy"}
        assert found["lock"] == "write-then-verify"
        assert server.objects == {}


async def test_requests_are_counted_by_verb() -> None:
    async with opened_s3() as (remote, _):
        before = dict(remote.requests())
        await remote.write_file("f", b"x")
        await remote.read_file("f")
        await remote.rename("f", "g")
        after = dict(remote.requests())
        grown = {verb: after[verb] - before.get(verb, 0) for verb in after}
        assert {verb: count for verb, count in grown.items() if count} == {
            "PUT": 1,
            "GET": 1,
            "COPY": 1,
            "DELETE": 1,
        }


async def test_connections_are_kept() -> None:
    async with opened_s3() as (remote, server):
        before = server.connections
        for number in range(20):
            await remote.write_file(f"{number}", b"x" * 300_000)
            await remote.read_file(f"{number}")
            with pytest.raises(NotFound):
                await remote.read_file("none")
            with pytest.raises(NotFound):
                await remote.stat("none")
        assert server.connections == before


async def test_a_cancel_does_not_keep_its_connections_open() -> None:
    """A daemon that stops closes its remotes in cancelled tasks."""
    async with serving(FakeS3()) as fake:
        with trio.CancelScope() as scope:
            async with opened_remote({"url": fake.url("dir")}, options=OPTIONS) as remote:
                store = innermost(remote)
                assert isinstance(store, ObjectRemote)
                await remote.write_file("f", b"x")
                scope.cancel()
                await trio.lowlevel.checkpoint()
        with pytest.raises(Refused, match="EBADF"):
            await store.stat("f")
        assert store._store._inner._client._pool._idle == deque()  # type: ignore[attr-defined]


@pytest.mark.parametrize("option", ["", "?allowUnauthorized=true"])
async def test_a_self_signed_endpoint_is_taken_by_option_alone(option: str, tmp_path: Path) -> None:
    identity = certificates.make("s3")
    certificates.write(identity, tmp_path, authority=identity)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server-cert.pem", tmp_path / "server-key.pem")

    async def forward(outside: trio.SSLStream[trio.SocketStream]) -> None:
        async def pump(source: trio.abc.ReceiveStream, target: trio.abc.SendStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async for piece in source:
                    await target.send_all(piece)
            nursery.cancel_scope.cancel()

        async with await trio.open_tcp_stream("127.0.0.1", fake.port) as inside:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump, outside, inside)
                nursery.start_soon(pump, inside, outside)

    async with serving(FakeS3()) as fake, background() as tasks:
        (listener,) = await tasks.start(
            partial(trio.serve_ssl_over_tcp, forward, 0, context, host="127.0.0.1")
        )
        port = listener.transport_listener.socket.getsockname()[1]
        url = f"s3://fakekey:fakesecretkey@127.0.0.1:{port}/bucket{option}"
        if option:
            async with opened_remote({"url": url}, options=OPTIONS) as remote:
                await remote.write_file("f", b"x")
            assert fake.objects["f"].data == b"x"
        else:
            with pytest.raises(Unreachable) as caught:
                await open_remote({"url": url}, options=OPTIONS)
            assert caught.value.code == "DEPTH_ZERO_SELF_SIGNED_CERT"
            assert fake.log == []
