"""Uploads in parts that nobody completed, as S3 lists them (ListMultipartUploads)."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from proxy.errors import Unreachable
from proxy.formats.s3_xml import decoded
from proxy.remotes.objects.s3_client import confirmed
from proxy.remotes.objects.s3_upload import is_under_way
from proxy.remotes.objects.store import OpenUpload, UploadPage

if TYPE_CHECKING:
    from proxy.formats.s3_xml import Element
    from proxy.remotes.objects.s3_client import S3Client


async def list_uploads(
    client: S3Client, prefix: str, token: tuple[str, str] | None = None
) -> UploadPage:
    """One page, of 1,000 at most; see :meth:`.store.ObjectStore.open_uploads`."""
    query = [("uploads", ""), ("prefix", prefix), ("encoding-type", "url")]
    if token is not None:
        query += [("key-marker", token[0]), ("upload-id-marker", token[1])]
    doing = "listing uploads of"
    _, content = await client.call("LIST", "GET", None, doing=doing, query=query)
    root = confirmed(content, "ListMultipartUploadsResult", doing, prefix)
    encoded = root.value("EncodingType") == "url"
    try:
        uploads = [_upload(each, prefix, encoded=encoded) for each in root.all("Upload")]
        following = _next(root, encoded=encoded)
    except (ValueError, TypeError) as error:
        raise Unreachable(
            f"EPROTO: the store's listing of uploads of '{prefix}' is not whole: {error}",
            code="EPROTO",
            data={"path": prefix},
        ) from error
    return UploadPage([each for each in uploads if not is_under_way(each.upload_id)], following)


def _upload(element: Element, prefix: str, *, encoded: bool) -> OpenUpload:
    key = decoded(element.value("Key"), encoded=encoded)
    if not key.startswith(prefix):
        raise ValueError("it holds names that were not asked for")
    upload_id = element.value("UploadId")
    if not upload_id:
        raise ValueError("an entry has no id")
    initiated = datetime.datetime.fromisoformat(element.value("Initiated") or "")
    if initiated.tzinfo is None:
        initiated = initiated.replace(tzinfo=datetime.UTC)
    return OpenUpload(key, upload_id, initiated.timestamp())


def _next(root: Element, *, encoded: bool) -> tuple[str, str] | None:
    truncated = (root.value("IsTruncated") or "").strip().lower()
    if truncated == "false":
        return None
    if truncated != "true":
        raise ValueError("it does not say whether it is")
    key = decoded(root.value("NextKeyMarker") or "", encoded=encoded)
    if not key:
        raise ValueError("it goes on, but does not say where")
    return key, root.value("NextUploadIdMarker") or ""
