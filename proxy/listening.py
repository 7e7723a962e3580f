"""From the listeners of the configuration to open sockets."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from proxy import certificates
from proxy.errors import NotFound, ProxyError, Refused
from proxy.rpc import Address, open_listeners, tls_context
from proxy.systemd import passed_socket

if TYPE_CHECKING:
    from proxy.config import Config, ListenConfig
    from proxy.rpc.serving import Listener

_log = structlog.get_logger("proxy.listening")


@dataclass(frozen=True, slots=True)
class Bound:
    """One open listener and where clients reach it."""

    url: str
    listener: Listener


def open_all(config: Config) -> list[Bound]:
    """Open every listener that can be; each that cannot is an error in the log.

    Raises ``Refused`` when none is left: a daemon that nobody can call must not look alive.
    Blocks briefly (certificates, name look-ups).
    """
    bound: list[Bound] = []
    for name, listener in config.http.listen.items():
        try:
            bound += _open(listener)
        except ProxyError as error:
            _log.error("listener not opened", listener=name, reason=error.message)
    if not bound:
        if not config.http.listen:
            raise Refused("no listener is configured: add a table [http.listen.<name>]")
        raise Refused("no listener could be opened, see the errors above")
    return bound


def _open(listener: ListenConfig) -> list[Bound]:
    tls = _tls(listener)
    fd = listener.fd
    if listener.systemd_socket is not None:
        fd = passed_socket(listener.systemd_socket)
        if fd is None:
            raise NotFound(f"systemd passed no socket number {listener.systemd_socket}")
    address = Address(
        port=listener.effective_port, hostname=listener.hostname, socket=listener.socket, fd=fd
    )
    opened = open_listeners(address, tls)
    return [Bound(_url(each, listener.hostname, secure=tls is not None), each) for each in opened]


def _tls(listener: ListenConfig) -> ssl.SSLContext | None:
    cert, key = listener.cert, listener.key
    if cert is None or key is None:
        return None
    if listener.auto_cert:
        certificates.ensure(cert, key, hostname=listener.hostname)
    try:
        return tls_context(cert, key)
    except FileNotFoundError as error:
        raise Refused(
            f"there is no certificate at {cert} with its key at {key}: set autoCert = true"
        ) from error
    except (OSError, ssl.SSLError) as error:
        raise Refused(
            f"the certificate {cert} with the key {key} cannot be used: {error}"
        ) from error


def _url(listener: Any, hostname: str | None, *, secure: bool) -> str:
    plain = getattr(listener, "transport_listener", listener)
    sock: socket.socket = plain.socket
    where = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{where}"
    host, port = str(where[0]), where[1]
    if hostname is not None and hostname != "localhost":
        host = hostname
    if ":" in host:
        host = f"[{host}]"
    return f"{'https' if secure else 'http'}://{host}:{port}"


def drop_privileges(config: Config) -> None:
    """Become ``user`` and ``group``, if they are set and we are root.

    After listening, so that ports below 1024 work.  Raises ``NotFound`` for unknown names.
    """
    if config.user is None and config.group is None:
        return
    if os.geteuid() != 0:
        _log.warning("user and group have no effect: the daemon was not started by root")
        return
    user, gid = _identity(config)
    if user is not None:
        os.initgroups(user.pw_name, gid)
    else:
        os.setgroups([])
    os.setgid(gid)
    if user is not None:
        os.setuid(user.pw_uid)


def _identity(config: Config) -> tuple[pwd.struct_passwd | None, int]:
    try:
        user = pwd.getpwnam(config.user) if config.user is not None else None
    except KeyError as error:
        raise NotFound(f"there is no user {config.user}") from error
    if config.group is None:
        return user, user.pw_gid if user is not None else os.getgid()
    try:
        return user, grp.getgrnam(config.group).gr_gid
    except KeyError as error:
        raise NotFound(f"there is no group {config.group}") from error


def give_to_user(config: Config, path: os.PathLike[str]) -> None:
    """Let the user that the daemon is about to become own ``path``."""
    if config.user is None or os.geteuid() != 0:
        return
    user, gid = _identity(config)
    if user is not None:
        os.chown(path, user.pw_uid, gid)
