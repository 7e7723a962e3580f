from __future__ import annotations

import contextlib
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.formats import s3_xml

NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


def test_names_texts_and_order() -> None:
    root = s3_xml.parse(
        b'<?xml version="1.0"?><s3:R xmlns:s3="x"> <s3:A>1&amp;2</s3:A><B/><A>3<C>4</C></A></s3:R>'
    )
    assert root.name == "R"
    assert [each.text for each in root.all("A")] == ["1&2", "3"]
    assert root.value("B") == ""
    assert root.value("none") is None


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<a>",
        b"<a></b>",
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
        b'<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>',
        b"<a>&x;</a>",
        b"<a>" * 17 + b"</a>" * 17,
        b"<a>" + b"<b/>" * 30_000 + b"</a>",
        b'<?xml version="1.0" encoding="nonsense"?><a/>',
    ],
)
def test_what_is_no_answer_is_corrupt(document: bytes) -> None:
    with pytest.raises(Corrupt):
        s3_xml.parse(document)


def test_a_document_that_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(Corrupt, match="bytes"):
        s3_xml.parse(b"<a>" + b" " * s3_xml.LARGEST + b"</a>")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_tree_or_corrupt(document: bytes) -> None:
    with contextlib.suppress(Corrupt):
        s3_xml.parse(document)


@given(st.lists(st.text().filter(s3_xml.can_hold), max_size=5))
def test_keys_of_a_batch_arrive_as_they_are(keys: list[str]) -> None:
    """ElementTree is another reader than ours."""
    root = ElementTree.fromstring(s3_xml.delete_request(keys))
    assert [each.text or "" for each in root.iter(f"{NAMESPACE}Key")] == keys
    assert root.findtext(f"{NAMESPACE}Quiet") == "false"


def test_parts_are_listed_with_their_etags() -> None:
    root = ElementTree.fromstring(s3_xml.complete_request([(1, '"a"'), (2, "<&>")]))
    found = [
        (each.findtext(f"{NAMESPACE}PartNumber"), each.findtext(f"{NAMESPACE}ETag"))
        for each in root
    ]
    assert found == [("1", '"a"'), ("2", "<&>")]
