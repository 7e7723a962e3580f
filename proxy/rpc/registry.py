"""The methods of the API, each described once.

A method's parameters are a ``msgspec.Struct``.  From it come the validation of a call, the
answers of ``system.getMethodsInfo`` and ``system.methodSignature``, and the OpenRPC document
of ``system.describe``; nothing about a method is written down twice.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from proxy.errors import InvalidParams, ProxyError
from proxy.rpc.schema import validate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from proxy.rpc.context import Context

P = TypeVar("P", bound="Params")


class Params(msgspec.Struct, rename="camel"):
    """Base of every method's parameters.  Fields are ``snake_case``, on the wire camelCase.

    A field with a default is optional; ``msgspec.UNSET`` as default means "not given".
    """

    @classmethod
    def normalise(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Turn another accepted form of the call into the schema's, before validation."""
        return given


class MethodNotFound(ProxyError):
    """JSON-RPC's own error, with upstream's message and data."""

    rpc_code = -32601

    def __init__(self, name: str) -> None:
        super().__init__(f"method not found: {name}", code="ENOSYS")


@dataclass(frozen=True, slots=True)
class Method:
    """One method.  ``function`` takes ``(context, params)``.

    A plain function answers at once and is called in place; a coroutine function may wait.
    What it returns decides the kind of reply: see :mod:`proxy.rpc.replies`.
    """

    name: str
    description: str | None
    params: type[Params]
    function: Callable[[Context, Any], Any]
    changes: bool
    """It has effects that must not be cut half-way: it goes on when its client vanishes."""
    result: Mapping[str, Any]
    """JSON Schema of the result (of one record for a stream); ``{}`` says nothing."""
    schema: Mapping[str, Any] = field(repr=False)
    """JSON Schema of the parameters."""
    waits: bool
    """It is a coroutine function."""
    carries_secrets: bool
    """Its parameters may hold credentials: they are remembered, to be hidden everywhere."""

    def read_params(self, given: object) -> Params:
        """Validate.  Raises ``InvalidParams`` with every fault found."""
        if isinstance(given, dict):
            given = self.params.normalise(cast("dict[str, Any]", given))
        errors = validate(self.schema, given)
        if errors:
            raise InvalidParams(errors)
        return msgspec.convert(given, self.params)

    def describe(self) -> dict[str, Any]:
        """Upstream's form: no mark of what is optional."""
        said = {} if self.description is None else {"description": self.description}
        return {**said, "name": self.name, "params": self.schema["properties"]}


class Registry:
    """Methods by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def method(
        self,
        name: str,
        params: type[P],
        *,
        description: str | None = None,
        changes: bool = False,
        result: Mapping[str, Any] | None = None,
    ) -> Callable[[Callable[[Context, P], Any]], Callable[[Context, P], Any]]:
        """Decorator: add a function under ``name``.

        ``result`` is the JSON Schema of what it answers.  The decorated function stays
        callable as it is.
        """

        def add(function: Callable[[Context, P], Any]) -> Callable[[Context, P], Any]:
            schema = _schema_of(params)
            self._add(
                Method(
                    name=name,
                    description=description,
                    params=params,
                    function=function,
                    changes=changes,
                    result=result or {},
                    schema=schema,
                    waits=inspect.iscoroutinefunction(function),
                    carries_secrets=any(
                        part.get("type") == "object" for part in schema["properties"].values()
                    ),
                )
            )
            return function

        return add

    def include(self, other: Registry) -> None:
        """Add every method of ``other``."""
        for method in other:
            self._add(method)

    def _add(self, method: Method) -> None:
        assert method.name not in self._methods, f"{method.name} is there twice"
        self._methods[method.name] = method

    def find(self, name: str) -> Method | None:
        return self._methods.get(name)

    def __getitem__(self, name: str) -> Method:
        """Raises :class:`MethodNotFound`."""
        method = self._methods.get(name)
        if method is None:
            raise MethodNotFound(name)
        return method

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods.values())

    def openrpc(self, version: str) -> dict[str, Any]:
        """An OpenRPC 1.2.6 document of all methods (https://spec.open-rpc.org)."""
        return {
            "openrpc": "1.2.6",
            "info": {
                "title": "xo-proxy",
                "version": version,
                "description": (
                    "JSON-RPC 2.0 over POST /api/v1. Parameters are given by name. A result "
                    'schema with "x-stream": "ndjson" describes one record: the answer is a '
                    'header line, then one record a line; "x-stream": "binary" is bytes.'
                ),
                "license": {"name": "AGPL-3.0-or-later"},
            },
            "servers": [{"name": "this proxy", "url": "/api/v1"}],
            "methods": [_openrpc_method(method) for method in self],
        }


def _openrpc_method(method: Method) -> dict[str, Any]:
    required = method.schema.get("required", ())
    said = {} if method.description is None else {"description": method.description}
    return {
        "name": method.name,
        **said,
        "paramStructure": "by-name",
        "params": [
            {"name": name, "required": name in required, "schema": part}
            for name, part in method.schema["properties"].items()
        ],
        "result": {"name": "result", "schema": dict(method.result)},
        "x-changes": method.changes,
    }


def _schema_of(params: type[Params]) -> dict[str, Any]:
    """The JSON Schema of a parameter class, in upstream's spelling.

    Defaults that are the type's own nothing (``False``, ``''``, ``null``) are not said, as
    upstream does not; the top level takes no other keys, nested objects take any.
    """
    (_, components) = msgspec.json.schema_components([params])
    whole: dict[str, Any] = components[params.__name__]
    assert len(components) == 1, "nested structs would make nested objects strict"
    properties: dict[str, dict[str, Any]] = {}
    for name, part in whole["properties"].items():
        shown = dict(part)
        if not shown.get("default", True):
            del shown["default"]
        properties[name] = shown
    return {
        "type": "object",
        "properties": properties,
        "required": whole.get("required", []),
        "additionalProperties": False,
    }
