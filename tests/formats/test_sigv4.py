"""Signatures against botocore's, which made them for Amazon for a decade."""

from __future__ import annotations

import datetime
import hashlib
import time
from unittest import mock

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats import sigv4

KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
NAMES = st.sampled_from(["x-amz-copy-source", "range", "if-match", "content-md5", "content-type"])
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


def theirs(method: str, path: str, query: str, headers: dict[str, str], body: bytes) -> str:
    url = f"https://{headers['host']}{path}" + (f"?{query}" if query else "")
    request = AWSRequest(method=method, url=url, headers=headers, data=body)
    auth = S3SigV4Auth(Credentials(KEY, SECRET), "s3", "eu-west-1")
    stamp = datetime.datetime.fromtimestamp(1_800_000_000, datetime.UTC)
    now = stamp.replace(tzinfo=None)
    with (
        mock.patch("botocore.auth.get_current_datetime", return_value=now),
        mock.patch.object(auth, "_should_sha256_sign_payload", return_value=True),
    ):
        auth.add_auth(request)
    return str(request.headers["Authorization"])


@given(
    st.sampled_from(["GET", "PUT", "DELETE", "POST"]),
    TEXT,
    st.dictionaries(TEXT.filter(bool), TEXT, max_size=4),
    st.dictionaries(NAMES, VALUES),
    st.binary(max_size=20),
)
def test_every_signature_is_botocores(
    method: str, key: str, query: dict[str, str], headers: dict[str, str], body: bytes
) -> None:
    path = sigv4.encode_path(f"/bucket/{key}")
    asked = sigv4.encode_query([*query.items()])
    sent = {"host": "s3.eu-west-1.amazonaws.com", **headers}
    ours = sigv4.Signer(KEY, SECRET, "eu-west-1").sign(
        method, path, asked, sent, payload=hashlib.sha256(body).hexdigest(), now=1_800_000_000
    )
    assert ours["authorization"] == theirs(method, path, asked, sent, body)
    assert ours["x-amz-date"] == "20270115T080000Z"


def test_the_key_changes_with_the_day() -> None:
    signer = sigv4.Signer(KEY, SECRET, "eu-west-1")

    def sign(now: float) -> str:
        return signer.sign("GET", "/", "", {"host": "h"}, payload=sigv4.EMPTY, now=now)[
            "authorization"
        ]

    first = sign(1_800_000_000)
    assert sign(1_800_000_000 + 86400) != first
    assert sign(1_800_000_000) == first


def test_no_secret_is_shown() -> None:
    signer = sigv4.Signer(KEY, SECRET, "eu-west-1")
    signer.sign("GET", "/", "", {"host": "h"}, payload=sigv4.EMPTY, now=time.time())
    assert SECRET not in repr(signer)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [("/b/a b+c", "/b/a%20b%2Bc"), ("/b/é~", "/b/%C3%A9~"), ("/b//x/", "/b//x/"), ("/%", "/%25")],
)
def test_paths_are_encoded_once(path: str, encoded: str) -> None:
    assert sigv4.encode_path(path) == encoded
