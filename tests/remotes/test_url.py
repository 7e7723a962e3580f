"""Expected values are what Xen Orchestra's parser gave when it was run, unless they say so."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.remotes.factory import open_remote
from proxy.remotes.url import PLACEHOLDER, S3Url, parse_url
from proxy.runtime.secrets import scrub_text
from tests.remotes.conftest import OPTIONS

KEY = "73c1838d7d8a6088ca2317fb5f29cd91"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file://var/lib/x", {"type": "file", "path": "/var/lib/x"}),
        ("file:////a//b/", {"path": "/a//b/"}),
        (
            f"file:///a?useVhdDirectory=true&encryptionKey=%22{KEY}%22",
            {"path": "/a", "use_vhd_directory": True, "encryption_key": KEY},
        ),
        (f'file:///a?encryptionKey="{KEY}"', {"encryption_key": KEY}),
        ("file:///a?immutable=1", {"is_immutable": False, "options": {"immutable": 1}}),
        ("file:///a?immutable=true", {"is_immutable": True}),
        ("file:///a?k&l=&m=%22x+y%22", {"options": {"k": False, "l": False, "m": "x y"}}),
        ("file:///a?path=%22/etc%22&z=1", {"path": "/a", "options": {"z": 1}}),
        ("nfs://1.2.3.4:media/nfs", {"host": "1.2.3.4", "port": None, "path": "/media/nfs"}),
        (
            "nfs://1.2.3.4:2049:/a?useVhdDirectory=true",
            {"type": "nfs", "port": "2049", "path": "/a", "use_vhd_directory": True},
        ),
        (
            "smb://Administrator:pas:sw@ord@toto\\\\192.168.100.225\\smb\0",
            {
                "username": "Administrator",
                "password": "pas:sw@ord",
                "domain": "toto",
                "host": "192.168.100.225\\smb",
                "path": "",
            },
        ),
        (
            "smb://u:p@d\\\\h\\share\0\\dir\\sub?useVhdDirectory=true",
            {"type": "smb", "host": "h\\share", "path": "\\dir\\sub", "use_vhd_directory": True},
        ),
        ("smb://u:p@d\\\\h\\share\\dir", {"host": "h\\share\\dir", "path": ""}),
        (
            "s3://AKIAS:XSuB%2B@s3-us-west-2.amazonaws.com/bkt/dir?allowUnauthorized=true#eu-west-1",
            {
                "type": "s3",
                "protocol": "https",
                "host": "s3-us-west-2.amazonaws.com",
                "path": "/bkt/dir",
                "password": "XSuB+",
                "options": {"allowUnauthorized": True},
                "region": "eu-west-1",
            },
        ),
        ("s3+http://k:s@MinIO:9000/b", {"protocol": "http", "host": "minio:9000", "path": "/b"}),
        ("s3://k:s@host", {"path": "", "region": None}),
        ("s3://k:s@host/b#", {"region": None}),
        (
            "azure://u:%2Fp%3D%3D@u.blob.core.windows.net/cont/dir",
            {"type": "azure", "password": "/p==", "protocol": "https"},
        ),
        (
            "azurite+http://dev:KEY@127.0.0.1:10000/cont/dir",
            {"type": "azurite", "protocol": "http", "host": "127.0.0.1:10000"},
        ),
    ],
)
def test_parses_as_upstream(url: str, expected: dict[str, Any]) -> None:
    parsed = parse_url(url)
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        # upstream cuts the host to "[fe80"
        ("nfs://[fe80::1]:/a", {"host": "fe80::1", "path": "/a"}),
        # upstream throws on "://" in a password
        ("smb://u:p://w@d\\\\h\\s\0", {"password": "p://w"}),
    ],
)
def test_reads_what_upstream_cannot(url: str, expected: dict[str, Any]) -> None:
    parsed = parse_url(url)
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "part"),
    [
        # upstream silently drops the rest, which names another place
        ("file:///a://b", "path"),
        ("nfs://1.2.3.4:/a:b", "path"),
        ("file:///../../etc", "path"),
        ("file:///a/../b", "path"),
        ("file:///a\0b", "path"),
        ("nfs://1.2.3.4", "host"),
        ("nfs://:/a", "host"),
        ("smb://:p@d\\\\h\\s", "username"),
        ("smb://u:p@\\\\h\\s", "domain"),
        ("smb://u:p@d\\\\", "host"),
        ("smb://u:p@d/h/s", "url"),
        ("s3://k:%zz@h/b", "password"),
        ("s3://k:%ff@h/b", "password"),
        ("s3://k:s@/b", "host"),
        ("file:///a?x=nope", "query key 'x'"),
        ("file:///a?x=NaN", "query key 'x'"),
        ("file:///a?x=1e999", "query key 'x'"),
        ("file:///a?x=1&x=2", "query key 'x'"),
        ("file:///a?x=" + "[" * 20_000, "query key 'x'"),
        ("file:///a?x=" + "9" * 20_000, "query key 'x'"),
        ("file:///a?x=%ff", "query"),
        ("file:///\udcff", "url"),
        ("file:///" + "a" * 70_000, "url"),
    ],
)
def test_says_which_part_is_wrong(url: str, part: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_url(url)
    assert (caught.value.code, caught.value.data) == ("EINVAL", {"part": part})


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKID:begin5/5middle/5end66@host/bucket",
        "azure://account:begin5/5middle/5end66@account.blob.core.windows.net/container",
    ],
)
def test_a_secret_with_a_slash_is_told_and_not_shown(url: str) -> None:
    with pytest.raises(Refused, match="'/', which must be written as %2F") as caught:
        parse_url(url)
    assert caught.value.data == {"part": "password"}
    assert scrub_text("AKID begin5 and 5middle/5end66") == "AKID *** and ***"


@pytest.mark.parametrize(
    "url", ["", "ftp://nowhere", "local:///a", "azure+http://h/c", "/a", "test://"]
)
def test_an_unknown_type_has_upstreams_message(url: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_url(url)
    assert caught.value.message == "Unhandled remote type"


@pytest.mark.parametrize(
    "url",
    [
        "smb://user:S@WORKGROUP\\\\h\\s\0\\d",
        "s3://KEY:S@host/bucket/dir#r",
        "azure://acc:S@host/cont",
        "file:///a?encryptionKey=%22S%22",
        "nfs://h:/a?x=%7B%22password%22%3A%22S%22%7D",
    ],
)
def test_secrets_are_not_shown(url: str) -> None:
    secret = "hunter2Is0nlyOurs"
    parsed = parse_url(url.replace("S@", f"{secret}@").replace("%22S%22", f"%22{secret}%22"))
    assert secret in parsed.format()
    for text in (
        str(parsed),
        repr(parsed),
        parsed.public,
        f"{parsed!r}",
        scrub_text(parsed.format()),
    ):
        assert secret not in text


@pytest.mark.parametrize(
    "url",
    [
        "smb://u:hunter2Is0nlyOurs@\\\\h\\s",
        "s3://k:hunter2Is0nlyOurs%zz@h/b",
        "file:///a?encryptionKey=hunter2Is0nlyOurs",
    ],
)
def test_errors_quote_no_secret(url: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_url(url)
    assert "hunter2" not in f"{caught.value!r} {caught.value.data}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "part"),
    [
        (f"smb://u:{PLACEHOLDER}@d\\\\h\\s\0", "password"),
        (f"s3://key:{PLACEHOLDER}@host/bucket", "password"),
        (f"azure://account:{PLACEHOLDER}@host/container", "password"),
        (f"file:///a?encryptionKey=%22{PLACEHOLDER}%22", "encryptionKey"),
        (f"s3://k:s@h/b?x=%5B%7B%22y%22%3A%22{PLACEHOLDER}%22%7D%5D", "y"),
    ],
)
def test_the_placeholder_of_a_secret_is_refused(url: str, part: str) -> None:
    """Xen Orchestra must never send it; as a key it would encrypt with what everybody knows."""
    with pytest.raises(Refused, match="in place of a secret") as caught:
        parse_url(url)
    assert (caught.value.code, caught.value.data) == ("EINVAL", {"part": part})


async def test_the_placeholder_in_the_record_is_refused(root: Path) -> None:
    record = {"url": f"file://{root}", "encryptionKey": PLACEHOLDER}
    with pytest.raises(Refused, match="in place of a secret") as caught:
        await open_remote(record, options=OPTIONS)
    assert caught.value.data == {"part": "encryptionKey"}
    assert not root.exists()


def test_weakness_23_an_s3_url_never_becomes_plain_http_by_omission() -> None:
    """Upstream formats an object without protocol as ``s3+http://``: keys in clear."""
    parts: dict[str, Any] = {"host": "h", "username": "k", "password": "s", "path": "/b"}
    with pytest.raises(TypeError, match="protocol"):
        S3Url(**parts)
    assert S3Url(protocol="https", **parts).format() == "s3://k:s@h/b"
    assert S3Url(protocol="http", **parts).format() == "s3+http://k:s@h/b"


def test_unknown_keys_are_kept_and_mean_nothing() -> None:
    """Xen Orchestra's records have leaked them: benchmarks, id, info, name, proxy, enabled."""
    leaked = "benchmarks=%5B%5D&id=%22x%22&info=%7B%7D&name=%22n%22&proxy=null&enabled=true"
    parsed = parse_url(f"nfs://h:/a?{leaked}&url=%22file%3A%2F%2F%2F%22&type=%22s3%22&port=1")
    assert (parsed.type, parsed.use_vhd_directory, parsed.is_immutable) == ("nfs", False, False)
    assert parsed.options["name"] == "n"
    assert "port" not in parsed.options
    assert "type" not in parsed.options
    assert parse_url(parsed.format()) == parsed


def test_upstreams_format() -> None:
    """Trimmed segments, JSON values percent-encoded as JavaScript does."""
    url = "file:///a//b /c/?useVhdDirectory=true&x=%22%C3%A9%20'%22"
    assert parse_url(url).format() == "file:///a/b/c?useVhdDirectory=true&x=%22%C3%A9%20'%22"
    url = "smb://u:p@d\\\\h\\s"
    assert parse_url(url).format() == "smb://u:p@d\\\\h\\s\0"
    url = "azurite://u:p@h/c"
    assert parse_url(url).format() == url


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
_WORD = st.text("abcXYZ019-._", min_size=1, max_size=8).filter(lambda word: word != "..")
_URLS = st.one_of(
    st.builds("file://{}".format, st.text(max_size=20)),
    st.builds("nfs://{}:{}".format, _WORD, st.text(max_size=20)),
    st.builds("smb://{}:{}@{}\\\\{}\\{}".format, _WORD, st.text(max_size=9), _WORD, _WORD, _WORD),
    st.builds("s3://{}:{}@{}/{}#{}".format, _WORD, _WORD, _WORD, st.text(max_size=9), _WORD),
    st.builds(
        lambda user, password, host: f"s3://{quote(user)}:{quote(password, safe='')}@{host}/b",
        *(st.text(max_size=9), st.text(max_size=9), _WORD),
    ),
    st.builds("azurite+http://{}:{}@{}/{}".format, _WORD, _WORD, _WORD, st.text(max_size=9)),
    st.text(max_size=30),
)


@given(_URLS, st.dictionaries(_WORD, _JSON, max_size=3))
def test_format_and_parse_are_stable(url: str, options: dict[str, Any]) -> None:
    try:
        first = parse_url(url)
    except Refused:
        return
    object.__setattr__(first, "options", {**first.options, **options})
    again = parse_url(first.format())
    assert again.options == first.options
    assert again == parse_url(again.format())
    assert again.type == first.type
    for name in ("host", "username", "password", "domain", "region", "protocol", "port"):
        assert getattr(again, name, None) == getattr(first, name, None)


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_refused(url: str) -> None:
    for scheme in ("", "file://", "nfs://", "smb://", "s3://", "azure://"):
        with contextlib.suppress(Refused):
            repr(parse_url(scheme + url))
