from __future__ import annotations

import email
import email.policy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.formats.azure_batch import dump_batch, load_batch

KIND = "multipart/mixed; boundary=batchresponse_66925647-d0cb-4109-b6d3-28efe3e1e5ed"
# in the form of Microsoft's example of an answer, "Blob Batch"
ANSWER = (
    b"--batchresponse_66925647-d0cb-4109-b6d3-28efe3e1e5ed\r\n"
    b"Content-Type: application/http\r\n"
    b"Content-ID: 1\r\n\r\n"
    b"HTTP/1.1 404 The specified blob does not exist.\r\n"
    b"x-ms-error-code: BlobNotFound\r\n"
    b"x-ms-request-id: 778fdc83-801e-0000-62ff-0334671e2852\r\n"
    b"Content-Length: 8\r\n"
    b"Content-Type: application/xml\r\n\r\n"
    b"<Error/>\r\n"
    b"--batchresponse_66925647-d0cb-4109-b6d3-28efe3e1e5ed\r\n"
    b"Content-Type: application/http\r\n"
    b"Content-ID: 0\r\n\r\n"
    b"HTTP/1.1 202 Accepted\r\n"
    b"x-ms-delete-type-permanent: true\r\n"
    b"x-ms-version: 2021-12-02\r\n\r\n"
    b"--batchresponse_66925647-d0cb-4109-b6d3-28efe3e1e5ed--\r\n"
)


def test_each_part_is_a_request() -> None:
    """Read by Python's own reader of multipart."""
    requests = [
        ("DELETE", "/c/a%20b", {"x-ms-date": "now", "Content-Length": "0"}),
        ("DELETE", "/c/d", {"x-ms-date": "then"}),
    ]
    body = dump_batch("batch_1", requests)
    message = email.message_from_bytes(
        b"Content-Type: multipart/mixed; boundary=batch_1\r\n\r\n" + body,
        policy=email.policy.HTTP,
    )
    parts = [*message.iter_parts()]
    assert [part["Content-ID"] for part in parts] == ["0", "1"]
    assert [part.get_content_type() for part in parts] == ["application/http"] * 2
    assert parts[0].get_payload(decode=True) == (
        b"DELETE /c/a%20b HTTP/1.1\r\nx-ms-date: now\r\nContent-Length: 0\r\n\r\n"
    )
    assert not message.defects


def test_outcomes_are_known_by_their_id() -> None:
    parts = load_batch(KIND, ANSWER, 3)
    assert {number: part.status for number, part in parts.items()} == {0: 202, 1: 404}
    assert parts[1].headers["x-ms-error-code"] == "BlobNotFound"
    assert parts[1].body == b"<Error/>"


@pytest.mark.parametrize(
    ("kind", "body", "count"),
    [
        (KIND, ANSWER[:-20], 2),  # cut
        (KIND, ANSWER, 1),  # more parts than requests
        (KIND, ANSWER.replace(b"Content-ID: 1", b"Content-ID: 0"), 2),
        (KIND, ANSWER.replace(b"Content-ID: 1", b"Content-ID: 7"), 2),
        (KIND, ANSWER.replace(b"Content-ID: 1", b"Content-ID: "), 2),
        (KIND, ANSWER.replace(b"HTTP/1.1 404", b"HTTP/1.1 4"), 2),
        ("text/html", b"<html/>", 2),
        ("multipart/mixed", ANSWER, 2),
    ],
)
def test_what_is_no_answer_to_the_batch_is_corrupt(kind: str, body: bytes, count: int) -> None:
    with pytest.raises(Corrupt):
        load_batch(kind, body, count)


@given(st.binary(max_size=300))
def test_any_bytes_are_outcomes_or_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        load_batch(KIND, data, 10)
