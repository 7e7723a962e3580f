"""The database of a pool, as XAPI's ``/pool/xmldbdump`` sends it: is it whole, and that pool's?

One XML document, ``<database>`` with the rows of every class of objects.  It comes without a
length.  While a pool is being upgraded a master sends a complete document without any row
instead: restoring that would empty the pool.
"""

from __future__ import annotations

from proxy.errors import Corrupt

_START = b"<"
_END = b"</database>"
_KEPT = 64
"""Bytes of the end that are looked at: the tag and what blanks may follow it."""


class DatabaseCheck:
    """Fed every byte, then asked by :meth:`finish`.

    A database holds its pool as a row, so the pool's uuid stands somewhere in it.
    """

    def __init__(self, pool_uuid: str) -> None:
        self._needle = pool_uuid.encode()
        self._start = b""
        self._end = b""
        self._found = False

    def feed(self, view: memoryview) -> None:
        data = bytes(view)
        if not self._start:
            self._start = data.lstrip()[:1]
        kept = max(_KEPT, len(self._needle) - 1)
        if not self._found:
            self._found = self._needle in self._end + data
        self._end = (self._end + data[-kept:])[-kept:]

    def finish(self) -> None:
        """Raise ``Corrupt`` unless it was a whole database that holds the pool."""
        if self._start != _START:
            raise Corrupt("the host sent no XML as the pool's database")
        if not self._end.rstrip().endswith(_END):
            raise Corrupt("the pool's database ends before its end", data={"what": "truncated"})
        if not self._found:
            raise Corrupt(
                "the host sent a database that does not hold the pool, as it does while the pool"
                " is being upgraded: run the backup again afterwards",
                data={"what": "no pool"},
            )
