"""Disks over NBD: blocks at any place, over several connections, each with reads in flight.

What breaks is opened again, at another host if need be, and its reads are done again; only
the caller sees a block late.  A disk that cannot be had over NBD at all is ``Unreachable``
with the code ``NO_NBD_AVAILABLE``: then it is read as a stream.
"""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import trio

from proxy.disks.disk import RandomAccess, length_of, read_in_order
from proxy.errors import ProxyError, Unreachable, XapiError
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE, STORED_BLOCK
from proxy.runtime.background import background
from proxy.xapi.nbd_dial import NO_NBD, Dialer, NbdInfo
from proxy.xapi.nbd_link import NbdLink, Read
from proxy.xapi.shapes import is_list, is_map

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.disks.disk import BlockReader, Blocks
    from proxy.runtime.buffers import BufferPool
    from proxy.runtime.transport import Connection
    from proxy.xapi.client import Xapi

_log = structlog.get_logger(__name__)

CONNECTIONS: Final = 2
DEPTH: Final = 4
"""Reads in flight on one connection."""
SILENCE_SECONDS: Final = 60.0
RETRY_DELAYS: Final = (0.1, 1, 2, 4, 8)
"""Seconds before each new try of a connection or a read that failed."""

_CLOSED: Final = "the disk over NBD is closed"


class NbdExport:
    """A disk that is served over NBD; any number of tasks may read at once.

    Made by :func:`connect_nbd`.
    """

    def __init__(
        self,
        dialer: Dialer,
        *,
        depth: int,
        seconds: float,
        retry_delays: Sequence[float],
        refresh: Callable[[], Awaitable[Sequence[NbdInfo]]] | None,
    ) -> None:
        self._dialer = dialer
        self._depth = depth
        self._seconds = seconds
        self._delays = retry_delays
        self._refresh = refresh
        self._links: list[NbdLink] = []
        self._waiting: deque[Read] = deque()
        self._keepers = 0
        self._settled = trio.Event()
        self._lost: ProxyError | None = None
        """Why no connection is left, nor will be."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self._dialer.size or 0

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    @property
    def depth(self) -> int:
        """Reads at once that keep all its connections busy."""
        return max(1, self._keepers) * self._depth

    async def read_block(self, index: int, into: memoryview) -> None:
        """Read block ``index`` to ``into[512:]``; behind the end of the disk come zeros.

        ``into`` has :data:`~proxy.formats.vhd.STORED_BLOCK` bytes.  A read that fails is tried
        again after each of the retry delays.  Raises ``Unreachable`` (or ``Corrupt``, from a
        server that does not speak NBD) with the last reason; ``IndexError`` behind the end.
        On cancel the content of ``into`` is undefined, and nobody writes into it any more.
        """
        length = length_of(index, self.size)
        if index < 0 or length <= 0:
            raise IndexError(f"block {index} of a disk of {self.size} bytes")
        data = into[BITMAP_SIZE:STORED_BLOCK]
        data[length:] = bytes(BLOCK_SIZE - length)
        for delay in (*self._delays, None):
            read = Read(index * BLOCK_SIZE, data[:length])
            await self._done(read)
            if read.error is None:
                return
            if delay is None or self._lost is not None:
                raise read.error
            await trio.sleep(delay)

    async def _done(self, read: Read) -> None:
        self._waiting.append(read)
        self._dispatch()
        try:
            await read.done.wait()
        except trio.Cancelled:
            if read in self._waiting:
                self._waiting.remove(read)
            await read.abandon()
            raise

    def _dispatch(self) -> None:
        """Give what waits to the least busy connections."""
        while self._waiting:
            if self._lost is not None:
                self._waiting.popleft().finish(self._lost)
                continue
            link = min(
                (link for link in self._links if link.has_room),
                key=lambda link: link.in_flight,
                default=None,
            )
            if link is None:
                return
            link.take(self._waiting.popleft())

    async def open(self, nursery: trio.Nursery, connections: int) -> None:
        """Keep ``connections`` of them open in ``nursery``; returns with the first.

        Raises ``Unreachable`` (``NO_NBD_AVAILABLE``) when none can be opened.
        """
        self._keepers = connections
        for _ in range(connections):
            nursery.start_soon(self._keep)
        await self._settled.wait()
        if self._lost is not None:
            raise self._lost

    def close(self, reason: ProxyError | None = None) -> None:
        """Fail what waits and whatever is asked from now on."""
        self._lost = reason or Unreachable(_CLOSED, code="ECONNRESET")
        self._settled.set()
        self._dispatch()

    async def _keep(self) -> None:
        """Keep one connection open; gives up after a failure of its first dial.

        Later it gives up when all retries in a row did not bring a single block.
        """
        failures = 0
        while True:
            try:
                async with self._dialer.connection() as (connection, _):
                    link = self._link(connection)
                    reason = await self._use(link)
                self._dialer.failed(connection.peer)
                failures = 1 if link.served else failures + 1
            except ProxyError as error:
                reason = error
                failures = failures + 1 if failures else len(self._delays) + 1
            if failures > len(self._delays):
                break
            _log.info("lost a NBD connection", error=reason.message, code=reason.code)
            await trio.sleep(self._delays[failures - 1])
            if failures > 1:
                await self._look_again()
        self._keepers -= 1
        if not self._keepers:
            self.close(reason)

    def _link(self, connection: Connection) -> NbdLink:
        return NbdLink(connection, depth=self._depth, seconds=self._seconds, replied=self._dispatch)

    async def _use(self, link: NbdLink) -> ProxyError:
        """Read over ``link`` as long as it works; says why it does not any more."""
        reason: ProxyError = Unreachable(_CLOSED, code="ECONNRESET")
        self._links.append(link)
        self._settled.set()
        self._dispatch()
        try:
            reason = await link.run()
        finally:
            self._links.remove(link)
            for read in link.orphans():
                read.finish(reason)
        return reason

    async def _look_again(self) -> None:
        """Ask where the disk is served now: the session in the names may have ended."""
        if self._refresh is None:
            return
        try:
            self._dialer.infos = list(await self._refresh()) or self._dialer.infos
        except ProxyError as error:
            _log.info("cannot ask for NBD", error=error.message, code=error.code)


@asynccontextmanager
async def connect_nbd(
    infos: Sequence[NbdInfo],
    *,
    size: int | None = None,
    connections: int = CONNECTIONS,
    depth: int = DEPTH,
    seconds: float = SILENCE_SECONDS,
    retry_delays: Sequence[float] = RETRY_DELAYS,
    refresh: Callable[[], Awaitable[Sequence[NbdInfo]]] | None = None,
) -> AsyncIterator[NbdExport]:
    """Open the disk that all ``infos`` serve, with up to ``connections`` connections.

    Ready with the first of them; the others are at work as soon as they are open.  A server
    that tells less than ``size`` bytes is not used; more than that is not read.  ``depth``
    bounds the reads in flight on a connection, ``seconds`` the opening and any silence while a
    reply is due.  ``refresh`` finds new candidates when the old ones stop working.

    Raises ``Unreachable`` (``NO_NBD_AVAILABLE``) when no candidate works.  Leaving and a cancel
    close all sockets at once; reads that are under way then fail.
    """
    export = NbdExport(
        Dialer(infos, size=size, seconds=seconds),
        depth=depth,
        seconds=seconds,
        retry_delays=retry_delays,
        refresh=refresh,
    )
    try:
        async with background() as nursery:
            await export.open(nursery, connections)
            yield export
    finally:
        export.close()


async def nbd_candidates(xapi: Xapi, vdi_ref: str) -> list[NbdInfo]:
    """Where ``vdi_ref`` is served over NBD, on the pool's backup network if it has one.

    Raises ``Unreachable`` (``NO_NBD_AVAILABLE``) when nowhere, and ``XapiError``.
    """
    records = await xapi.call("VDI.get_nbd_info", vdi_ref)
    if not is_list(records):
        raise Unreachable("VDI.get_nbd_info answered no list", code="EPROTO")
    if not records:
        raise Unreachable("no host serves the disk over NBD", code=NO_NBD)
    allow_plain = await _allows_plain(xapi)
    infos = [
        NbdInfo.from_record(record, allow_plain=allow_plain) for record in records if is_map(record)
    ]
    allowed = await _backup_addresses(xapi)
    if allowed is not None:
        infos = [info for info in infos if info.address in allowed]
        if not infos:
            raise Unreachable("no host serves NBD on the backup network", code=NO_NBD)
    return infos


async def _allows_plain(xapi: Xapi) -> bool:
    """Whether the pool's administrator chose NBD without TLS."""
    networks = await xapi.call("network.get_all_records")
    purposes = {
        str(purpose)
        for record in (networks.values() if is_map(networks) else ())
        for purpose in record.get("purpose") or ()
    }
    return "insecure_nbd" in purposes and "nbd" not in purposes


async def _backup_addresses(xapi: Xapi) -> set[str] | None:
    """The IPv4 addresses of the pool's backup network; ``None``: there is none."""
    config = await xapi.call("pool.get_other_config", xapi.pool_ref)
    uuid = config.get("xo:backupNetwork") if is_map(config) else None
    if not uuid:
        return None
    try:
        network = await xapi.call("network.get_by_uuid", uuid)
    except XapiError as error:
        if error.code not in ("UUID_INVALID", "HANDLE_INVALID"):
            raise
        return set()  # data must not go over another network instead
    pifs = await xapi.call("network.get_PIFs", network)
    return {
        address
        for pif in (pifs if is_list(pifs) else ())
        if (address := str(await xapi.call("PIF.get_IP", str(pif))))
    }


@asynccontextmanager
async def open_nbd(
    xapi: Xapi, vdi_ref: str, *, connections: int = CONNECTIONS
) -> AsyncIterator[NbdExport]:
    """Open a VDI over NBD: :func:`nbd_candidates`, then :func:`connect_nbd`.

    Raises ``Unreachable`` (``NO_NBD_AVAILABLE``) and ``XapiError``.
    """
    infos = await nbd_candidates(xapi, vdi_ref)
    size = int(await xapi.call("VDI.get_virtual_size", vdi_ref))
    refresh = partial(nbd_candidates, xapi, vdi_ref)
    async with connect_nbd(infos, size=size, connections=connections, refresh=refresh) as export:
        yield export


class NbdDisk(RandomAccess):
    """The blocks ``blocks`` of an export as a disk: a ``RandomDisk``."""

    def __init__(self, export: NbdExport, blocks: Blocks, *, is_differencing: bool) -> None:
        self.virtual_size = export.size
        self.is_differencing = is_differencing
        self.blocks = blocks
        self._export = export

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`NbdExport.read_block`."""
        await self._export.read_block(index, into)

    def read(self, pool: BufferPool) -> AbstractAsyncContextManager[BlockReader]:
        """See ``Disk.read``; as many reads at once as the connections take."""
        return read_in_order(self, pool, depth=self._export.depth)
