"""Validation by the subset of JSON Schema that the methods use.

The errors have the shape and the order of Ajv 8 with ``allErrors``, which clients of this
API know: at each object first what is missing, then what is too much, then the properties
in the schema's order.  Nothing is coerced: ``"1"`` is no number and ``true`` is none either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Schema: TypeAlias = "Mapping[str, Any]"

MOST_ERRORS = 100
"""A hostile call could have a million wrong keys; nobody reads more than a few."""


def validate(schema: Schema, value: object) -> list[dict[str, Any]]:
    """What is wrong with ``value``; empty when nothing is.  At most :data:`MOST_ERRORS`."""
    errors = _Errors()
    _check(schema, value, "", "#", errors)
    return errors.found


class _Errors:
    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    @property
    def full(self) -> bool:
        return len(self.found) >= MOST_ERRORS

    def add(
        self, instance: str, schema: str, keyword: str, params: dict[str, Any], message: str
    ) -> None:
        if not self.full:
            self.found.append(
                {
                    "instancePath": instance,
                    "schemaPath": f"{schema}/{keyword}",
                    "keyword": keyword,
                    "params": params,
                    "message": message,
                }
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return _is_number(value) and (isinstance(value, int) or float(value).is_integer())  # type: ignore[arg-type]


_IS: dict[str, Callable[[object], bool]] = {
    "array": lambda value: isinstance(value, list),
    "boolean": lambda value: isinstance(value, bool),
    "integer": _is_integer,
    "null": lambda value: value is None,
    "number": _is_number,
    "object": lambda value: isinstance(value, dict),
    "string": lambda value: isinstance(value, str),
}


def _check(schema: Schema, value: Any, instance: str, path: str, errors: _Errors) -> None:
    kind = schema.get("type")
    if kind is not None and not _IS[kind](value):
        errors.add(instance, path, "type", {"type": kind}, f"must be {kind}")
        return
    if "enum" in schema and value not in schema["enum"]:
        allowed = list(schema["enum"])
        message = "must be equal to one of the allowed values"
        errors.add(instance, path, "enum", {"allowedValues": allowed}, message)
    if isinstance(value, dict):
        _check_object(schema, cast("dict[str, Any]", value), instance, path, errors)
    elif isinstance(value, list):
        # mypy knows that it is list[Any] already
        _check_items(schema, value, instance, path, errors)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, str):
        _check_length(schema, value, instance, path, errors)
    elif _is_number(value):
        _check_range(schema, value, instance, path, errors)


def _check_object(
    schema: Schema, value: dict[str, Any], instance: str, path: str, errors: _Errors
) -> None:
    properties: Mapping[str, Schema] = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            message = f"must have required property '{name}'"
            errors.add(instance, path, "required", {"missingProperty": name}, message)
    more: bool | Schema = schema.get("additionalProperties", True)
    if more is not True:
        for name, item in value.items():
            if errors.full:
                return
            if name in properties:
                continue
            if more is False:
                message = "must NOT have additional properties"
                params = {"additionalProperty": name}
                errors.add(instance, path, "additionalProperties", params, message)
            else:
                _check(more, item, _below(instance, name), f"{path}/additionalProperties", errors)
    for name, inner in properties.items():
        if name in value:
            _check(inner, value[name], _below(instance, name), f"{path}/properties/{name}", errors)


def _check_items(
    schema: Schema, value: list[Any], instance: str, path: str, errors: _Errors
) -> None:
    inner: Schema | None = schema.get("items")
    if inner is None:
        return
    for index, item in enumerate(value):
        if errors.full:
            return
        _check(inner, item, f"{instance}/{index}", f"{path}/items", errors)


def _check_length(schema: Schema, value: str, instance: str, path: str, errors: _Errors) -> None:
    least = schema.get("minLength", 0)
    if len(value) < least:
        message = f"must NOT have fewer than {least} characters"
        errors.add(instance, path, "minLength", {"limit": least}, message)
    most = schema.get("maxLength")
    if most is not None and len(value) > most:
        message = f"must NOT have more than {most} characters"
        errors.add(instance, path, "maxLength", {"limit": most}, message)


def _check_range(schema: Schema, value: float, instance: str, path: str, errors: _Errors) -> None:
    least = schema.get("minimum")
    if least is not None and value < least:
        params = {"comparison": ">=", "limit": least}
        errors.add(instance, path, "minimum", params, f"must be >= {least}")
    above = schema.get("exclusiveMinimum")
    if above is not None and value <= above:
        params = {"comparison": ">", "limit": above}
        errors.add(instance, path, "exclusiveMinimum", params, f"must be > {above}")
    most = schema.get("maximum")
    if most is not None and value > most:
        params = {"comparison": "<=", "limit": most}
        errors.add(instance, path, "maximum", params, f"must be <= {most}")


def _below(instance: str, name: str) -> str:
    """``name`` appended to a JSON pointer."""
    return f"{instance}/{name.replace('~', '~0').replace('/', '~1')}"
