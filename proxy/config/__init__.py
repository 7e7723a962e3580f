"""Typed configuration in layers: files, merge, check, reload, and the token kept in it.

Where values come from, later over earlier:

1. the vendor defaults (``proxy/vendor.toml``, shipped with the package);
2. ``/etc/xo-proxy/config.*``;
3. ``$XDG_CONFIG_HOME/xo-proxy/config.*`` (default ``~/.config``);
4. ``.xo-proxy.*`` in every directory from ``/`` down to the current one;
5. every ``--config FILE`` in order, each followed by ``<stem>.z-auto.json`` beside it;
6. for the token alone, the environment variable ``XO_PROXY_AUTHENTICATION_TOKEN``.

Values are passed down to the rooms; no room below the daemon reads a file itself.
:mod:`proxy.config.live` follows the files while the daemon runs; it is not imported here, so
that a command that reads one value need not load Trio.
"""

from __future__ import annotations

from proxy.config.check import ConfigError, Problem
from proxy.config.layers import Places
from proxy.config.loading import Loaded, load
from proxy.config.schema import (
    ApiConfig,
    BackupsConfig,
    Config,
    HttpConfig,
    ListenConfig,
    LogsConfig,
    MetadataConfig,
    RemoteOptions,
    RemotesConfig,
    TasksConfig,
    VmConfig,
    XapiOptions,
)
from proxy.config.values import Bytes, Seconds, parse_duration, parse_size

__all__ = [
    "ApiConfig",
    "BackupsConfig",
    "Bytes",
    "Config",
    "ConfigError",
    "HttpConfig",
    "ListenConfig",
    "Loaded",
    "LogsConfig",
    "MetadataConfig",
    "Places",
    "Problem",
    "RemoteOptions",
    "RemotesConfig",
    "Seconds",
    "TasksConfig",
    "VmConfig",
    "XapiOptions",
    "load",
    "parse_duration",
    "parse_size",
]
