from __future__ import annotations

import pytest

from proxy.errors import (
    Busy,
    Conflict,
    Corrupt,
    NotFound,
    ProxyError,
    Refused,
    Unauthorized,
    Unreachable,
)
from proxy.remotes.smb.status import StatusError, from_status, translated


# numbers from [MS-ERREF] 2.3.1
@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (0xC0000034, NotFound, "ENOENT"),
        (0xC000003A, NotFound, "ENOENT"),
        (0xC0000056, NotFound, "ENOENT"),
        (0xC0000103, NotFound, "ENOTDIR"),
        (0xC0000035, Conflict, "EEXIST"),
        (0xC00000BA, Conflict, "EISDIR"),
        (0xC0000101, Conflict, "ENOTEMPTY"),
        (0xC0000022, Refused, "EACCES"),
        (0xC000007F, Refused, "ENOSPC"),
        (0xC0000044, Refused, "EDQUOT"),
        (0xC00000A2, Refused, "EROFS"),
        (0x8000002D, Refused, "ELOOP"),
        (0xC0000257, Refused, "ENOTSUP"),
        (0xC0000043, Busy, "EBUSY"),
        (0xC000006D, Unauthorized, "EAUTH"),
        (0xC000006A, Unauthorized, "EAUTH"),
        (0xC0000234, Unauthorized, "EAUTH"),
        (0xC0000185, Unreachable, "EIO"),
    ],
)
def test_what_a_status_means(number: int, kind: type[ProxyError], code: str) -> None:
    error = from_status(number, "write", "d/f")
    assert type(error) is kind
    assert error.code == code
    assert error.message.startswith(f"{code}: ")
    assert "'d/f'" in error.message
    assert error.data == {"path": "d/f", "status": f"0x{number:08x}"}


def test_an_answer_without_sense_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="makes no sense"), translated("read", "f"):
        raise ValueError("cut")
    with pytest.raises(NotFound), translated("read", "f"):
        raise StatusError(0xC0000034)
