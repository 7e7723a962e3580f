from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.remotes.smb.options import SmbOptions, parse_options
from proxy.runtime.secrets import scrub_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("vers=3.0,sec=ntlmssp", {"dialect": 0x0300}),
        ("vers=3.1.1,seal,port=1445", {"dialect": 0x0311, "seal": True, "port": 1445}),
        ("vers=3", {"dialect": None}),
        ("vers=2.1", {"dialect": 0x0210}),
        ("rw,soft,uid=0,gid=0,file_mode=0644,_netdev,x-systemd.automount,cache=none", {}),
        ("ro", {"read_only": True}),
        ("guest", {"guest": True}),
        ("sec=none", {"guest": True}),
        ("rsize=65536,wsize=131072", {"read_size": 65536, "write_size": 131072}),
        ("user=bob,dom=LAB", {"username": "bob", "domain": "LAB"}),
        ("workgroup=LAB,ip=10.0.0.1", {"domain": "LAB", "address": "10.0.0.1"}),
        (" seal , port=1445 ,", {"seal": True, "port": 1445}),
        ("SEAL", {"seal": True}),
    ],
)
def test_what_is_honoured(text: str | None, expected: dict[str, Any]) -> None:
    options = parse_options(text)
    defaults = SmbOptions()
    names = [name for name in SmbOptions.__slots__ if not name.startswith("_")]
    for name in names:
        assert getattr(options, name) == expected.get(name, getattr(defaults, name)), name


@pytest.mark.parametrize(
    ("text", "name", "code"),
    [
        ("vers=1.0", "vers", "ENOTSUP"),
        ("vers=4", "vers", "EINVAL"),
        ("sec=krb5", "sec", "ENOTSUP"),
        ("hard", "hard", "ENOTSUP"),
        ("mfsymlinks", "mfsymlinks", "ENOTSUP"),
        ("cache=loose", "cache", "ENOTSUP"),
        ("noserverino", "noserverino", "ENOTSUP"),
        ("credentials=/etc/secret", "credentials", "ENOTSUP"),
        ("port=0", "port", "EINVAL"),
        ("port=x", "port", "EINVAL"),
        ("port", "port", "EINVAL"),
        ("port=1,port=2", "port", "EINVAL"),
        ("user=a,username=b", "username", "EINVAL"),
        ("seal=yes", "seal", "EINVAL"),
        ("seal,guest", "seal", "EINVAL"),
        ("seal,vers=2.1", "seal", "EINVAL"),
        ("=5", "", "ENOTSUP"),
        ("a" * 5000, "options", "EINVAL"),
    ],
)
def test_what_is_refused_is_named(text: str, name: str, code: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_options(text)
    assert caught.value.code == code
    assert caught.value.data["option"] == name
    assert name in caught.value.message
    assert "/etc/secret" not in caught.value.message


def test_a_password_among_the_options_is_remembered_as_a_secret() -> None:
    options = parse_options("password=hunter2hunter2")
    assert options.password == "hunter2hunter2"
    assert "hunter2" not in scrub_text("it is hunter2hunter2")
    assert "hunter2" not in repr(options)


WORDS = st.sampled_from(
    ["seal", "guest", "ro", "port", "vers", "sec", "uid", "cache", "=", ",", "3.0", "none", "5"]
)


@given(st.text(max_size=40) | st.lists(WORDS, max_size=12).map("".join))
def test_any_text_is_understood_or_refused(text: str) -> None:
    with contextlib.suppress(Refused):
        options = parse_options(text)
        assert 1 <= options.port <= 65535
        assert not (options.seal and options.guest)


@given(st.lists(st.sampled_from(["seal", "ro", "port=1445", "vers=3.0", "uid=5"]), unique=True))
def test_the_order_changes_nothing(parts: list[str]) -> None:
    one, other = parse_options(",".join(parts)), parse_options(",".join(reversed(parts)))
    assert one == other
    assert one.seal == ("seal" in parts)
    assert one.read_only == ("ro" in parts)
