"""JSON-RPC 2.0 requests in, answers out; bytes only, no I/O.

Differences from upstream, on purpose: every answer is ``application/json`` (upstream sends
errors of the envelope as text, which its own client refuses), a batch is refused as what it
is, and no error carries a stack.  As upstream, a request without ``id`` is executed and
answered without ``id``: over HTTP every request gets an answer anyway, and a caller that
forgot the ``id`` learns what happened.
"""

from __future__ import annotations

import secrets
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec
import structlog

from proxy.errors import Many, ProxyError
from proxy.rpc.registry import MethodNotFound
from proxy.runtime.secrets import scrub, scrub_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

INVALID_JSON = -32700
INVALID_REQUEST = -32600

logger = structlog.get_logger(__name__)
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder()


@dataclass(frozen=True, slots=True)
class Identity:
    """What an answer repeats of its request: ``{"id": …}`` or nothing."""

    field: Mapping[str, Any]


NO_IDENTITY = Identity({})
NULL_IDENTITY = Identity({"id": None})


@dataclass(frozen=True, slots=True)
class Call:
    """A well-formed request; ``params`` are not validated yet."""

    method: str
    params: dict[str, Any] | list[Any]
    identity: Identity


class Malformed(ProxyError):
    """Not a JSON-RPC request."""

    default_code = "EPROTO"
    rpc_code = INVALID_REQUEST

    def __init__(
        self, message: str, *, rpc_code: int = INVALID_REQUEST, identity: Identity = NULL_IDENTITY
    ) -> None:
        super().__init__(message)
        self.envelope_code = rpc_code
        self.identity = identity


def parse(body: bytes | bytearray) -> Call:
    """Read one request.  Raises :class:`Malformed`, or ``MethodNotFound`` for an answer."""
    try:
        decoded = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed("invalid JSON", rpc_code=INVALID_JSON) from error
    if isinstance(decoded, list):
        raise Malformed("batches are not supported: send one call per request")
    if not isinstance(decoded, dict):
        raise Malformed(f"invalid request: {_type_of(decoded)} instead of object")
    message = cast("dict[str, Any]", decoded)
    version = message.get("jsonrpc", "2.0")
    if version != "2.0":
        raise Malformed(f"invalid version: {_type_of(version)} instead of undefined or '2.0'")
    if "method" not in message:
        raise _without_method(message)
    method = message["method"]
    if not isinstance(method, str):
        raise Malformed(f"invalid method: {_type_of(method)} instead of string")
    given = message.get("params", {})
    if not isinstance(given, dict | list):
        kind = _type_of(given)
        raise Malformed(f"invalid params: {kind} instead of undefined, array or object")
    params = cast("dict[str, Any] | list[Any]", given)
    if "id" not in message:
        return Call(method, params, NO_IDENTITY)
    return Call(method, params, _identity(message))


def _identity(message: Mapping[str, Any]) -> Identity:
    identifier = message.get("id", msgspec.UNSET)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | float):
        kind = _type_of(identifier)
        raise Malformed(f"invalid identifier: {kind} instead of number or string")
    return Identity({"id": identifier})


def _without_method(message: Mapping[str, Any]) -> Malformed:
    identity = _identity(message)
    return Malformed("method not found", rpc_code=MethodNotFound.rpc_code, identity=identity)


def _type_of(value: object) -> str:
    """JavaScript's word for a JSON value's type, as in upstream's messages."""
    if value is None:
        return "null"
    if value is msgspec.UNSET:
        return "undefined"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    if isinstance(value, int | float):
        return "number"
    return "array" if isinstance(value, list) else "object"


def encode(value: object) -> bytes:
    """One JSON value without line breaks."""
    return _encoder.encode(value)


def success(identity: Identity, result: object) -> bytes:
    """A plain answer.  Nothing is answered as ``true``: XO's client breaks on ``null``."""
    shown = True if result is None else result
    return _encoder.encode({**identity.field, "jsonrpc": "2.0", "result": shown})


def stream_header(identity: Identity) -> bytes:
    """The first line of a stream, with its line break."""
    return success(identity, {"$responseType": "ndjson"}) + b"\n"


def failure(identity: Identity, error: BaseException) -> bytes:
    """An error answer, without line break."""
    return _encoder.encode({"error": describe(error), **identity.field, "jsonrpc": "2.0"})


def describe(error: BaseException) -> dict[str, Any]:
    """The JSON-RPC error object of an exception, without secrets and without a stack.

    What is not one of our errors is a fault of this program: it is logged in full under a
    reference, and the client gets the reference.
    """
    known = _as_ours(error)
    if known is None:
        reference = secrets.token_hex(8)
        logger.error(
            "internal error",
            reference=reference,
            traceback=scrub_text("".join(traceback.format_exception(error))),
        )
        return {
            "code": ProxyError.rpc_code,
            "data": {"code": "EINTERNAL", "reference": reference},
            "message": f"internal error, the log has the details under {reference}",
        }
    if isinstance(known, MethodNotFound):
        name = known.message.partition(": ")[2]
        return {"code": known.rpc_code, "data": name, "message": known.message}
    if isinstance(known, Malformed):
        return {"code": known.envelope_code, "message": known.message}
    message = scrub_text(known.message)
    data = scrub(known.data)
    if known.rpc_code != ProxyError.rpc_code:
        # XO's own errors: their data has a fixed form
        return {"message": message, "code": known.rpc_code, "data": data}
    data["code"] = known.code
    if isinstance(known, Many):
        data["errors"] = [_brief(one) for one in known.errors]
    return {"code": known.rpc_code, "data": data, "message": message}


def _brief(error: BaseException) -> dict[str, Any]:
    known = _as_ours(error)
    if known is None:
        return {"code": "EINTERNAL", "message": type(error).__name__}
    return {"code": known.code, "message": scrub_text(known.message), "data": scrub(known.data)}


def _as_ours(error: BaseException) -> ProxyError | None:
    """The one meant: groups come from nurseries and are opened."""
    if isinstance(error, ProxyError):
        return error
    if not isinstance(error, BaseExceptionGroup):
        return None
    leaves = list(_leaves(cast("BaseExceptionGroup[BaseException]", error)))
    ours = [leaf for leaf in leaves if isinstance(leaf, ProxyError)]
    if len(ours) != len(leaves):
        return None
    if len(ours) == 1:
        return ours[0]
    return Many("; ".join(one.message for one in ours), ours)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for inner in group.exceptions:
        if isinstance(inner, BaseExceptionGroup):
            yield from _leaves(cast("BaseExceptionGroup[BaseException]", inner))
        else:
            yield inner
