"""Sessions against a small host of our own writing."""

from __future__ import annotations

import socket
import ssl
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio

from proxy.errors import ProxyError, Unauthorized, Unreachable, XapiError
from proxy.runtime.transport import client_context
from proxy.simulator import SimulatedPool, serve
from proxy.simulator.pool import PASSWORD
from proxy.xapi import XapiOptions, connect, session

from .conftest import Failure, FakeHost, running


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_RETRY_DELAYS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(session, "_PENDING_DELAY", 0.01)


async def failed(options: XapiOptions) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        async with connect(options):
            pytest.fail("must not be connected")
    assert options.password not in str(caught.value)
    return caught.value


async def test_a_session_is_opened_and_closed(host: FakeHost, options: XapiOptions) -> None:
    async with connect(options) as xapi:
        assert xapi.pool_ref == "OpaqueRef:pool"
        assert len(host.sessions) == 1
    assert host.sessions == set()


async def test_the_session_is_closed_when_the_block_is_cancelled(
    host: FakeHost, options: XapiOptions
) -> None:
    with trio.CancelScope() as scope:
        async with connect(options):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert host.sessions == set()


async def test_a_cancelled_login_leaves_no_session(host: FakeHost, options: XapiOptions) -> None:
    arrived, go = trio.Event(), trio.Event()

    async def login(*_: str) -> str:
        arrived.set()
        await go.wait()
        host.sessions.add("OpaqueRef:late")
        return "OpaqueRef:late"

    host.results["session.login_with_password"] = login
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                async with connect(options):
                    pytest.fail("must not be connected")

            nursery.start_soon(run)
            await arrived.wait()
            nursery.cancel_scope.cancel()
            go.set()
    assert host.sessions == set()


async def test_wrong_credentials(host: FakeHost, options: XapiOptions) -> None:
    async def login(user: str, password: str) -> str:
        raise Failure("SESSION_AUTHENTICATION_FAILED", user, "Authentication failure")

    host.results["session.login_with_password"] = login
    error = await failed(options)
    assert isinstance(error, Unauthorized)
    assert error.code == "SESSION_AUTHENTICATION_FAILED"


async def test_a_refused_connection_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    error = await failed(XapiOptions(f"http://127.0.0.1:{port}", "root", "the-password"))
    assert isinstance(error, Unreachable)
    assert error.code == "ECONNREFUSED"
    assert error.message == f"ECONNREFUSED: 127.0.0.1:{port}: connection refused"


async def test_an_unresolvable_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lookup(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", lookup)
    error = await failed(XapiOptions("http://no.such.host.invalid", "root", "the-password"))
    assert isinstance(error, Unreachable)
    assert error.code == "ENOTFOUND"


async def test_a_self_signed_host_needs_allow_unauthorized(nursery: trio.Nursery) -> None:
    pool = SimulatedPool.small()
    url = await nursery.start(partial(serve, pool, tls=True))
    options = XapiOptions(url, "root", PASSWORD)
    error = await failed(options)
    assert error.code == "DEPTH_ZERO_SELF_SIGNED_CERT"
    assert "allowUnauthorized" in error.message
    async with connect(replace(options, allow_unauthorized=True)) as xapi:
        assert xapi.pool_ref == pool.ref


async def test_plain_http_on_a_tls_url_is_a_protocol_error(nursery: trio.Nursery) -> None:
    async def plain(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    listeners = await nursery.start(partial(trio.serve_tcp, plain, 0, host="127.0.0.1"))
    port = listeners[0].socket.getsockname()[1]
    error = await failed(XapiOptions(f"https://127.0.0.1:{port}", "root", "the-password"))
    assert error.code == "EPROTO"


@pytest.mark.parametrize("content_type", ["text/html", "text/xml"])
async def test_what_is_no_json_rpc_says_so(
    host: FakeHost, options: XapiOptions, content_type: str
) -> None:
    host.content_type = content_type
    error = await failed(options)
    assert error.code == "EPROTO"
    assert "7.3" in error.message


async def test_login_follows_the_slave_to_its_master(nursery: trio.Nursery) -> None:
    pool = SimulatedPool.small()
    url = await nursery.start(partial(serve, pool, slave_host="127.0.0.2"))
    slave = url.replace("127.0.0.1", "127.0.0.2")
    async with connect(XapiOptions(slave, "root", PASSWORD)) as xapi:
        assert xapi.session.address.host == "127.0.0.1"


async def test_weakness_2_a_master_that_becomes_a_slave_is_followed_mid_session() -> None:
    """Upstream fails on HOST_IS_SLAVE outside the opening of a session."""
    async with running(FakeHost()) as old, running(FakeHost()) as new:
        new.results["VM.get_record"] = {"uuid": "on the new master"}

        async def demoted(*_: str) -> Any:
            raise Failure("HOST_IS_SLAVE", "127.0.0.1")

        old.results["VM.get_record"] = demoted
        options = XapiOptions(f"http://127.0.0.1:{old.port}", "root", "the-password")
        async with connect(options) as xapi:
            # Both stand-ins share an address: the port tells them apart here.
            at = type(xapi.session.address).at
            address = xapi.session.address
            moved = replace(address, port=new.port)
            try:
                type(address).at = lambda *_: moved  # type: ignore[method-assign]
                assert (await xapi.record("VM", "OpaqueRef:1"))["uuid"] == "on the new master"
            finally:
                type(address).at = at  # type: ignore[method-assign]
        assert new.logins == 1


async def test_hosts_that_name_each_other_end_in_an_error(
    host: FakeHost, options: XapiOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def login(*_: str) -> str:
        raise Failure("HOST_IS_SLAVE", "127.0.0.1")

    async def no_sleep(_: float) -> None: ...

    monkeypatch.setattr("proxy.xapi.session.trio.sleep", no_sleep)
    host.results["session.login_with_password"] = login
    assert (await failed(options)).code == "HOST_IS_SLAVE"


async def test_an_expired_session_is_renewed_once_for_all(
    host: FakeHost, options: XapiOptions
) -> None:
    host.results["VM.get_record"] = {"uuid": "1"}
    async with connect(options) as xapi:
        host.sessions.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(xapi.record, "VM", "OpaqueRef:1")
    assert host.logins == 2


async def test_a_session_that_stays_invalid_is_an_error_without_the_session(
    host: FakeHost, options: XapiOptions
) -> None:
    async def invalid(*_: str) -> Any:
        raise Failure("SESSION_INVALID", "OpaqueRef:session-2-secret")

    async with connect(options) as xapi:
        host.results["VM.get_record"] = invalid
        with pytest.raises(XapiError) as caught:
            await xapi.record("VM", "OpaqueRef:1")
    assert caught.value.code == "SESSION_INVALID"
    assert "session-2-secret" not in repr((caught.value, caught.value.data))
    assert host.methods().count("VM.get_record") == 2


async def dropping(times: int) -> Any:
    """A call whose connection is dropped ``times`` times."""
    left = times

    async def call(*_: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise trio.BrokenResourceError
        return {"uuid": "1"}

    return call


async def test_weakness_2_calls_that_only_read_survive_a_lost_connection(
    host: FakeHost, options: XapiOptions
) -> None:
    host.results["VM.get_record"] = await dropping(2)
    async with connect(options) as xapi:
        assert (await xapi.record("VM", "OpaqueRef:1"))["uuid"] == "1"


async def test_retries_are_bounded(host: FakeHost, options: XapiOptions) -> None:
    host.results["VM.get_record"] = await dropping(1000)
    async with connect(options) as xapi:
        with pytest.raises(Unreachable):
            await xapi.record("VM", "OpaqueRef:1")
    assert host.methods().count("VM.get_record") == 4


async def test_a_call_that_may_have_changed_something_is_not_repeated(
    host: FakeHost, options: XapiOptions
) -> None:
    host.results["VM.set_name_label"] = await dropping(1)
    async with connect(options) as xapi:
        with pytest.raises(Unreachable):
            await xapi.call("VM.set_name_label", "OpaqueRef:1", "x")
    assert host.methods().count("VM.set_name_label") == 1


async def test_too_many_pending_tasks_is_waited_for(host: FakeHost, options: XapiOptions) -> None:
    answers: list[Any] = [Failure("TOO_MANY_PENDING_TASKS")] * 3

    async def busy(*_: str) -> Any:
        if answers:
            raise answers.pop()
        return "done"

    host.results["VM.set_name_label"] = busy
    async with connect(options) as xapi:
        assert await xapi.call("VM.set_name_label", "OpaqueRef:1", "x") == "done"


async def test_weakness_3_a_timed_out_call_ends_its_request(
    host: FakeHost, options: XapiOptions
) -> None:
    """Upstream rejects the caller and lets the HTTP request go on."""

    async def slow(*_: str) -> Any:
        await trio.sleep_forever()

    host.results["VM.get_record"] = slow
    async with connect(options) as xapi:
        with pytest.raises(Unreachable) as caught:
            await xapi.call("VM.get_record", "OpaqueRef:1", timeout=0.05)
        assert caught.value.code == "ETIMEDOUT"
        assert "VM.get_record" in caught.value.message
        # The client's side of the connection is closed: nothing of it is left in the pool.
        pool: Any = xapi.session._http._transport
        assert all(connection.is_idle() for connection in pool._pool.connections)


async def test_json_rpc_1_errors_of_older_hosts(
    host: FakeHost, options: XapiOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect(options) as xapi:

        async def old(_: Any) -> Any:
            return {"result": None, "error": ["HANDLE_INVALID", "VM", "OpaqueRef:1"], "id": 0}

        monkeypatch.setattr(host, "answer", old)
        with pytest.raises(XapiError) as caught:
            await xapi.record("VM", "OpaqueRef:1")
        monkeypatch.undo()
    assert caught.value.params == ["VM", "OpaqueRef:1"]


async def test_concurrency_is_bounded_but_waits_for_events_do_not_count(
    host: FakeHost, options: XapiOptions
) -> None:
    most = now = 0

    async def count(*_: str) -> Any:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await trio.sleep(0.01)
        now -= 1
        return {}

    host.results["VM.get_record"] = count
    ref = host.new_task()
    async with connect(replace(options, concurrency=2)) as xapi, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(
                xapi.await_record, "task", ref, lambda task: task["status"] == "success"
            )
        await trio.sleep(0.05)
        async with trio.open_nursery() as calls:
            for _ in range(6):
                calls.start_soon(xapi.record, "VM", "OpaqueRef:1")
        host.settle("success")
    assert most == 2


def test_tls_is_verified_unless_told_otherwise() -> None:
    strict = client_context(allow_unauthorized=False)
    assert strict.verify_mode == ssl.CERT_REQUIRED
    assert strict.check_hostname
