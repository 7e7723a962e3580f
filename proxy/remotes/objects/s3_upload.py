"""An S3 object in parts (multipart upload)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from proxy.errors import Corrupt, NotFound, Unreachable
from proxy.formats import s3_xml, sigv4
from proxy.remotes.objects.s3_client import confirmed

if TYPE_CHECKING:
    from proxy.remotes.objects.s3_client import S3Client
    from proxy.remotes.objects.store import Condition

_ABORTS = 3


def is_under_way(upload_id: str) -> bool:
    """Whether this process writes that upload.

    Of the process, because one bucket may be open several times, with other options.  Ids are
    the stores' own and unique in a store; that of another store would only keep what could go.
    """
    return upload_id in _under_way


class S3Upload:
    """See :class:`proxy.remotes.objects.store.Upload`.

    ``is_ours``: begun by this process, :func:`is_under_way` until it is completed or given up,
    or nobody has this object any more.
    """

    def __init__(
        self, client: S3Client, key: str, upload_id: str, *, is_ours: bool = False
    ) -> None:
        if is_ours:
            _under_way[upload_id] = self
        self._client = client
        self._key = key
        self._id = upload_id
        self._etags: dict[int, str] = {}

    async def send(self, number: int, data: bytes | memoryview) -> None:
        headers, _ = await self._client.call(
            "PUT", "PUT", self._key, doing="writing", body=data, query=self._part(number)
        )
        self._note(number, headers.get("etag"))

    async def copy(self, number: int, source: str, offset: int, length: int) -> None:
        name = sigv4.encode_path(f"/{self._client.endpoint.bucket}/{source}")
        headers = {
            "x-amz-copy-source": name,
            "x-amz-copy-source-range": f"bytes={offset}-{offset + length - 1}",
        }
        _, content = await self._client.call(
            "COPY",
            "PUT",
            self._key,
            doing="copying to",
            headers=headers,
            query=self._part(number),
        )
        result = confirmed(content, "CopyPartResult", "copying to", self._key)
        self._note(number, result.value("ETag"))

    async def complete(self, *, condition: Condition | None = None) -> None:
        headers: dict[str, str] = {"content-type": "application/xml"}
        if condition is not None and condition.absent:
            headers["if-none-match"] = "*"
        elif condition is not None and condition.etag is not None:
            headers["if-match"] = condition.etag
        _, content = await self._client.call(
            "POST",
            "POST",
            self._key,
            doing="completing",
            headers=headers,
            query=[("uploadId", self._id)],
            body=s3_xml.complete_request(sorted(self._etags.items())),
        )
        result = confirmed(content, "CompleteMultipartUploadResult", "completing", self._key)
        if not result.value("ETag"):
            raise Corrupt(
                f"the store does not confirm that '{self._key}' is complete",
                data={"path": self._key},
            )
        _under_way.pop(self._id, None)

    async def abort(self) -> None:
        """Parts that were under way may arrive later and would stay: it is asked whether the
        upload is gone, and aborted again if not.  ``Unreachable`` when it stays."""
        _under_way.pop(self._id, None)  # nobody completes it any more, whatever comes now
        query = [("uploadId", self._id)]
        for _ in range(_ABORTS):
            try:
                await self._client.call(
                    "DELETE", "DELETE", self._key, doing="aborting", query=query
                )
                await self._client.call("GET", "GET", self._key, doing="aborting", query=query)
            except NotFound:
                return
        raise Unreachable(
            f"the parts of '{self._key}' are still there after they were given up",
            code="EAGAIN",
            data={"path": self._key},
        )

    def _part(self, number: int) -> list[tuple[str, str]]:
        return [("partNumber", str(number)), ("uploadId", self._id)]

    def _note(self, number: int, etag: str | None) -> None:
        if not etag:
            raise Unreachable(
                f"EPROTO: the store does not confirm part {number} of '{self._key}'",
                code="EPROTO",
                data={"path": self._key},
            )
        self._etags[number] = etag


_under_way: WeakValueDictionary[str, S3Upload] = WeakValueDictionary()
