from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

import proxy
from proxy.config import Config, ConfigError, HttpConfig, ListenConfig, Places, load, schema
from proxy.config.layers import VENDOR

from .conftest import Etc


def test_the_vendor_file_holds_the_defaults_and_one_listener(etc: Etc) -> None:
    loaded = load(etc.places())
    assert loaded.warnings == ()
    assert msgspec.structs.replace(loaded.config, http=HttpConfig()) == Config()
    assert list(loaded.config.http.listen) == ["https"]
    assert loaded.config.http.listen["https"].effective_port == 443


def test_the_vendor_file_names_every_key() -> None:
    """A key that only the schema knows is one that no operator finds."""
    text = VENDOR.read_text()
    given = tomllib.loads(text)

    def walk(kind: type[msgspec.Struct], table: dict[str, object], at: str) -> list[str]:
        missing = []
        for item in msgspec.structs.fields(kind):
            name = item.encode_name
            if name not in text:
                missing.append(at + name)
            elif isinstance(item.type, type) and issubclass(item.type, msgspec.Struct):
                inner = table[name]
                assert isinstance(inner, dict)
                missing += walk(item.type, inner, f"{at}{name}.")
        return missing

    assert walk(Config, given, "") == []


def test_every_wrong_value_is_reported_with_its_file(etc: Etc) -> None:
    system = etc.write("etc/config.toml", "stopGrace = 'soon'\n[api]\nmaxConnections = 'many'")
    user = etc.write("home/config.json", {"logs": {"level": "loud"}, "remotes": 3})
    with pytest.raises(ConfigError) as caught:
        load(etc.places())
    shown = sorted(map(str, caught.value.problems))
    assert shown == sorted(
        [
            f"{system}: stopGrace: expected a duration (milliseconds, or text such as '5m')",
            f"{system}: api.maxConnections: expected int, got str",
            f"{user}: logs.level: Invalid enum value 'loud'",
            f"{user}: remotes: expected a table, got a number",
        ]
    )


def test_an_unknown_key_warns_with_the_nearest_name(etc: Etc) -> None:
    path = etc.write("etc/config.toml", "[backups]\nsnapshotNameLableTpl = 'x'")
    (warning,) = load(etc.places()).warnings
    expected = "backups.snapshotNameLableTpl: unknown key, did you mean snapshotNameLabelTpl?"
    assert str(warning) == f"{path}: {expected}"


def test_keys_of_xen_orchestras_proxy_without_effect_say_why(etc: Etc) -> None:
    """Upstream's ``backups.maxMergedDeltasPerRun`` silently does nothing."""
    etc.write("etc/config.toml", "[backups]\nmaxMergedDeltasPerRun = 2")
    (warning,) = load(etc.places()).warnings
    assert warning.text == "has no effect here: write it in [backups.defaultSettings]"


def test_upstreams_own_vendor_file_loads(etc: Etc) -> None:
    """The keys and value forms that Xen Orchestra ships, so that a file moves over as it is."""
    etc.write(
        "etc/config.toml",
        """
        authenticationToken = ''
        datadir = '/var/lib/xo-proxy/data'
        resourceCacheDelay = '5m'
        [api]
        keepAliveInterval = 10e3
        [backups]
        dirMode = 0o700
        disableMergeWorker = false
        maxMergedDeltasPerRun = 2
        snapshotNameLabelTpl = '[XO Backup {job.name}] {vm.name_label}'
        vhdDirectoryCompression = 'brotli'
        [http.listen.https]
        autoCert = true
        cert = '/var/lib/xo-proxy/certificate.pem'
        key = '/var/lib/xo-proxy/key.pem'
        port = 443
        [logs]
        level = 'info'
        [remoteOptions]
        mountsDir = '/run/xo-proxy/mounts'
        timeout = 600e3
        [remotes]
        disableFileRemotes = true
        [reverseProxies]
        [xapiOptions]
        maxUncoalescedVdis = 1
        watchEvents = ['network', 'PIF', 'pool', 'SR', 'task', 'VBD', 'VDI', 'VIF', 'VM']
        """,
    )
    loaded = load(etc.places())
    assert loaded.config == load(Places(system=etc.root, user=etc.root, current=None)).config
    assert sorted(w.key for w in loaded.warnings) == [
        ("backups", "disableMergeWorker"),
        ("backups", "maxMergedDeltasPerRun"),
        ("reverseProxies",),
        ("xapiOptions", "watchEvents"),
    ]


def test_every_key_is_read_somewhere() -> None:
    """A key that nothing reads promises what it does not do: it belongs to those without effect."""
    rooms = Path(proxy.__file__).parent
    code = "".join(
        file.read_text("utf-8") for file in rooms.rglob("*.py") if file.name != "schema.py"
    )
    kinds = [
        kind
        for kind in vars(schema).values()
        if isinstance(kind, type) and issubclass(kind, schema.Section)
    ]
    names = {name for kind in kinds for name in kind.__struct_fields__}
    assert {name for name in names if f".{name}" not in code} == set()


def test_null_takes_a_value_back_to_its_default_and_removes_a_listener(etc: Etc) -> None:
    etc.write("etc/config.toml", "stopGrace = 1\n[http.listen.plain]\nport = 80")
    etc.option("a.json", {"stopGrace": None, "http": {"listen": {"https": None}}})
    config = load(etc.places()).config
    assert config.stop_grace == 60.0
    assert config.http.listen == {"plain": ListenConfig(port=80)}


@pytest.mark.parametrize(
    ("listener", "problem"),
    [
        ("cert = '/c'", "http.listen.x.key: cert and key go together"),
        ("port = 70000", "http.listen.x.port: expected int <= 65535"),
        ("port = 1\nsocket = '/s'", "set only one of"),
        ("fd = 3\nsystemdSocket = 0", "set only one of"),
    ],
)
def test_a_listener_that_cannot_work_is_refused(etc: Etc, listener: str, problem: str) -> None:
    etc.write("etc/config.toml", f"[http.listen.x]\n{listener}")
    with pytest.raises(ConfigError, match=problem):
        load(etc.places())
