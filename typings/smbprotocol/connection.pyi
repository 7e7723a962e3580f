import threading
from typing import Any
from uuid import UUID

from smbprotocol.session import Session
from smbprotocol.structure import Structure

class SigningAlgorithms:
    HMAC_SHA256: int
    AES_CMAC: int
    AES_GMAC: int

class Ciphers:
    AES_128_GCM: int
    AES_256_GCM: int

class Request:
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
    sequence_lock: threading.Lock
    signing_algorithm_id: int | None
    cipher_id: int | None
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
    def echo(self, sid: int = ..., timeout: float = ..., credit_request: int = ...) -> int: ...
    def verify_signature(self, header: Structure, session_id: int, force: bool = ...) -> None: ...
    def _process_message_thread(self) -> None: ...
    def _generate_signature(
        self, b_header: bytes, signing_key: bytes, message_id: int, response: bool, command: int
    ) -> bytes: ...
