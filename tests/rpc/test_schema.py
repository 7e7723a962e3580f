from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.rpc.registry import Method, Params, Registry
from proxy.rpc.schema import MOST_ERRORS, validate

methods = Registry()


class Everything(Params, kw_only=True):
    number: float
    whole: msgspec.UnsetType | int = msgspec.UNSET
    text: str = ""
    yes: bool = False
    paths: list[str] | msgspec.UnsetType = msgspec.UNSET
    remotes: dict[str, dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    job: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


@methods.method("all.kinds", Everything)
def everything(_context: object, _params: Everything) -> None: ...


METHOD: Method = methods["all.kinds"]


def faults(value: object) -> list[tuple[str, str, str]]:
    found = validate(METHOD.schema, value)
    return [(one["instancePath"], one["schemaPath"], one["message"]) for one in found]


def test_all_faults_are_named_in_the_order_of_ajv() -> None:
    given_ = {"b": 1, "yes": 1, "text": None, "a": 1}
    assert faults(given_) == [
        ("", "#/required", "must have required property 'number'"),
        ("", "#/additionalProperties", "must NOT have additional properties"),
        ("", "#/additionalProperties", "must NOT have additional properties"),
        ("/text", "#/properties/text/type", "must be string"),
        ("/yes", "#/properties/yes/type", "must be boolean"),
    ]


def test_faults_inside() -> None:
    given_ = {"number": 1, "paths": ["a", 1], "remotes": {"x/y~z": [], "ok": {"any": "thing"}}}
    assert faults(given_) == [
        ("/paths/1", "#/properties/paths/items/type", "must be string"),
        ("/remotes/x~1y~0z", "#/properties/remotes/additionalProperties/type", "must be object"),
    ]


@pytest.mark.parametrize(
    ("schema", "value", "keyword", "params", "message"),
    [
        (
            {"type": "string", "minLength": 1},
            "",
            "minLength",
            {"limit": 1},
            "must NOT have fewer than 1 characters",
        ),
        (
            {"type": "number", "minimum": 0},
            -1,
            "minimum",
            {"comparison": ">=", "limit": 0},
            "must be >= 0",
        ),
        (
            {"type": "number", "maximum": 5},
            6,
            "maximum",
            {"comparison": "<=", "limit": 5},
            "must be <= 5",
        ),
        (
            {"enum": ["a", "b"]},
            "c",
            "enum",
            {"allowedValues": ["a", "b"]},
            "must be equal to one of the allowed values",
        ),
        ({"type": "object"}, [], "type", {"type": "object"}, "must be object"),
    ],
)
def test_shape_of_a_fault(
    schema: dict[str, Any], value: object, keyword: str, params: object, message: str
) -> None:
    assert validate(schema, value) == [
        {
            "instancePath": "",
            "schemaPath": f"#/{keyword}",
            "keyword": keyword,
            "params": params,
            "message": message,
        }
    ]


@pytest.mark.parametrize("value", ["1", True, None, [1]])
def test_nothing_is_coerced(value: object) -> None:
    assert faults({"number": value}) == [("/number", "#/properties/number/type", "must be number")]


def test_a_million_wrong_keys_cost_a_bounded_answer() -> None:
    hostile = {f"k{index}": 1 for index in range(100_000)}
    assert len(faults(hostile)) == MOST_ERRORS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*METHOD.schema["properties"], "other"])


@settings(deadline=None)
@given(st.dictionaries(names, json_values, max_size=5))
def test_accepts_what_msgspec_accepts(value: dict[str, Any]) -> None:
    """msgspec, which makes the parameters, is the independent judge."""

    class Strict(Everything, kw_only=True, forbid_unknown_fields=True):
        pass

    # as a call arrives: through JSON
    arrived = msgspec.json.decode(json.dumps(value))
    try:
        msgspec.convert(arrived, Strict)
        accepted = True
    except msgspec.ValidationError:
        accepted = False
    assert (validate(METHOD.schema, arrived) == []) is accepted
