"""Blobs in blocks: Put Block, Put Block From URL, Put Block List.

Blocks belong to the blob's name, not to an upload, until one list commits them; all others of
that name are thrown away with it.  So the ids carry the upload's UUID: a list never takes a block
of somebody else.  A name with nothing but uncommitted blocks does not exist for anybody.
"""

from __future__ import annotations

import datetime
import uuid
from typing import TYPE_CHECKING, Final

from proxy.errors import Refused
from proxy.formats.azure_signing import query_string, read_signature
from proxy.formats.azure_xml import block_id, dump_block_list
from proxy.remotes.objects.azure_client import VERSION

if TYPE_CHECKING:
    from proxy.remotes.objects.azure import AzureStore
    from proxy.remotes.objects.store import Condition

MOST_BLOCKS: Final = 50_000
LARGEST_BLOCK: Final = 4000 * 1024 * 1024
_PIECE: Final = 4 * 1024 * 1024
_READABLE: Final = datetime.timedelta(hours=1)
"""How long the service may read the source of one part."""


class AzureUpload:
    """See :class:`proxy.remotes.objects.store.Upload`."""

    def __init__(self, store: AzureStore, key: str) -> None:
        self._store = store
        self._client = store.client
        self._key = key
        self._uuid = str(uuid.uuid4())
        self._blocks: dict[int, list[str]] = {}

    async def send(self, number: int, data: bytes | memoryview) -> None:
        self._blocks[number] = [await self._put(number, 0, data)]

    async def copy(self, number: int, source: str, offset: int, length: int) -> None:
        """Through us, in pieces, where the service does not copy ranges (azurite)."""
        if self._store.copies_ranges:
            identifier = self._id(number, 0)
            until = datetime.datetime.now(datetime.UTC) + _READABLE
            place = self._client.place
            signature = read_signature(
                self._client.account, place.container, source, until=until, version=VERSION
            )
            answer = await self._client.ask(
                "COPY",
                "PUT",
                self._key,
                query={"comp": "block", "blockid": identifier},
                headers={
                    "x-ms-copy-source": place.origin
                    + self._client.path(source)
                    + query_string(signature),
                    "x-ms-source-range": f"bytes={offset}-{offset + length - 1}",
                },
            )
            if answer.status != 501:
                self._client.expect(answer, 201, "copying into", self._key)
                self._blocks[number] = [identifier]
                return
            self._store.copies_ranges = False
        await self._copy_through(number, source, offset, length)

    async def _copy_through(self, number: int, source: str, offset: int, length: int) -> None:
        buffer = memoryview(bytearray(min(length, _PIECE)))
        etag = (await self._store.head(source)).etag
        blocks: list[str] = []
        while length:
            piece = buffer[: min(length, len(buffer))]
            count = await self._store.get_into(source, offset, piece, etag=etag)
            if count < len(piece):
                raise Refused(
                    f"the range of '{source}' to be copied is not in it",
                    code="EINVAL",
                    data={"path": source},
                )
            blocks.append(await self._put(number, len(blocks), piece))
            offset += count
            length -= count
        self._blocks[number] = blocks

    async def complete(self, *, condition: Condition | None = None) -> None:
        """May be called again when its answer was lost."""
        ids = [identifier for number in sorted(self._blocks) for identifier in self._blocks[number]]
        if len(self._blocks) != max(self._blocks, default=0):
            raise Refused(f"the upload of '{self._key}' lacks a part", code="EINVAL")
        if len(ids) > MOST_BLOCKS:
            raise Refused(
                f"'{self._key}' has {len(ids)} blocks, more than {MOST_BLOCKS}", code="EFBIG"
            )
        await self._store.put_body(
            self._key,
            dump_block_list(ids),
            query={"comp": "blocklist"},
            headers={"x-ms-blob-content-type": "application/octet-stream"},
            condition=condition,
            doing="completing",
        )

    async def abort(self) -> None:
        """Nothing to send: there is no call for it.

        The service forgets blocks that nothing committed after a week, or when the blob is
        written; until then they are no blob, but are paid for.  Committing them only to delete
        the result would show a torn blob for a moment.
        """
        self._blocks.clear()

    async def _put(self, number: int, piece: int, data: bytes | memoryview) -> str:
        identifier = self._id(number, piece)
        await self._store.put_body(
            self._key,
            data,
            query={"comp": "block", "blockid": identifier},
            headers={},
            condition=None,
            doing=f"writing part {number} of",
        )
        return identifier

    def _id(self, number: int, piece: int) -> str:
        return block_id(self._uuid, number, piece)
