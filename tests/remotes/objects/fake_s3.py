"""A small S3 server of our own on a loopback socket: its faults are the point of it.

It keeps what the API reference says of status codes, conditions, ranges, listings, batches and
uploads in parts, and checks that bodies are what their ``x-amz-content-sha256`` says.  Signatures
are checked by their shape alone; botocore is the oracle for those.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import secrets
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, quote_plus, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import h11
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MIB = 1024 * 1024
_XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


@dataclass
class Request:
    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def verb(self) -> str:
        """What it does, in one word."""
        if "list-type" in self.query:
            return "list"
        if self.method == "GET" and self.query.keys() & {"object-lock", "uploads"}:
            return "list-uploads" if "uploads" in self.query else "object-lock"
        if self.method == "POST":
            verbs = {"delete": "batch", "uploads": "begin", "uploadId": "complete"}
            return next(verb for name, verb in verbs.items() if name in self.query)
        if self.method == "PUT" and "x-amz-copy-source" in self.headers:
            return "copy-part" if "uploadId" in self.query else "copy"
        if "uploadId" in self.query:
            return {"PUT": "part", "DELETE": "abort", "GET": "parts"}[self.method]
        return self.method.lower()


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Stored:
    data: bytes
    etag: str
    mtime: float


@dataclass
class Fault:
    """Of the next ``times`` requests with that ``verb`` (and key, if ``when`` says so).

    ``after``: the effect happens first.  ``status``: answer that with ``code`` (200: an error
    inside a good answer).  ``reset``: no answer.  ``torn``: only so many bytes of the body.
    ``waits``: nothing happens until it is set.  ``answer``: exactly that.
    """

    verb: str
    times: int = 1
    after: bool = False
    status: int = 0
    code: str = ""
    reset: bool = False
    torn: int | None = None
    waits: trio.Event | None = None
    answer: Callable[[Answer], Answer] | None = None
    when: Callable[[Request], bool] = lambda _: True
    reached: trio.Event = field(default_factory=trio.Event)


class FakeS3:
    def __init__(
        self,
        *,
        conditions: bool = True,
        conditional_delete: bool = True,
        batches: bool = True,
        ranges: bool = True,
        lock: str = "none",
        page: int = 1000,
    ) -> None:
        self.conditions = conditions
        self.conditional_delete = conditional_delete
        self.batches = batches
        self.ranges = ranges
        self.lock = lock
        self.page = page
        self.largest_copy = 5 * 1024 * MIB
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
        self.begun: dict[str, float] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.hidden: set[str] = set()
        """Keys that listings do not show (yet)."""
        self.busy = self.busiest = 0
        self.port = 0
        self.connections = 0

    def url(self, prefix: str = "", query: str = "") -> str:
        path = f"/bucket/{prefix}" if prefix else "/bucket"
        return f"s3+http://fakekey:fakesecretkey@127.0.0.1:{self.port}{path}{query}"

    def fail(self, verb: str, **how: object) -> Fault:
        fault = Fault(verb, **how)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def verbs(self) -> list[str]:
        return [request.verb for request in self.log]

    # -- the wire

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self.port = listeners[0].socket.getsockname()[1]
            task_status.started()
            await trio.serve_listeners(self._talk, listeners, handler_nursery=nursery)

    async def _talk(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, _Reset):
            async with stream:
                wire = h11.Connection(h11.SERVER, max_incomplete_event_size=65536)
                while True:
                    request = await self._read(stream, wire)
                    if request is None:
                        return
                    await self._respond(stream, wire, request)
                    wire.start_next_cycle()

    async def _read(self, stream: trio.SocketStream, wire: h11.Connection) -> Request | None:
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = wire.next_event()
            if event is h11.NEED_DATA:
                wire.receive_data(await stream.receive_some(256 * 1024))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return None
        assert head is not None
        path, _, query = head.target.decode().partition("?")
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        headers = {name.decode(): value.decode() for name, value in head.headers}
        asked = dict(parse_qsl(query, keep_blank_values=True))
        request = Request(head.method.decode(), key, asked, headers, bytes(body))
        if bucket != "bucket":
            request.query["nobucket"] = ""
        return request

    async def _respond(
        self, stream: trio.SocketStream, wire: h11.Connection, request: Request
    ) -> None:
        self.log.append(request)
        self.busy += 1
        self.busiest = max(self.busy, self.busiest)
        try:
            fault = self._fault(request)
            if fault is not None:
                fault.reached.set()
                if fault.waits is not None and not fault.after:
                    await fault.waits.wait()
            answer = (
                self._handle(request)
                if fault is None
                or fault.after
                or (fault.torn is not None or fault.answer is not None or fault.waits is not None)
                else Answer(200)
            )
            if fault is not None:
                if fault.waits is not None and fault.after:
                    await fault.waits.wait()
                if fault.reset:
                    raise _Reset
                if fault.status:
                    answer = _error(fault.status, fault.code)
                if fault.answer is not None:
                    answer = fault.answer(answer)
        finally:
            self.busy -= 1
        length = answer.headers.pop("content-length", str(len(answer.body)))
        headers = [("Content-Length", length), ("Date", formatdate(usegmt=True))]
        torn = fault.torn if fault is not None else None
        out = wire.send(
            h11.Response(status_code=answer.status, headers=[*headers, *answer.headers.items()])
        )
        body = b"" if request.method == "HEAD" else answer.body
        await stream.send_all(out + body[:torn])
        if torn is not None:
            raise _Reset
        if body:
            wire.send(h11.Data(data=body))
        elif request.method != "HEAD" and length != "0":
            raise _Reset
        wire.send(h11.EndOfMessage())

    def _fault(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.verb in ("*", request.verb) and fault.when(request):
                fault.times -= 1
                return fault
        return None

    # -- what it does

    def _handle(self, request: Request) -> Answer:
        if not request.headers.get("authorization", "").startswith(
            "AWS4-HMAC-SHA256 Credential=fakekey/"
        ):
            return _error(403, "InvalidAccessKeyId")
        if "nobucket" in request.query:
            return _error(404, "NoSuchBucket")
        digest = hashlib.sha256(request.body).hexdigest()
        if request.headers["x-amz-content-sha256"] != digest:
            return _error(400, "XAmzContentSHA256Mismatch")
        if "content-md5" in request.headers:
            md5 = base64.b64encode(hashlib.md5(request.body).digest()).decode()
            if request.headers["content-md5"] != md5:
                return _error(400, "BadDigest")
        elif self.lock == "Enabled" and request.verb in ("put", "part"):
            return _error(400, "InvalidRequest", "Content-MD5 is required with Object Lock")
        return getattr(self, "_" + request.verb.replace("-", "_"))(request)  # type: ignore[no-any-return]

    def _refused(self, request: Request, key: str) -> Answer | None:
        """What a condition that does not hold answers."""
        if not self.conditions:
            return None
        stored = self.objects.get(key)
        if "if-none-match" in request.headers and stored is not None:
            return _error(412, "PreconditionFailed")
        if "if-match" in request.headers:
            if stored is None:
                return _error(404, "NoSuchKey")
            if stored.etag != request.headers["if-match"]:
                return _error(412, "PreconditionFailed")
        return None

    def _store(self, key: str, data: bytes, etag: str = "") -> Stored:
        etag = etag or f'"{hashlib.md5(data).hexdigest()}"'
        self.objects[key] = Stored(data, etag, time.time())
        return self.objects[key]

    def _object_lock(self, _request: Request) -> Answer:
        match self.lock:
            case "none":
                return _error(404, "ObjectLockConfigurationNotFoundError")
            case "unknown":
                return _error(501, "NotImplemented")
            case "forbidden":
                return _error(403, "AccessDenied")
        return _xml(
            "ObjectLockConfiguration", f"<ObjectLockEnabled>{self.lock}</ObjectLockEnabled>"
        )

    def _put(self, request: Request) -> Answer:
        refused = self._refused(request, request.key)
        if refused is not None:
            return refused
        return Answer(200, headers={"ETag": self._store(request.key, request.body).etag})

    def _head(self, request: Request) -> Answer:
        stored = self.objects.get(request.key)
        if stored is None:
            return Answer(404)
        headers = {"ETag": stored.etag, "Last-Modified": formatdate(stored.mtime, usegmt=True)}
        return Answer(200, headers={**headers, "content-length": str(len(stored.data))})

    def _get(self, request: Request) -> Answer:
        stored = self.objects.get(request.key)
        if stored is None:
            return _error(404, "NoSuchKey")
        if self.conditions and request.headers.get("if-match", stored.etag) != stored.etag:
            return _error(412, "PreconditionFailed")
        headers = {"ETag": stored.etag}
        if "range" not in request.headers or not self.ranges:
            return Answer(200, stored.data, headers)
        first, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        if first >= len(stored.data):
            return _error(416, "InvalidRange")
        last = min(last, len(stored.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(stored.data)}"
        return Answer(206, stored.data[first : last + 1], headers)

    def _list(self, request: Request) -> Answer:
        prefix, delimiter = request.query["prefix"], request.query.get("delimiter")
        after = unquote(request.query.get("continuation-token", ""))
        found: dict[str, Stored | None] = {}
        for key in sorted(self.objects.keys() - self.hidden):
            if key.startswith(prefix):
                head, slash, _ = key[len(prefix) :].partition("/")
                if delimiter and slash:
                    found[f"{prefix}{head}/"] = None
                else:
                    found[key] = self.objects[key]
        left = [name for name in sorted(found) if name > after]
        shown, more = left[: self.page], left[self.page :]
        out = [f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>"]
        out.append("<EncodingType>url</EncodingType>")
        if more:
            out.append(f"<NextContinuationToken>{quote(shown[-1])}</NextContinuationToken>")
        for name in shown:
            stored = found[name]
            if stored is None:
                out.append(f"<CommonPrefixes><Prefix>{quote_plus(name)}</Prefix></CommonPrefixes>")
            else:
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stored.mtime))
                out.append(
                    f"<Contents><Key>{quote_plus(name)}</Key><Size>{len(stored.data)}</Size>"
                    f"<LastModified>{stamp}</LastModified><ETag>{escape(stored.etag)}</ETag></Contents>"
                )
        return _xml("ListBucketResult", "".join(out))

    def _delete(self, request: Request) -> Answer:
        if self.conditional_delete:
            refused = self._refused(request, request.key)
            if refused is not None:
                return refused
        self.objects.pop(request.key, None)
        return Answer(204)

    def _batch(self, request: Request) -> Answer:
        if not self.batches:
            return _error(501, "NotImplemented")
        if "content-md5" not in request.headers:
            return _error(400, "InvalidRequest", "Missing required header: Content-MD5")
        out: list[str] = []
        root = ElementTree.fromstring(request.body)
        for element in root.iter():
            if element.tag.endswith("Key"):
                key = element.text or ""
                if key.endswith("forbidden"):
                    out.append(f"<Error><Key>{escape(key)}</Key><Code>AccessDenied</Code></Error>")
                else:
                    self.objects.pop(key, None)
                    out.append(f"<Deleted><Key>{escape(key)}</Key></Deleted>")
        return _xml("DeleteResult", "".join(out))

    def _source(self, request: Request) -> Stored | None:
        bucket, _, key = unquote(request.headers["x-amz-copy-source"]).lstrip("/").partition("/")
        return self.objects.get(key) if bucket == "bucket" else None

    def _copy(self, request: Request) -> Answer:
        source = self._source(request)
        if source is None:
            return _error(404, "NoSuchKey")
        if len(source.data) > self.largest_copy:
            text = "The specified copy source is larger than the maximum allowable size"
            return _error(400, "InvalidRequest", text)
        stored = self._store(request.key, source.data)
        return _xml("CopyObjectResult", f"<ETag>{escape(stored.etag)}</ETag>")

    def _begin(self, request: Request) -> Answer:
        name = secrets.token_hex(8)
        self.uploads[name] = (request.key, {})
        self.begun[name] = time.time()
        return _xml("InitiateMultipartUploadResult", f"<UploadId>{name}</UploadId>")

    def _list_uploads(self, request: Request) -> Answer:
        after = request.query.get("key-marker", ""), request.query.get("upload-id-marker", "")
        left = sorted(
            (key, name)
            for name, (key, _) in self.uploads.items()
            if key.startswith(request.query["prefix"]) and (key, name) > after
        )
        shown, more = left[: self.page], left[self.page :]
        out = [f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>"]
        out.append("<EncodingType>url</EncodingType>")
        if more:
            key, name = shown[-1]
            out.append(f"<NextKeyMarker>{quote_plus(key)}</NextKeyMarker>")
            out.append(f"<NextUploadIdMarker>{name}</NextUploadIdMarker>")
        for key, name in shown:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.begun[name]))
            out.append(
                f"<Upload><Key>{quote_plus(key)}</Key><UploadId>{name}</UploadId>"
                f"<Initiated>{stamp}</Initiated></Upload>"
            )
        return _xml("ListMultipartUploadsResult", "".join(out))

    def _take_part(self, request: Request, data: bytes) -> str | None:
        upload = self.uploads.get(request.query["uploadId"])
        number = int(request.query["partNumber"])
        if upload is None or not 1 <= number <= 10_000:
            return None
        upload[1][number] = data
        return f'"{hashlib.md5(data).hexdigest()}"'

    def _part(self, request: Request) -> Answer:
        etag = self._take_part(request, request.body)
        return _error(404, "NoSuchUpload") if etag is None else Answer(200, headers={"ETag": etag})

    def _copy_part(self, request: Request) -> Answer:
        source = self._source(request)
        if source is None:
            return _error(404, "NoSuchKey")
        wanted = request.headers["x-amz-copy-source-range"].removeprefix("bytes=")
        first, last = map(int, wanted.split("-"))
        if last >= len(source.data) or last - first + 1 > self.largest_copy:
            return _error(400, "InvalidRequest")
        etag = self._take_part(request, source.data[first : last + 1])
        if etag is None:
            return _error(404, "NoSuchUpload")
        return _xml("CopyPartResult", f"<ETag>{escape(etag)}</ETag>")

    def _complete(self, request: Request) -> Answer:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None:
            return _error(404, "NoSuchUpload")
        refused = self._refused(request, request.key)
        if refused is not None:
            return refused
        numbers = [
            int(element.text or "")
            for element in ElementTree.fromstring(request.body).iter()
            if element.tag.endswith("PartNumber")
        ]
        if numbers != sorted(upload[1]):
            return _error(400, "InvalidPart")
        data = b"".join(upload[1][number] for number in numbers)
        del self.uploads[request.query["uploadId"]]
        etag = f'"{hashlib.md5(data).hexdigest()}-{len(numbers)}"'
        self._store(request.key, data, etag)
        return _xml("CompleteMultipartUploadResult", f"<ETag>{escape(etag)}</ETag>")

    def _abort(self, request: Request) -> Answer:
        if self.uploads.pop(request.query["uploadId"], None) is None:
            return _error(404, "NoSuchUpload")
        return Answer(204)

    def _parts(self, request: Request) -> Answer:
        if request.query["uploadId"] not in self.uploads:
            return _error(404, "NoSuchUpload")
        return _xml("ListPartsResult", "<IsTruncated>false</IsTruncated>")


class _Reset(Exception):
    pass


def _error(status: int, code: str, message: str = "") -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>".encode()
    return Answer(status, body)


def _xml(name: str, inside: str) -> Answer:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{name} {_XMLNS}>{inside}</{name}>'
    return Answer(200, text.encode(), {"Content-Type": "application/xml"})


@contextlib.asynccontextmanager
async def serving(server: FakeS3) -> AsyncIterator[FakeS3]:
    """``server`` on a port of its own for the block."""
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        try:
            yield server
        except BaseException as error:  # noqa: BLE001 (raised below, out of the group)
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
