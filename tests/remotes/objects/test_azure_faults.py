"""What Azure's service can do to us that azurite cannot be made to do."""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Conflict, NotFound, ProxyError, Refused, Unauthorized, Unreachable
from proxy.remotes.objects import azure
from proxy.remotes.objects.azure_errors import store_error
from proxy.remotes.objects.retrying import RetryingStore
from tests.remotes.objects.fake_azure import Answer, Request, Script, refusal, talking_to

if TYPE_CHECKING:
    from proxy.remotes.objects.azure import AzureStore

DATE = "Tue, 24 Nov 2026 20:00:00 GMT"
PENDING = {"x-ms-copy-id": "c-1", "x-ms-copy-status": "pending", "etag": '"0x1"'}


def properties(**headers: str) -> Answer:
    fixed = {"last-modified": DATE, "etag": '"0x1"'}
    own = {f"x-ms-{name.replace('_', '-')}": value for name, value in headers.items()}
    return Answer(200, b"", {**fixed, **own})


@pytest.mark.parametrize(
    ("status", "name", "kind", "code"),
    [
        (404, "BlobNotFound", NotFound, "ENOENT"),
        (404, "ContainerNotFound", NotFound, "ENOBUCKET"),
        (409, "ContainerBeingDeleted", Unreachable, "EAGAIN"),
        (403, "AuthenticationFailed", Unauthorized, "EACCES"),
        (403, "SomethingNew", Unauthorized, "EACCES"),
        (409, "BlobImmutableDueToPolicy", Refused, "EPERM"),
        (409, "SnapshotsPresent", Refused, "EPERM"),
        (412, "ConditionNotMet", Conflict, "EEXIST"),
        (412, "LeaseIdMissing", Refused, "EPERM"),
        (404, "CannotVerifyCopySource", NotFound, "ENOENT"),
        (403, "CannotVerifyCopySource", Unauthorized, "EACCES"),
        (409, "BlobAlreadyExists", Conflict, "EEXIST"),
        (503, "ServerBusy", Unreachable, "EAGAIN"),
        (500, "OperationTimedOut", Unreachable, "ETIMEDOUT"),
        (500, "InternalError", Unreachable, "EIO"),
        (502, "", Unreachable, "EIO"),
        (429, "", Unreachable, "EAGAIN"),
        (301, "", Refused, "EINVAL"),
        (400, "InvalidHeaderValue", Refused, "EINVAL"),
        (409, "BlobImmutableDueToLegalHold", Refused, "EPERM"),
        (409, "NobodyKnows", Refused, "EINVAL"),  # that it protects something, nobody said
        (409, "", Refused, "EINVAL"),
        (400, "Md5Mismatch", Unreachable, "EIO"),
    ],
)
async def test_a_refusal_means_one_of_our_errors(
    status: int, name: str, kind: type[ProxyError], code: str
) -> None:
    async with talking_to(Script(refusal(status, name))) as store:
        with pytest.raises(kind) as caught:
            await store.put("f", b"x")
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert caught.value.data["azureCode"] == name
    assert caught.value.data["status"] == status
    assert caught.value.data["path"] == "f"
    assert caught.value.message.startswith(f"{code}: ")


async def test_weakness_06_what_never_works_is_asked_for_once() -> None:
    """Upstream sends a request that Azure answers with 403 or 404 six times."""
    script = Script(refusal(403, "AuthenticationFailed"), refusal(404, "BlobNotFound"))
    async with talking_to(script) as store:
        again = azure_retrying(store)
        with pytest.raises(Unauthorized):
            await again.get("f", limit=10)
        with pytest.raises(NotFound):
            await again.head("f")
    assert len(script.log) == 2


async def test_what_passes_is_asked_for_again() -> None:
    script = Script(
        refusal(503, "ServerBusy"), None, refusal(500, "InternalError"), Answer(200, b"x")
    )
    async with talking_to(script) as store:
        assert await azure_retrying(store).get("f", limit=10) == b"x"
        assert store.requests() == {"GET": 4}


def azure_retrying(store: AzureStore) -> RetryingStore:
    return RetryingStore(store, waits=(0, 0, 0, 0))


async def test_weakness_10_a_read_that_fails_says_why() -> None:
    """Upstream swallows the answer and says `Expected a stream`."""
    async with talking_to(Script(refusal(403, "AuthorizationFailure"))) as store:
        with pytest.raises(Unauthorized, match="403 AuthorizationFailure"):
            await store.get_into("f", 0, memoryview(bytearray(10)))


@pytest.mark.parametrize(("seconds", "side"), [(3600, "ahead of"), (-3600, "behind")])
def test_a_wrong_clock_is_not_called_a_wrong_key(seconds: int, side: str) -> None:
    now = 1_800_000_000.0
    headers = {"x-ms-error-code": "AuthenticationFailed", "date": formatdate(now, usegmt=True)}
    error = store_error(403, headers, b"", "reading", "f", now=now + seconds)
    assert f"clock of this appliance is 60 minutes {side}" in error.message
    assert error.data["part"] == "clock"
    right = store_error(403, headers, b"", "reading", "f", now=now + seconds / 60)
    assert "clock" not in right.message


def test_an_error_shows_neither_key_nor_signature() -> None:
    message = b"first, https://h/c?sv=1&amp;sig=s3cret%3D\nsigned with s3cret"
    body = b"<Error><Code>X</Code><Message>" + message + b"</Message></Error>"
    error = store_error(400, {}, body, "reading", "f", now=time.time())
    assert "first" in error.message
    assert "s3cret" not in f"{error.message} {error.data}"


async def test_a_body_that_was_cut_is_not_read_as_short() -> None:
    whole = {"content-range": "bytes 0-9/10"}
    script = Script(Answer(206, b"0123456789", whole, torn=4), Answer(200, b"0123456789", torn=4))
    async with talking_to(script) as store:
        with pytest.raises(Unreachable):
            await store.get_into("f", 0, memoryview(bytearray(10)))
        with pytest.raises(Unreachable):
            await store.get("f", limit=100)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(206, b"01234", {"content-range": "bytes 0-4/10"}),  # fewer, and not at the end
        Answer(206, b"0123456789", {"content-range": "bytes 1-10/20"}),
        Answer(206, b"56789", {"content-range": "bytes 5-9/20"}),
        Answer(206, b"0123456789", {}),
        Answer(200, b"0123456789"),
    ],
)
async def test_weakness_10_other_bytes_than_asked_for_are_refused(answer: Answer) -> None:
    """Upstream ignores ranges on Azure and gives the whole object."""
    async with talking_to(Script(answer)) as store:
        with pytest.raises(Unreachable, match="EPROTO"):
            await store.get_into("f", 0, memoryview(bytearray(10)))


@pytest.mark.parametrize(
    "body",
    [
        b"<EnumerationResults><Blobs><Blob><Name>a</Name>",
        b"<EnumerationResults><Blobs/></EnumerationResults>",
        b"<EnumerationResults><Blobs/><NextMarker>m</NextMarker></EnumerationResults>",
    ],
)
async def test_a_listing_that_is_not_whole_is_an_error(body: bytes) -> None:
    async with talking_to(Script(Answer(200, body))) as store:
        with pytest.raises(Unreachable, match="EPROTO"):
            await store.list("", deep=True, token="m")


async def test_a_success_that_is_none_is_not_believed() -> None:
    async with talking_to(Script(Answer(200, b"<html>Welcome</html>"))) as store:
        with pytest.raises(Unreachable, match="EPROTO"):
            await store.put("f", b"x")


async def test_a_copy_under_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azure, "FIRST_WAIT", 0)
    done = properties(copy_id="c-1", copy_status="success")
    script = Script(
        Answer(202, b"", PENDING), properties(copy_id="c-1", copy_status="pending"), done
    )
    async with talking_to(script) as store:
        await store.copy("a b", "t")
    first = script.log[0]
    assert first.headers["x-ms-copy-source"].endswith("/devstoreaccount1/cont/a%20b")
    assert [request.method for request in script.log] == ["PUT", "HEAD", "HEAD"]


async def test_a_copy_that_failed_leaves_no_empty_blob() -> None:
    failed = properties(copy_id="c-1", copy_status="failed", copy_status_description="500 X")
    script = Script(
        Answer(202, b"", PENDING),
        failed,
        refusal(409, "NoPendingCopyOperation"),
        failed,
        Answer(202),
    )
    async with talking_to(script) as store:
        with pytest.raises(Unreachable, match="failed 500 X"):
            await store.copy("a", "t")
    removal = script.log[-1]
    assert (removal.method, removal.key) == ("DELETE", "t")
    assert removal.headers["if-match"] == '"0x1"'  # nothing that somebody else wrote


async def test_a_copy_that_makes_no_progress_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azure, "FIRST_WAIT", 0)
    monkeypatch.setattr(azure, "_COPY_SECONDS", 0)
    moved = [
        properties(copy_id="c-1", copy_status="pending", copy_progress=f"{count}/9")
        for count in (1, 2, 3, 3)
    ]
    gone = refusal(404, "BlobNotFound")
    script = Script(Answer(202, b"", PENDING), *moved, Answer(204), gone)
    async with talking_to(script) as store:
        with pytest.raises(Unreachable) as caught:
            await store.copy("a", "t")
    assert caught.value.code == "ETIMEDOUT"


async def test_a_cancelled_copy_is_stopped_and_removed() -> None:
    log: list[tuple[str, str]] = []
    waiting = trio.Event()

    async def answering(request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        log.append((request.method, request.headers.get("x-ms-copy-action", "")))
        if request.method == "HEAD":
            waiting.set()
            status = "aborted" if ("PUT", "abort") in log else "pending"
            return properties(copy_id="c-1", copy_status=status)
        return Answer(204) if log[-1][1] else Answer(202, b"", PENDING)

    async with talking_to(answering) as store, trio.open_nursery() as nursery:
        nursery.start_soon(store.copy, "a", "t")
        await waiting.wait()
        nursery.cancel_scope.cancel()
    assert [each for each in log if each[0] != "HEAD"] == [
        ("PUT", ""),
        ("PUT", "abort"),
        ("DELETE", ""),
    ]


async def test_a_copy_that_somebody_wrote_over_is_none() -> None:
    other = properties(copy_id="c-2", copy_status="success")
    script = Script(Answer(202, b"", PENDING), other, refusal(409, "NoPendingCopyOperation"), other)
    async with talking_to(script) as store:
        with pytest.raises(Conflict) as caught:
            await store.copy("a", "t")
    assert caught.value.code == "ESTALE"
    assert "DELETE" not in [request.method for request in script.log]


def batch(*parts: tuple[int, str]) -> Answer:
    body = "".join(
        f"--b\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
        f"HTTP/1.1 {rest}\r\n\r\n"
        for number, rest in parts
    )
    return Answer(202, f"{body}--b--\r\n".encode(), {"Content-Type": "multipart/mixed; boundary=b"})


async def test_weakness_11_each_blob_of_a_batch_has_its_own_outcome() -> None:
    """Upstream looks at no part of the answer to a batch."""
    answer = batch(
        (0, "202 Accepted"),
        (1, "409 No\r\nx-ms-error-code: BlobImmutableDueToPolicy"),
        (2, "404 No\r\nx-ms-error-code: BlobNotFound"),
        (4, "503 No\r\nx-ms-error-code: ServerBusy"),
    )
    script = Script(answer)
    async with talking_to(script) as store:
        outcomes = await store.delete_many(["a", "b", "c", "d", "e"])
    assert outcomes[0] is None
    assert isinstance(outcomes[1], Refused)
    assert outcomes[1].data["path"] == "b"
    assert outcomes[2] is None  # it is gone, which is what was asked for
    assert isinstance(outcomes[3], Unreachable)  # nothing is known of it
    assert isinstance(outcomes[4], Unreachable)
    assert re.findall(rb"DELETE (\S+) ", script.log[0].body)[3].endswith(b"/cont/d")


async def test_without_batches_blobs_go_one_by_one() -> None:
    script = Script(refusal(400, "InvalidQueryParameterValue"), *[Answer(202)] * 4)
    async with talking_to(script) as store:
        assert await store.delete_many(["a", "b"]) == [None, None]
        assert await store.delete_many(["c", "d"]) == [None, None]  # not tried again
    assert [request.method for request in script.log] == ["POST", *["DELETE"] * 4]


async def test_one_transient_failure_does_not_end_batches() -> None:
    """Upstream goes over to single deletes for the rest of the run."""
    script = Script(refusal(503, "ServerBusy"), batch((0, "202 Yes"), (1, "202 Yes")))
    async with talking_to(script) as store:
        with pytest.raises(Unreachable):
            await store.delete_many(["a", "b"])
        assert await store.delete_many(["a", "b"]) == [None, None]


async def test_a_range_is_copied_by_the_service_with_a_permission_of_its_own() -> None:
    script = Script(Answer(201), Answer(201))
    async with talking_to(script) as store:
        upload = await store.upload("t")
        await upload.copy(1, "a b", 10, 20)
        await upload.complete()
    asked = script.log[0]
    assert asked.headers["x-ms-source-range"] == "bytes=10-29"
    assert re.search(r"/cont/a%20b\?sv=.*&sr=b&sp=r&sig=", asked.headers["x-ms-copy-source"])
    assert asked.query["blockid"].encode() in script.log[1].body


async def test_a_list_whose_answer_was_lost_can_be_sent_again() -> None:
    script = Script(Answer(201), None, Answer(201))
    async with talking_to(script) as store:
        upload = await store.upload("t")
        await upload.send(1, b"x")
        with pytest.raises(Unreachable):
            await upload.complete()
        await upload.complete()
    assert script.log[1].body == script.log[2].body
    assert b"<Latest>" in script.log[1].body  # also finds blocks that are committed by now


async def test_a_list_with_a_gap_is_not_sent() -> None:
    async with talking_to(Script(Answer(201))) as store:
        upload = await store.upload("t")
        await upload.send(2, b"x")
        with pytest.raises(Refused, match="lacks a part"):
            await upload.complete()


async def test_more_blocks_than_a_blob_can_have_are_refused() -> None:
    async with talking_to(Script()) as store:
        upload = await store.upload("t")
        upload._blocks = {number: ["YQ=="] for number in range(1, store.limits.most_parts + 2)}
        with pytest.raises(Refused) as caught:
            await upload.complete()
    assert caught.value.code == "EFBIG"


async def test_nothing_is_tried_out_where_it_could_not_be_removed() -> None:
    locked = Answer(
        200, b"", {"x-ms-has-immutability-policy": "true", "server": "Windows-Azure-Blob/1.0"}
    )
    script = Script(locked)
    async with talking_to(script) as store:
        found = await store.capabilities()
        assert await store.capabilities() == found
    assert found["objectLock"] is True
    assert found["conditionalPut"] is True
    assert len(script.log) == 1


async def test_a_store_that_ignores_conditions_is_found_out() -> None:
    async def answering(request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        if request.method == "HEAD":
            return properties() if "restype" in request.query else refusal(404, "BlobNotFound")
        if request.method == "POST":
            return refusal(501, "NotImplemented")
        return Answer(202 if request.method == "DELETE" else 201, b"", {"etag": '"0x1"'})

    async with talking_to(answering) as store:
        found = await store.capabilities()
    assert found["conditionalPut"] is False
    assert found["conditionalDelete"] is False
    assert found["batchDelete"] is False
