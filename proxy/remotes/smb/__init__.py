"""SMB shares without a kernel mount, for where mounting is not possible.

``wire``, ``names``, ``options`` and ``status`` are values; ``connection`` is the one place that
knows :mod:`smbprotocol`; ``share`` and ``files`` block, ``remote`` calls them in worker threads.
"""
