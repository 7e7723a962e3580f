from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.errors import Refused
from proxy.rpc.auth import Authenticator, presented

if TYPE_CHECKING:
    from tests.rpc.conftest import Server


class Store:
    def __init__(self, token: str) -> None:
        self.token = token
        self.failure: Exception | None = None

    def current(self) -> str:
        return self.token

    async def rotate(self, new: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.token = new


def cookie(value: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"p"), (b"cookie", f"authenticationToken={value}".encode())]


def authenticator(store: Store) -> Authenticator:
    return Authenticator(store, grace=lambda: 60.0)


@pytest.mark.parametrize("sent", ["t+k/1=", "t%2Bk%2F1%3D", '"t+k/1="'])
def test_plain_and_encoded_tokens_are_accepted(sent: str) -> None:
    assert authenticator(Store("t+k/1=")).accepts(cookie(sent)) == b"t+k/1="


def test_a_token_that_looks_encoded_is_accepted_as_it_is() -> None:
    assert authenticator(Store("100%41")).accepts(cookie("100%41")) == b"100%41"


@pytest.mark.parametrize("sent", ["", "%", "t", "tokem", "token2", "TOKEN", "tok\u00e9n"])
def test_other_tokens_are_refused(sent: str) -> None:
    assert authenticator(Store("token")).accepts(cookie(sent)) is None


@pytest.mark.parametrize("sent", ["", '""', "%00"])
def test_an_empty_token_is_never_accepted(sent: str) -> None:
    """Weakness 9: upstream accepts an empty cookie before its first token is effective."""
    checks = authenticator(Store(""))
    assert checks.accepts(cookie(sent)) is None
    assert checks.accepts([]) is None


def test_the_cookie_is_found_among_others() -> None:
    assert presented([(b"cookie", b"a=b; authenticationToken=x; c=d")]) == b"x"
    assert presented([(b"cookie", b"a=b"), (b"cookie", b"authenticationToken=y")]) == b"y"
    assert presented([(b"cookie", b"xauthenticationToken=x")]) is None


@pytest.mark.virtual_clock
async def test_the_previous_token_is_good_for_the_grace_and_learns_the_new_one() -> None:
    store = Store("old")
    checks = authenticator(store)
    await checks.rotate("new;1")
    assert checks.accepts(cookie("new%3B1")) == b"new;1"
    assert checks.news_for(b"new;1") is None
    token = checks.accepts(cookie("old"))
    assert token == b"old"
    assert checks.news_for(token) == b"authenticationToken=new%3B1"
    await trio.sleep(61)
    assert checks.accepts(cookie("old")) is None


@pytest.mark.virtual_clock
async def test_a_token_that_came_back_is_no_previous_one() -> None:
    checks = authenticator(Store("a"))
    await checks.rotate("b")
    await checks.rotate("a")
    await trio.sleep(61)
    assert checks.accepts(cookie("a")) == b"a"
    assert checks.accepts(cookie("b")) is None


@pytest.mark.virtual_clock
async def test_changes_at_the_same_time_leave_one_token() -> None:
    store = Store("a")
    checks = authenticator(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(checks.rotate, "b")
        nursery.start_soon(checks.rotate, "c")
    await trio.sleep(61)
    good = [token for token in "abc" if checks.accepts(cookie(token))]
    assert good == [store.token]


@pytest.mark.virtual_clock
async def test_a_change_that_failed_locks_nobody_out() -> None:
    store = Store("old")
    store.failure = Refused("read-only disk", code="EROFS")
    checks = authenticator(store)
    with pytest.raises(Refused):
        await checks.rotate("new")
    await trio.sleep(61)
    assert checks.accepts(cookie("old")) == b"old"
    assert checks.accepts(cookie("new")) is None


async def test_set_token_is_effective_when_it_is_answered(server: Server) -> None:
    """Weakness 10: upstream answers before the token has changed."""
    answer = await server.call("authentication.setToken", {"token": "fresh"})
    assert answer.json()["result"] is True
    # the caller itself learns it, too
    assert answer.headers["set-cookie"] == "authenticationToken=fresh"
    assert server.tokens.token == "fresh"
    again = await server.call("system.getServerVersion", token="fresh")
    assert again.status == 200
    assert "set-cookie" not in again.headers
    old = await server.call("system.getServerVersion")
    assert old.status == 200
    assert old.headers["set-cookie"] == "authenticationToken=fresh"


async def test_set_token_refuses_an_empty_one(server: Server) -> None:
    error: dict[str, Any] = (await server.call("authentication.setToken", {"token": ""})).json()[
        "error"
    ]
    assert error["code"] == 10
    assert error["data"]["errors"][0]["keyword"] == "minLength"
    assert server.tokens.token == "a-token"
