"""The rules of value-matcher, as its own source and examples tell them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.jobs.mirror.matching import fields_of, predicate

BACKUP: dict[str, Any] = {
    "mode": "delta",
    "jobId": "J",
    "timestamp": 1_700_000_000_000,
    "vm": {"uuid": "A", "name_label": "web", "tags": ["prod", "eu=west"], "is_a_template": False},
    "vmSnapshot": None,
    "size": 1,
    "tags": [],
}

CASES: list[tuple[Any, bool]] = [
    # what Xen Orchestra's form makes
    ({"vm": {"uuid": {"__or": ["A", "B"]}}}, True),
    ({"vm": {"uuid": {"__or": ["B"]}}}, False),
    ({"vm": {"uuid": {"__or": []}}}, False),
    # scalars are equal only when their types are
    ({"size": 1}, True),
    ({"size": 1.0}, True),
    ({"size": True}, False),
    ({"size": "1"}, False),
    ({"vm": {"is_a_template": False}}, True),
    ({"vm": {"is_a_template": 0}}, False),
    ({"vmSnapshot": None}, True),
    ({"vmSnapshot": {}}, False),
    # objects: every field must be there
    ({}, True),
    ({"vm": {}}, True),
    ({"mode": {}}, False),
    ({"nothing": None}, False),
    ({"mode": "delta", "jobId": "J"}, True),
    ({"mode": "delta", "jobId": "K"}, False),
    # lists: every pattern matches some item
    ({"vm": {"tags": ["prod"]}}, True),
    ({"vm": {"tags": ["prod", "prod"]}}, True),
    ({"vm": {"tags": ["prod", "test"]}}, False),
    ({"vm": {"tags": []}}, True),
    ({"vm": {"tags": "prod"}}, False),
    ({"tags": ["prod"]}, False),
    ({"mode": ["delta"]}, False),
    ({"vm": {"tags": {"0": "prod"}}}, True),
    ({"vm": {"tags": {"length": 2}}}, True),
    ({"vm": {"tags": {"2": "prod"}}}, False),
    ({"vm": {"tags": {"01": "eu=west"}}}, False),
    ({"tags": {}}, True),
    # combinations
    ({"__or": [{"mode": "full"}, {"jobId": "J"}]}, True),
    ({"__or": []}, False),
    ({"__and": []}, True),
    ({"__and": [{"mode": "delta"}, {"jobId": "K"}]}, False),
    ({"__not": {"mode": "full"}}, True),
    ({"__not": {"nothing": 1}}, True),
    ({"vm": {"tags": {"__not": ["prod"]}}}, False),
    ({"vm": {"__and": [{"uuid": "A"}, {"__not": {"name_label": "db"}}]}}, True),
    # with another key beside it an operator is a name like any other
    ({"__or": [{}], "mode": "delta"}, False),
    # the whole value
    (None, False),
    ([], False),
    ("delta", False),
]


@pytest.mark.parametrize(("pattern", "expected"), CASES, ids=[json.dumps(c[0]) for c in CASES])
def test_a_backup_matches(pattern: Any, expected: bool) -> None:
    assert predicate(pattern)(BACKUP) is expected


def test_the_published_example() -> None:
    users: list[dict[str, Any]] = [
        {"user": "sam", "age": 65, "active": False},
        {"user": "barney", "age": 36, "active": True},
        {"user": "fred", "age": 40, "active": False},
    ]
    matches = predicate({"__or": [{"user": "sam"}, {"active": True}]})
    assert [each["user"] for each in users if matches(each)] == ["sam", "barney"]


@pytest.mark.parametrize("pattern", [{"__or": "A"}, {"__and": {"a": 1}}, {"vm": {"__or": None}}])
def test_what_is_no_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(Refused, match="takes a list of patterns") as caught:
        predicate(pattern)
    assert caught.value.code == "EINVAL"


def test_a_pattern_cannot_cost_what_its_author_likes() -> None:
    deep: Any = "A"
    for _ in range(60):
        deep = {"__not": deep}
    with pytest.raises(Refused, match="nested deeper"):
        predicate(deep)
    with pytest.raises(Refused, match="parts"):
        predicate({"__or": [{"a": 1}] * 100_001})


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(-9, 9, width=16)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(JSON, JSON)
def test_combinations_are_those_of_logic(pattern: Any, value: Any) -> None:
    matches = predicate(pattern)(value)
    assert predicate({"__not": pattern})(value) is not matches
    assert predicate({"__and": [pattern, pattern]})(value) is matches
    assert predicate({"__or": [pattern]})(value) is matches
    assert predicate({"__or": [pattern, {"__not": pattern}]})(value) is True
    assert predicate({"field": pattern})({"field": value, "other": 1}) is matches


@given(JSON)
def test_every_value_matches_itself(value: Any) -> None:
    """As a pattern it has no operators: names of two letters cannot be one."""
    assert predicate(value)(value)
    assert predicate(value)(json.loads(json.dumps(value)))


@given(JSON, st.dictionaries(st.text(max_size=2), JSON, max_size=3))
def test_the_fields_tell_all_that_decides(pattern: Any, value: dict[str, Any]) -> None:
    tops = {path[0] for path in fields_of(pattern) if path}
    if () in fields_of(pattern):
        return
    kept = {name: each for name, each in value.items() if name in tops}
    assert predicate(pattern)(kept) is predicate(pattern)(value)


def test_fields_are_those_of_the_form() -> None:
    assert fields_of({"vm": {"uuid": {"__or": ["A", "B"]}}}) == {("vm", "uuid")}
    assert fields_of({"__not": {"tags": ["x"], "mode": "full"}}) == {("tags",), ("mode",)}
    assert fields_of({"vm": {}}) == {("vm",)}
