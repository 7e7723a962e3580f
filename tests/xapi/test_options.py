from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import Refused
from proxy.runtime import secrets
from proxy.xapi import Address, XapiOptions

CREDENTIALS = {"username": "root", "password": "correct horse"}


def options(url: str, **more: Any) -> XapiOptions:
    return XapiOptions.from_record({"url": url, "credentials": CREDENTIALS, **more}, {})


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("10.0.0.1", Address("https", "10.0.0.1", 443)),
        ("http://host.example:8080", Address("http", "host.example", 8080)),
        ("https://[fd00::2]:8443/sub/", Address("https", "fd00::2", 8443, "/sub/")),
        ("//host", Address("https", "host", 443)),
        ("host:444", Address("https", "host", 444)),
        ("[fd00::2]", Address("https", "fd00::2", 443)),
    ],
)
def test_the_url_grammar_of_xo(url: str, address: Address) -> None:
    assert options(url).address == address


@pytest.mark.parametrize(
    "url",
    ["", "ftp://host", "https://", "host?x=1", "host#f", "https://a b", "https://h:99999", "h\n"],
)
def test_a_broken_url_is_refused(url: str) -> None:
    with pytest.raises(Refused):
        _ = options(url).address


def test_the_address_of_another_host_keeps_scheme_port_and_path() -> None:
    address = options("http://10.0.0.1:81/x/").address.at("fd00::7")
    assert address.url("jsonrpc") == "http://[fd00::7]:81/x/jsonrpc"


def test_credentials_may_stand_in_the_url_but_do_not_stay_there() -> None:
    made = XapiOptions.from_record({"url": "https://root:p%40ssword1@host"}, {})
    assert (made.username, made.password) == ("root", "p@ssword1")
    assert "ssword" not in repr(made)
    assert "ssword" not in made.url


def test_the_password_is_known_as_a_secret_and_not_shown() -> None:
    made = options("host", httpProxy="http://user:proxysecret@proxy:3128")
    assert "horse" not in repr(made)
    assert "proxysecret" not in repr(made)
    assert secrets.scrub_text("login with correct horse") == "login with ***"
    assert "proxysecret" not in secrets.scrub_text("via user:proxysecret")


def test_missing_credentials_are_named() -> None:
    with pytest.raises(Refused) as caught:
        XapiOptions.from_record({"url": "host"}, {})
    assert caught.value.message == "missing credentials"
    assert caught.value.rpc_code != 10, "on that number XO would repeat the run without its log"


def test_defaults_come_from_the_configuration_and_the_record_wins() -> None:
    record = {"url": "host", "credentials": CREDENTIALS, "allowUnauthorized": False}
    defaults = {"allow_unauthorized": True, "max_uncoalesced_vdis": 3, "unknown": 1}
    made = XapiOptions.from_record(record, defaults)
    assert not made.allow_unauthorized
    assert made.max_uncoalesced_vdis == 3
