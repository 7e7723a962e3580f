from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.config import ConfigError, Places, load
from proxy.config.layers import merge

from .conftest import Etc

KEYS = st.sampled_from("abc")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
calmly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TABLES = st.dictionaries(KEYS, JSON, max_size=3)


def at(value: Any, path: list[Any]) -> Any:
    for step in path:
        value = value[step]
    return value


def leaves(value: Any, path: list[Any] | None = None) -> list[tuple[list[Any], Any]]:
    path = path or []
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, [*path, key])]
    if isinstance(value, list) and value:
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, [*path, i])]
    return [(path, value)]


@calmly
@given(TABLES, TABLES)
def test_every_leaf_of_the_upper_layer_is_in_the_merge(base: Any, over: Any) -> None:
    merged = merge(base, over)
    for path, value in leaves(over):
        if value not in ({}, []):  # an empty table or array adds nothing
            assert at(merged, path) == value


@calmly
@given(TABLES)
def test_merging_nothing_changes_nothing(table: Any) -> None:
    assert merge(table, {}) == table
    assert merge({}, table) == table
    assert merge(table, table) == table


@calmly
@given(TABLES, TABLES, TABLES)
def test_merging_does_not_change_its_arguments(one: Any, two: Any, three: Any) -> None:
    before = repr((one, two, three))
    merge(merge(one, two), three)
    assert repr((one, two, three)) == before


def test_a_shorter_array_does_not_shorten_a_longer_one() -> None:
    assert merge({"a": [1, {"x": 1}, 3]}, {"a": [9, {"y": 2}]}) == {"a": [9, {"x": 1, "y": 2}, 3]}


def test_later_layers_win_in_upstreams_order(etc: Etc) -> None:
    etc.write(
        "etc/config.toml", "datadir = '/system'\nresourceCacheDelay = 1\n[logs]\nlevel='debug'"
    )
    etc.write("home/config.toml", "datadir = '/user'\nstopGrace = 2000")
    etc.write("home/config.z-auto.json", {"stopGrace": "3s"})
    etc.write(".xo-proxy.toml", "datadir = '/parent'\n[api]\nmaxBodySize = '1MiB'")
    etc.write("work/.xo-proxy.json", {"datadir": "/current"})
    etc.option("one.toml", "[api]\nmaxConnections = 1\ntokenGrace = 1000")
    etc.option("two.toml", "[api]\nmaxConnections = 2")

    config = load(etc.places()).config

    assert config.datadir == Path("/current")
    assert config.stop_grace == 3.0  # config.z-auto.json sorts last in its directory
    assert config.logs.level == "debug"
    assert config.resource_cache_delay == 0.001
    assert config.api.max_body_size == 1024**2
    assert (config.api.max_connections, config.api.token_grace) == (2, 1.0)


def test_paths_are_relative_to_the_real_file(etc: Etc) -> None:
    real = etc.write("real/xo.toml", "datadir = './data'\n[remoteOptions]\nmountsDir = '../mnt'")
    link = etc.root / "link.toml"
    link.symlink_to(real)
    etc.explicit.append(link)
    config = load(etc.places()).config
    assert config.datadir == etc.root / "real" / "data"
    assert config.remote_options.mounts_dir == etc.root / "mnt"


def test_a_tilde_is_the_home_directory(etc: Etc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    etc.write("etc/config.toml", "datadir = '~/xo'")
    assert load(etc.places()).config.datadir == Path("/home/somebody/xo")


def test_the_user_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg")
    assert Places().user == Path("/xdg/xo-proxy")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative is invalid by the standard")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Places().user == Path("/home/somebody/.config/xo-proxy")


def test_a_missing_option_file_stops_the_start(etc: Etc) -> None:
    etc.explicit.append(etc.root / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"nowhere.toml: no such file"):
        load(etc.places())


def test_an_option_file_of_another_format_stops_the_start(etc: Etc) -> None:
    etc.option("config.yaml", "a: b")
    with pytest.raises(ConfigError, match=r"only \.toml and \.json"):
        load(etc.places())


def test_other_formats_in_a_directory_are_named_and_left_out(etc: Etc) -> None:
    path = etc.write("etc/config.cson", "a: b")
    (warning,) = load(etc.places()).warnings
    assert warning.path == path


@pytest.mark.parametrize("text", ["a = ", "\0", "a = 1\na = 2"])
def test_a_syntax_error_names_its_file(etc: Etc, text: str) -> None:
    etc.write("etc/config.toml", text)
    with pytest.raises(ConfigError, match=r"etc/config\.toml: cannot be parsed"):
        load(etc.places())


@pytest.mark.parametrize("text", ["[1]", '"text"', "null"])
def test_a_json_file_holds_a_table(etc: Etc, text: str) -> None:
    etc.write("etc/config.json", text)
    with pytest.raises(ConfigError, match="must hold a table"):
        load(etc.places())


def test_hostile_nesting_is_an_error_and_no_crash(etc: Etc) -> None:
    etc.write("etc/config.json", "[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be parsed"):
        load(etc.places())
