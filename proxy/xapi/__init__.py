"""Pools: sessions, calls, waits, transfers, snapshots and ownership marks through XAPI."""

from __future__ import annotations

from proxy.xapi.client import HostTask, Xapi, connect
from proxy.xapi.options import Address, XapiOptions
from proxy.xapi.transfer import Download, Upload

__all__ = ["Address", "Download", "HostTask", "Upload", "Xapi", "XapiOptions", "connect"]
