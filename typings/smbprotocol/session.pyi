from typing import Literal

from smbprotocol.connection import Connection

class Session:
    session_id: int
    signing_required: bool
    encrypt_data: bool | None
    signing_key: bytes | None
    encryption_key: bytes | None
    decryption_key: bytes | None
    password: str | None

    def __init__(
        self,
        connection: Connection,
        username: str | None = ...,
        password: str | None = ...,
        require_encryption: bool = ...,
        hostname_override: str | None = ...,
        auth_protocol: Literal["negotiate", "ntlm", "kerberos"] = ...,
    ) -> None: ...
    def connect(self) -> None: ...
