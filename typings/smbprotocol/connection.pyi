import threading
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from smbprotocol.session import Session
from smbprotocol.structure import Structure

class SigningAlgorithms:
    HMAC_SHA256: int
    AES_CMAC: int
    AES_GMAC: int

class Request:
    response: Structure | None
    response_event: threading.Event

class Connection:
    transport: Any
    dialect: int
    max_read_size: int
    max_write_size: int
    max_transact_size: int
    supports_multi_credit: bool
    supports_encryption: bool
    session_table: dict[int, Session]
    outstanding_requests: dict[int, Request]
    sequence_window: dict[str, int]
    _receive_timeout: int
    _t_exc: Exception | None
    _t_worker: threading.Thread | None

    def __init__(
        self, guid: UUID, server_name: str, port: int = ..., require_signing: bool = ...
    ) -> None: ...
    def connect(
        self,
        dialect: int | None = ...,
        timeout: float = ...,
        preferred_encryption_algos: list[int] | None = ...,
        preferred_signing_algos: list[int] | None = ...,
    ) -> None: ...
    def disconnect(self, close: bool = ..., timeout: float | None = ...) -> None: ...
    def receive(
        self,
        request: Request,
        wait: bool = ...,
        timeout: float | None = ...,
        resolve_symlinks: bool = ...,
    ) -> Structure: ...
    def echo(self, sid: int = ..., timeout: float = ..., credit_request: int = ...) -> int: ...
    def verify_signature(self, header: Structure, session_id: int, force: bool = ...) -> None: ...
    def _calculate_credit_charge(self, message: Any) -> int: ...
    def _process_message_thread(self) -> None: ...
    def _send(
        self,
        messages: Sequence[Any],
        session_id: int | None = ...,
        tree_id: int | None = ...,
        message_id: int | None = ...,
        credit_request: int | None = ...,
        related: bool = ...,
        async_id: int | None = ...,
        force_signature: bool = ...,
    ) -> list[Request]: ...
