from __future__ import annotations

import base64
import time
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.formats.azure_xml import (
    LARGEST,
    Blob,
    block_id,
    dump_block_list,
    load_error,
    load_page,
)

DATE = "Tue, 24 Nov 2026 20:00:00 GMT"
# in the form of the service's answers
HEAD = (
    '\ufeff<?xml version="1.0" encoding="utf-8"?>'
    '<EnumerationResults ServiceEndpoint="https://a.blob.core.windows.net/" ContainerName="c">'
)


def blob(name: str, size: object = 3, extra: str = "") -> str:
    return (
        f"<Blob>{name}<Properties><Creation-Time>{DATE}</Creation-Time>"
        f"<Last-Modified>{DATE}</Last-Modified><Etag>0x8DE</Etag>"
        f"<Content-Length>{size}</Content-Length><Content-Type>text/plain</Content-Type>"
        f"<BlobType>BlockBlob</BlobType>{extra}</Properties><OrMetadata /></Blob>"
    )


def page(*entries: str, end: str = "<NextMarker />") -> bytes:
    return f"{HEAD}<Blobs>{''.join(entries)}</Blobs>{end}</EnumerationResults>".encode()


def test_a_page_has_blobs_and_prefixes() -> None:
    document = page(
        blob("<Name>d/a&amp;b</Name>", 12),
        "<BlobPrefix><Name>d/e/</Name></BlobPrefix>",
        blob("<Name>d/z</Name>", 0),
        end="<NextMarker>2!88!MDAw</NextMarker>",
    )
    found = load_page(document, None)
    moment = 1795550400.0
    assert time.gmtime(moment)[:6] == (2026, 11, 24, 20, 0, 0)
    assert found.blobs == (Blob("d/a&b", 12, moment), Blob("d/z", 0, moment))
    assert found.prefixes == ("d/e/",)
    assert found.marker == "2!88!MDAw"


def test_names_that_xml_cannot_hold_come_encoded() -> None:
    found = load_page(page(blob('<Name Encoded="true">a%EF%BF%BE%25</Name>')), None)
    assert [each.name for each in found.blobs] == ["a\ufffe%"]


def test_directories_of_a_hierarchical_account_are_no_blobs() -> None:
    entry = blob("<Name>d</Name>", 0, "<ResourceType>directory</ResourceType>")
    assert load_page(page(entry, blob("<Name>d/f</Name>")), None).blobs[0].name == "d/f"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<html>Bad gateway</html>",
        page(blob("<Name>a</Name>"), end=""),  # does not say whether it goes on
        page(blob("<Name>a</Name>"), end="<NextMarker>same</NextMarker>"),
        page(blob("<Name>a</Name>", "-3")),
        page(blob("<Name>a</Name>", "9" * 30)),
        page(blob("")),
        page(blob("<Name>a</Name>").replace(DATE, "yesterday")),
        page(blob('<Name Encoded="true">%FF</Name>')),
        page("<x>" * 40 + "</x>" * 40),
        page(f"<x>{'y' * 100_000}</x>"),
        b'<!DOCTYPE a [<!ENTITY x "y">]>' + page()[3:],
        b"<!DOCTYPE a SYSTEM 'file:///etc/passwd'>" + page()[3:],
        b"x" * (LARGEST + 1),
    ],
)
def test_what_is_no_whole_listing_is_none(document: bytes) -> None:
    with pytest.raises(Corrupt):
        load_page(document, "same")


@given(st.integers(1, 800))
def test_a_listing_that_was_cut_is_never_a_shorter_one(cut: int) -> None:
    document = page(*(blob(f"<Name>{number}</Name>") for number in range(3)))
    with pytest.raises(Corrupt):
        load_page(document[:-cut], None)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_page_or_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        load_page(data, None)
    assert load_error(data) == {}


texts = st.text(
    st.characters(codec="utf-8", min_codepoint=32, exclude_characters="\ufffe\uffff\x7f"),
    max_size=30,
)


@given(st.lists(texts.filter(bool), max_size=5))
def test_names_are_read_as_they_are_spelled(names: list[str]) -> None:
    entries = [blob(f"<Name>{escape(name)}</Name>") for name in names]
    assert [each.name for each in load_page(page(*entries), None).blobs] == names


def test_an_error_has_its_code_and_message() -> None:
    document = (
        '<?xml version="1.0"?><Error><Code>AuthenticationFailed</Code>'
        "<Message>Server failed.\nRequestId:1</Message>"
        "<AuthenticationErrorDetail>no</AuthenticationErrorDetail></Error>"
    )
    assert load_error(document.encode()) == {
        "Code": "AuthenticationFailed",
        "Message": "Server failed.\nRequestId:1",
        "AuthenticationErrorDetail": "no",
    }
    assert load_error(b"<html/>") == {}


def test_ids_of_blocks_have_one_length_and_are_in_order() -> None:
    """All ids of a blob must have one length: it is that of upstream's, which may be there."""
    upload = "0" * 36
    ids = [block_id(upload, *at) for at in ((1, 0), (2, 0), (2, 1), (10, 0), (50_000, 0))]
    assert {len(base64.b64decode(each)) for each in ids} == {36 + 12}
    assert [base64.b64decode(each) for each in ids] == sorted(map(base64.b64decode, ids))
    assert len(set(ids)) == len(ids)


def test_a_block_list_names_each_once() -> None:
    assert dump_block_list(["YQ==", "Yg=="]) == (
        b'<?xml version="1.0" encoding="utf-8"?>'
        b"<BlockList><Latest>YQ==</Latest><Latest>Yg==</Latest></BlockList>"
    )
