"""The API: JSON-RPC over HTTP, as Xen Orchestra speaks it.

``create_app`` builds the application from the daemon's services, ``serve`` runs it on
listeners; the methods are in :mod:`proxy.rpc.methods`.
"""

from __future__ import annotations

from proxy.rpc.app import App, create_app
from proxy.rpc.auth import Authenticator, TokenStore
from proxy.rpc.context import Context, Services
from proxy.rpc.registry import Params, Registry
from proxy.rpc.replies import Binary
from proxy.rpc.serving import Address, open_listeners, serve, tls_context

__all__ = [
    "Address",
    "App",
    "Authenticator",
    "Binary",
    "Context",
    "Params",
    "Registry",
    "Services",
    "TokenStore",
    "create_app",
    "open_listeners",
    "serve",
    "tls_context",
]
