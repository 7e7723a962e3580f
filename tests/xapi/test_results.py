from __future__ import annotations

import contextlib
import xmlrpc.client
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.xapi.results import parse_result

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0xD7FF), max_size=20)
VALUES = st.recursive(
    st.one_of(TEXT, st.integers(-(2**31), 2**31 - 1), st.booleans(), st.floats(-1e9, 1e9)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)


@given(VALUES)
def test_reads_what_the_standard_library_writes(value: Any) -> None:
    document = xmlrpc.client.dumps((value,))
    start, end = document.index("<value>"), document.rindex("</value>") + len("</value>")
    assert parse_result(document[start:end]) == value


def test_the_forms_of_xapi() -> None:
    assert parse_result("") == ""
    assert parse_result("<value/>") == ""
    assert parse_result("<value>OpaqueRef:1</value>") == "OpaqueRef:1"
    refs = "<value><array><data><value>OpaqueRef:1</value></data></array></value>"
    assert parse_result(refs) == ["OpaqueRef:1"]
    assert parse_result("<value><nil/></value>") is None


@pytest.mark.parametrize(
    "text",
    [
        "no xml",
        "<value><int>x</int></value>",
        "<value><unknown/></value>",
        "<array/>",
        "<value><int>1</int><int>2</int></value>",
        "<value><struct><member/></struct></value>",
        '<!DOCTYPE v [<!ENTITY a "aaaaaaaa">]><value>&a;</value>',
        "<value><array><data>" * 100 + "</data></array></value>" * 100,
    ],
)
def test_anything_else_is_corrupt(text: str) -> None:
    with pytest.raises(Corrupt):
        parse_result(text)


@given(st.text(max_size=200))
def test_no_text_breaks_the_parser(text: str) -> None:
    with contextlib.suppress(Corrupt):
        parse_result(text)
