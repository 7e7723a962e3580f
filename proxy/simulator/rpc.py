"""The two wire forms of a call: JSON-RPC 2.0 and 1.0, and XML-RPC."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from proxy.errors import Corrupt, XapiError
from proxy.formats.xmlrpc import dump_response, load_call

if TYPE_CHECKING:
    from proxy.simulator.calls import Calls, Peer


class Malformed(Exception):
    """The body is no call: xapi answers 500 with a page."""


async def answer_json(calls: Calls, peer: Peer, body: bytes) -> bytes:
    """Answer a JSON-RPC body; raises ``Malformed``."""
    try:
        request = json.loads(body)
        method, params = request["method"], request.get("params", [])
        if not isinstance(method, str) or not isinstance(params, list):
            raise Malformed
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Malformed from error
    given: list[Any] = params  # pyright: ignore[reportUnknownVariableType]
    modern = request.get("jsonrpc") == "2.0"
    identifier = request.get("id")
    try:
        result = await calls.handle(peer, method, given)
    except XapiError as error:
        failure: Any = [error.code, *error.params]
        if modern:
            failure = {"code": 1, "message": error.code, "data": error.params}
            return _json({"jsonrpc": "2.0", "error": failure, "id": identifier})
        return _json({"result": None, "error": failure, "id": identifier})
    if modern:
        return _json({"jsonrpc": "2.0", "result": result, "id": identifier})
    return _json({"result": result, "error": None, "id": identifier})


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


async def answer_xml(calls: Calls, peer: Peer, body: bytes) -> bytes:
    """Answer an XML-RPC body; raises ``Malformed``."""
    try:
        method, params = load_call(body)
    except Corrupt as error:
        raise Malformed from error
    try:
        result = await calls.handle(peer, method, params)
    except XapiError as error:
        described = [error.code, *error.params]
        return dump_response({"Status": "Failure", "ErrorDescription": described})
    if method == "system.listMethods":
        return dump_response(result)
    return dump_response({"Status": "Success", "Value": result})
