"""XO's patterns of ids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.jobs.patterns import ids_of

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "__or", "x"]), inner, max_size=2)
    ),
    max_leaves=8,
)


def test_the_three_forms() -> None:
    assert ids_of(None) == []
    assert ids_of({"id": "a"}) == ["a"]
    assert ids_of({"id": {"__or": ["a", "b", "a"]}}) == ["a", "b"]
    assert ids_of({"id": {"__or": []}}) == []


@given(value=JSON)
def test_anything_else_is_refused_with_upstreams_message(value: Any) -> None:
    match value:
        case None:
            expected: list[str] | None = []
        case {"id": str(one)} if len(value) == 1:
            expected = [one]
        case {"id": {"__or": list(many)}} if (
            len(value) == 1 and len(value["id"]) == 1 and all(isinstance(x, str) for x in many)
        ):
            expected = list(dict.fromkeys(many))
        case _:
            expected = None
    if expected is None:
        with pytest.raises(Refused, match=r"^invalid pattern$"):
            ids_of(value)
    else:
        assert ids_of(value) == expected
