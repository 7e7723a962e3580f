"""Signatures, against Microsoft's own client and its documented account."""

from __future__ import annotations

import datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from azure.core.pipeline import PipelineContext, PipelineRequest
from azure.core.pipeline.transport import HttpRequest
from azure.storage.blob import generate_blob_sas
from azure.storage.blob._shared.authentication import SharedKeyCredentialPolicy
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.formats.azure_signing import (
    Account,
    authorization,
    query_string,
    quoted,
    read_signature,
)

NAME = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
ACCOUNT = Account.of(NAME, KEY)
DATE = "Tue, 24 Nov 2026 20:00:00 GMT"


def by_microsoft(method: str, url: str, headers: dict[str, str]) -> str:
    request = HttpRequest(method, url, headers=headers)
    policy: Any = SharedKeyCredentialPolicy  # it has no types
    policy(NAME, KEY).on_request(PipelineRequest(request, PipelineContext(None)))
    return str(request.headers["Authorization"])


keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
values = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
headers = st.dictionaries(
    st.one_of(
        st.sampled_from(["Content-Type", "Content-MD5", "If-Match", "If-None-Match"]),
        st.from_regex(r"x-ms-[a-z][a-z0-9-]{0,12}[a-z]", fullmatch=True),
    ),
    values,
    max_size=6,
)
queries = st.dictionaries(
    st.sampled_from(["comp", "restype", "prefix", "marker", "delimiter", "blockid"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20),
    max_size=4,
)


@given(st.sampled_from(["GET", "PUT", "HEAD", "DELETE", "POST"]), keys, queries, headers)
def test_a_request_is_signed_as_microsofts_client_signs_it(
    method: str, key: str, query: dict[str, str], given_headers: dict[str, str]
) -> None:
    sent = {"x-ms-date": DATE, "Content-Length": "17", **given_headers}
    path = f"/cont/{quoted(key)}"
    url = f"https://host{path}{query_string(query)}"
    assert authorization(ACCOUNT, method, path, query, sent) == by_microsoft(method, url, sent)
    # what is signed is what a server finds in the URL
    found = parse_qs(urlsplit(url).query, keep_blank_values=True)
    assert {name: value for name, (value,) in found.items()} == query


def test_headers_are_ordered_without_their_hyphens() -> None:
    """`x-ms-ab` stands before `x-ms-a-c` in the service's order, not in that of the bytes."""
    sent = {"x-ms-date": DATE, "x-ms-a-c": "1", "x-ms-ab": "2"}
    assert authorization(ACCOUNT, "GET", "/c/k", {}, sent) == by_microsoft(
        "GET", "https://host/c/k", sent
    )


def test_a_body_of_no_bytes_has_no_length_in_the_signature() -> None:
    zero = {"x-ms-date": DATE, "Content-Length": "0"}
    without = {"x-ms-date": DATE}
    assert authorization(ACCOUNT, "PUT", "/c/k", {}, zero) == authorization(
        ACCOUNT, "PUT", "/c/k", {}, without
    )


@given(keys)
def test_a_permission_to_read_is_what_microsofts_client_makes(key: str) -> None:
    until = datetime.datetime(2026, 11, 24, 21, 0, tzinfo=datetime.UTC)
    theirs = generate_blob_sas(NAME, "cont", key, account_key=KEY, permission="r", expiry=until)
    version = parse_qs(theirs)["sv"][0]
    ours = read_signature(ACCOUNT, "cont", key, until=until, version=version)
    assert {name: [value] for name, value in ours.items()} == parse_qs(theirs)


@pytest.mark.parametrize(
    ("name", "key", "part"),
    [("", KEY, "username"), ("a", "", "password"), ("a", "no!", "password")],
)
def test_a_login_that_cannot_be_one_is_told_at_once(name: str, key: str, part: str) -> None:
    with pytest.raises(Refused) as caught:
        Account.of(name, key)
    assert caught.value.data == {"part": part}
    assert caught.value.code == "EINVAL"


def test_the_key_is_not_shown() -> None:
    assert "key" not in repr(ACCOUNT)
