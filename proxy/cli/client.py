"""A client of the API that talks to this daemon and to Xen Orchestra's own proxy alike."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import SplitResult, quote, unquote, urlsplit

import click
import httpx
import msgspec

from proxy.cli.failures import UNAUTHORIZED, UNREACHABLE, Failure
from proxy.errors import InvalidParams
from proxy.runtime.secrets import remember

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxy.config import Config

_COOKIE_SAFE = re.compile(r"[!#-+\--:<-\[\]-~]+")
"""What RFC 6265 lets a cookie hold: sent as it is, since upstream does not decode."""
_CONNECT = 10.0
_UNHANDLED = "Unhandled remote type"
"""Xen Orchestra's message for the URL of no kind of remote, which says nothing more."""


class Fault(msgspec.Struct, rename="camel"):
    """One wrong parameter."""

    message: str = ""
    instance_path: str = ""


class Faults(msgspec.Struct):
    errors: list[Fault] = []


class CallError(Failure):
    """The daemon answered an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        self.code = error.get("code")
        self.data = error.get("data")
        lines = [str(error.get("message", "unknown error"))]
        name = _stable_name(self.data)
        if name not in lines[0] and lines != [_UNHANDLED]:
            lines[0] += f" ({name})"
        if self.code == InvalidParams.rpc_code:
            faults = msgspec.convert(self.data or {}, Faults).errors
            lines += [f"  {fault.instance_path or '/'}: {fault.message}" for fault in faults]
        elif lines == [_UNHANDLED]:
            from proxy.remotes.url import SUPPORTED_TYPES  # noqa: PLC0415  only a failure needs it

            shown = ", ".join(f"{name}://" for name in SUPPORTED_TYPES)
            lines += [f"  the URL of a remote begins with one of {shown}"]
        super().__init__("\n".join(lines))


def _stable_name(data: Any) -> str:
    """What the list of error codes explains; Xen Orchestra's proxy sends none."""
    name = cast("dict[str, Any]", data).get("code") if isinstance(data, dict) else None
    return name if isinstance(name, str) else ""


@dataclass(frozen=True, slots=True)
class Scalar:
    value: Any


@dataclass(frozen=True, slots=True)
class Stream:
    """``items`` are read from the network as they are iterated."""

    items: Iterator[Any]


@dataclass(frozen=True, slots=True)
class Binary:
    chunks: Iterator[bytes]


Reply = Scalar | Stream | Binary


class Client:
    """Not for concurrent use.  ``url`` may be ``unix:/path`` and may name the token as user."""

    def __init__(self, url: str, token: str, *, verify: bool = False) -> None:
        transport: httpx.HTTPTransport | None = None
        if url.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=url.removeprefix("unix:"))
            url = "http://localhost"
        parts = _split(url)
        if parts.username:
            token = unquote(parts.username)
        remember(token)
        if not token:
            raise Failure(
                "no token: set XO_PROXY_AUTHENTICATION_TOKEN or authenticationToken in the"
                " configuration, or use --token-file",
                UNAUTHORIZED,
            )
        name = parts.hostname or ""
        host = f"[{name}]" if ":" in name else name
        port = f":{parts.port}" if parts.port is not None else ""
        path = parts.path if parts.path not in ("", "/") else "/api/v1"
        self.where = f"{parts.scheme}://{host}{port}"
        self._url = self.where + path
        self._headers = {
            "cookie": "authenticationToken="
            + (token if _COOKIE_SAFE.fullmatch(token) else quote(token, safe="")),
            "content-type": "application/json",
            # upstream's compression holds live records back until the end
            "accept-encoding": "identity",
        }
        # certificates are self-signed by design; an environment's proxy is not for us
        self._http = httpx.Client(
            verify=verify,
            trust_env=False,
            transport=transport,
            timeout=httpx.Timeout(None, connect=_CONNECT),
        )

    def close(self) -> None:
        """Close its connections; no call may be under way."""
        self._http.close()

    @contextlib.contextmanager
    def call(self, method: str, params: dict[str, Any]) -> Iterator[Reply]:
        """Send one call.  Raises ``CallError`` or another ``Failure``."""
        body = json.dumps({"id": 0, "jsonrpc": "2.0", "method": method, "params": params})
        try:
            with self._http.stream(
                "POST", self._url, content=body.encode(), headers=self._headers
            ) as response:
                yield self._read(response)
        except httpx.ConnectError as error:
            # without the number that the system gives its reason
            reason = re.sub(r"\[Errno -?\d+\] ", "", str(error))
            raise Failure(f"cannot reach {self.where}: {reason}", UNREACHABLE) from error
        except httpx.TimeoutException as error:
            raise Failure(f"{self.where} did not answer in time", UNREACHABLE) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failure(f"{self.where} broke off: {error}", UNREACHABLE) from error

    def scalar(self, method: str, params: dict[str, Any]) -> Any:
        """The result of a call that answers one value."""
        with self.call(method, params) as reply:
            if isinstance(reply, Scalar):
                return reply.value
            if isinstance(reply, Stream):
                return list(reply.items)
        raise Failure(f"{method} answered bytes instead of a value")

    def _read(self, response: httpx.Response) -> Reply:
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            raise Failure(f"{self.where} does not accept the token", UNAUTHORIZED)
        if response.status_code != HTTPStatus.OK:
            text = f"{self.where} answered {response.status_code} {response.reason_phrase}"
            raise Failure(text)
        kind = response.headers.get("content-type", "").partition(";")[0].strip()
        if kind == "application/octet-stream":
            return Binary(response.iter_bytes())
        lines = _values(response.iter_bytes())
        head = next(lines, None)
        if not isinstance(head, dict):
            raise Failure(f"{self.where} sent no answer that this program understands", UNREACHABLE)
        answer = cast("dict[str, Any]", head)
        if "error" in answer:
            raise CallError(answer["error"])
        result = answer.get("result")
        if result == {"$responseType": "ndjson"}:
            return Stream(lines)
        return Scalar(result)


def _split(url: str) -> SplitResult:
    """Raises ``click.UsageError``, which does not show the token that ``url`` may hold."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # brackets without an address between them, a port out of range
        pass
    shown = url.rpartition("@")[2]
    raise click.UsageError(f"{shown!r} is no URL of a proxy, such as https://proxy.example")


def _values(chunks: Iterator[bytes]) -> Iterator[Any]:
    """JSON values of a stream, each as soon as its line is complete.

    Only a newline ends a line: other separators of Unicode may stand in a JSON string.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield _value(line)
    if rest.strip():
        yield _value(rest)


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Failure("the answer is not JSON: it may have been cut off", UNREACHABLE) from error


@dataclass(frozen=True, slots=True)
class _Given:
    """What the options say; a subcommand's over those of its group."""

    url: str | None
    token: str | None
    token_file: Path | None
    configs: tuple[Path, ...]
    verify: bool

    def over(self, other: _Given | None) -> _Given:
        if other is None:
            return self
        return _Given(
            self.url or other.url,
            self.token or other.token,
            self.token_file or other.token_file,
            self.configs or other.configs,
            self.verify or other.verify,
        )

    def client(self) -> Client:
        url, token = self.url, self.token
        if self.token_file is not None:
            token = self.token_file.read_text("utf-8").strip()
        if url is not None and not url.startswith("unix:") and _split(url).username:
            token = token or ""
        if url is None or token is None:
            from proxy.config import Places, load  # noqa: PLC0415  most calls need no file

            config = load(Places(explicit=self.configs)).config
            url = url or _url_from(config)
            token = token or config.authentication_token
        return Client(url, token, verify=self.verify)


def connection(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which daemon to talk to; the command gets ``client``.

    Given to a group as well, they may stand before or after the subcommand's name.
    """

    @click.option("--url", help="Daemon to call; default: the first listener of the configuration.")
    @click.option("--token", help="Its token. Visible to other users: prefer --token-file.")
    @click.option(
        "--token-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File that holds the token.",
    )
    @click.option(
        "--config",
        "configs",
        multiple=True,
        type=click.Path(dir_okay=False, path_type=Path),
        help="Configuration file to take both from.",
    )
    @click.option("--verify", is_flag=True, help="Verify the daemon's certificate.")
    @functools.wraps(command)
    def with_client(
        *args: Any,
        url: str | None,
        token: str | None,
        token_file: Path | None,
        configs: tuple[Path, ...],
        verify: bool,
        **options: Any,
    ) -> Any:
        context = click.get_current_context()
        given = _Given(url, token, token_file, configs, verify).over(context.find_object(_Given))
        context.obj = given
        if context.invoked_subcommand is not None:
            return None  # the subcommand makes its own client, with these options as defaults
        with contextlib.closing(given.client()) as client:
            return command(*args, client=client, **options)

    return with_client


def _url_from(config: Config) -> str:
    listeners = config.http.listen
    for name in sorted(listeners, key=lambda name: (name != "https", name)):
        listener = listeners[name]
        if listener.socket is not None:
            return f"unix:{listener.socket}"
        if listener.fd is None and listener.systemd_socket is None and listener.effective_port:
            host = listener.hostname or "localhost"
            host = f"[{host}]" if ":" in host else host
            return f"{'https' if listener.tls else 'http'}://{host}:{listener.effective_port}"
    raise Failure("the configuration names no listener with a fixed address: use --url")
