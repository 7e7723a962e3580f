"""VM backup daemon for XCP-ng and XenServer, driven over HTTP with JSON-RPC."""

__version__ = "1.0.0"
