"""``system.*``: what this proxy is and what it can be asked."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from proxy.errors import NoSuchObject
from proxy.rpc.registry import Params, Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.rpc.context import Context

methods = Registry()

VERSION = importlib.metadata.version("xo-proxy")
"""Shown by Xen Orchestra beside the proxy's name."""

_NAME = {"type": "string", "x-stream": "ndjson"}


class Nothing(Params):
    pass


class MethodName(Params):
    """Upstream's parameter is ``method``; its published document says ``name``."""

    method: str

    @classmethod
    def normalise(cls, given: dict[str, Any]) -> dict[str, Any]:
        if "name" in given and "method" not in given:
            return {("method" if key == "name" else key): value for key, value in given.items()}
        return given


@methods.method(
    "system.getMethodsInfo",
    Nothing,
    description="returns the signatures of all available API methods",
    result={"type": "object", "x-stream": "ndjson"},
)
def get_methods_info(context: Context, _: Nothing) -> Iterator[dict[str, Any]]:
    return (method.describe() for method in context.registry)


@methods.method(
    "system.getServerVersion",
    Nothing,
    description="returns the version of xo-proxy",
    result={"type": "string"},
)
def get_server_version(_context: Context, _: Nothing) -> str:
    return VERSION


@methods.method(
    "system.listMethods",
    Nothing,
    description="returns the name of all available API methods",
    result=_NAME,
)
def list_methods(context: Context, _: Nothing) -> list[str]:
    return [method.name for method in context.registry]


@methods.method(
    "system.methodSignature",
    MethodName,
    description="returns the signature of an API method",
    result={"type": "object"},
)
def method_signature(context: Context, params: MethodName) -> dict[str, Any]:
    method = context.registry.find(params.method)
    if method is None:
        raise NoSuchObject("method", params.method)
    return {**method.describe(), "result": method.result}


@methods.method(
    "system.describe",
    Nothing,
    description="returns an OpenRPC document of all available API methods",
    result={"type": "object"},
)
def describe(context: Context, _: Nothing) -> dict[str, Any]:
    return context.registry.openrpc(VERSION)
