from smbprotocol.session import Session

class TreeConnect:
    tree_connect_id: int
    is_dfs_share: bool | None
    encrypt_data: bool | None

    def __init__(self, session: Session, share_name: str) -> None: ...
    def connect(self, require_secure_negotiate: bool = ...) -> None: ...
