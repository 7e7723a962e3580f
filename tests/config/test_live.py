from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from proxy.config import Config, ConfigError, load
from proxy.config.live import LiveConfig
from proxy.errors import Conflict, Refused
from proxy.runtime.threads import inline_threads

from .conftest import Etc


@pytest.fixture
async def live(etc: Etc) -> LiveConfig:
    etc.write("etc/config.toml", "authenticationToken = 'token-of-the-start'\nstopGrace = 1000")
    return LiveConfig(etc.places(), load(etc.places()))


@pytest.fixture
def no_xenstore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


async def test_a_changed_file_is_seen(
    etc: Etc, live: LiveConfig, autojump_clock: trio.testing.MockClock
) -> None:
    told: list[Config] = []
    live.on_change(told.append)
    with inline_threads():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(live.watch)
            await trio.sleep(1)
            etc.write("home/config.toml", "stopGrace = 2000")
            await trio.sleep(2)
            assert live.value.stop_grace == 2.0
            etc.write("home/config.toml", "stopGrace = 30000")
            await trio.sleep(2)
            nursery.cancel_scope.cancel()
    assert [config.stop_grace for config in told] == [2.0, 30.0]


async def test_a_changed_token_file_is_seen(
    etc: Etc, autojump_clock: trio.testing.MockClock
) -> None:
    etc.write("token", "first-token")
    etc.option("a.toml", "authenticationTokenFile = './token'")
    live = LiveConfig(etc.places(), load(etc.places()))
    with inline_threads():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(live.watch)
            await trio.sleep(1)
            etc.write("token", "the second token")
            await trio.sleep(2)
            assert live.current() == "the second token"
            nursery.cancel_scope.cancel()


async def test_a_broken_file_keeps_the_old_values(etc: Etc, live: LiveConfig) -> None:
    etc.write("home/config.toml", "stopGrace = ")
    assert not await live.reload()
    assert live.value.stop_grace == 1.0
    assert live.current() == "token-of-the-start"


async def test_a_reload_never_empties_the_token(etc: Etc, live: LiveConfig) -> None:
    etc.write("etc/config.toml", "stopGrace = 5000")
    assert await live.reload()
    assert live.value.stop_grace == 5.0
    assert live.current() == "token-of-the-start"


async def test_set_token_is_in_force_when_it_returns(etc: Etc, live: LiveConfig) -> None:
    """Upstream answers before the reload that makes the new token valid."""
    etc.write("home/config.z-auto.json", {"stopGrace": 7000})
    await live.rotate("token-of-the-client")
    path = etc.root / "home" / "config.z-auto.json"
    assert live.current() == "token-of-the-client"
    assert json.loads(path.read_text()) == {
        "stopGrace": 7000,
        "authenticationToken": "token-of-the-client",
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load(etc.places()).config.authentication_token == "token-of-the-client"
    assert [p.name for p in path.parent.iterdir()] == ["config.z-auto.json"]


async def test_with_an_option_file_the_token_is_kept_beside_it(etc: Etc) -> None:
    """Two daemons of one user must not share their tokens."""
    etc.option("proxy.toml", "authenticationToken = 'token-of-the-file'")
    live = LiveConfig(etc.places(), load(etc.places()))
    await live.rotate("token-of-the-client")
    assert (etc.root / "proxy.z-auto.json").exists()
    assert not (etc.root / "home").exists()
    assert load(etc.places()).config.authentication_token == "token-of-the-client"


async def test_a_token_from_the_environment_cannot_be_changed(
    etc: Etc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XO_PROXY_AUTHENTICATION_TOKEN", "from-the-environment")
    live = LiveConfig(etc.places(), load(etc.places()))
    with pytest.raises(Refused, match="change it there"):
        await live.rotate("token-of-the-client")
    assert not (etc.root / "home").exists()


async def test_a_later_file_that_sets_the_token_is_named(etc: Etc, live: LiveConfig) -> None:
    etc.write("work/.xo-proxy.toml", "authenticationToken = 'token-of-the-directory'")
    await live.reload()
    with pytest.raises(Conflict, match=r"\.xo-proxy\.toml, which overrides"):
        await live.rotate("token-of-the-client")
    assert live.current() == "token-of-the-directory"
    assert not (etc.root / "home" / "config.z-auto.json").exists()


@pytest.mark.parametrize("token", ["", "  ", " padded", "new\nline", "x" * 5000])
async def test_an_unusable_token_is_refused(live: LiveConfig, token: str) -> None:
    with pytest.raises(Refused, match="the token must"):
        await live.rotate(token)
    assert live.current() == "token-of-the-start"


async def test_a_broken_auto_file_is_not_overwritten(etc: Etc, live: LiveConfig) -> None:
    path = etc.write("home/config.z-auto.json", "{broken")
    with pytest.raises(Refused, match="cannot be stored"):
        await live.rotate("token-of-the-client")
    assert path.read_text() == "{broken"


@pytest.mark.usefixtures("no_xenstore")
async def test_without_any_token_the_start_says_how_to_set_one(etc: Etc) -> None:
    live = LiveConfig(etc.places(), load(etc.places()))
    with pytest.raises(ConfigError, match=r"config\.toml.*XO_PROXY_AUTHENTICATION_TOKEN"):
        await live.ensure_token()


@pytest.fixture
def xenstore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the Xen tools, over one file."""
    store = tmp_path / "store"
    store.write_text('"token-of-xenstore"\n')
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, command in (("xenstore-read", "cat"), ("xenstore-rm", "rm")):
        tool = tools / name
        tool.write_text(
            f"#!/bin/sh\n[ $1 = vm-data/xo-proxy-authenticationToken ] && {command} {store}\n"
        )
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/bin:/usr/bin")
    return store


async def test_the_first_start_takes_the_token_from_xenstore(etc: Etc, xenstore: Path) -> None:
    """Upstream writes it to disk, but refuses it, and accepts an empty one, until a restart."""
    live = LiveConfig(etc.places(), load(etc.places()))
    await live.ensure_token()
    assert live.current() == "token-of-xenstore"
    assert not xenstore.exists()
    assert load(etc.places()).config.authentication_token == "token-of-xenstore"


async def test_xenstore_is_left_alone_when_a_token_is_set(live: LiveConfig, xenstore: Path) -> None:
    await live.ensure_token()
    assert live.current() == "token-of-the-start"
    assert xenstore.exists()
