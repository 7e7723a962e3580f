"""A program that speaks as much S3 as a backup needs and keeps nothing large: the other end.

Threads and plain sockets; what is above :data:`KEPT` bytes is counted and dropped, so that the
figures are those of the sender.  Prints its port.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import socketserver
import time
from urllib.parse import parse_qs, quote_plus, unquote

KEPT = 512 * 1024
_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"
_objects: dict[str, tuple[bytes, int, str]] = {}
_uploads: dict[str, list[int]] = {}
_numbers = itertools.count()


class Handler(socketserver.StreamRequestHandler):
    rbufsize = 256 * 1024

    def handle(self) -> None:
        view = memoryview(bytearray(256 * 1024))
        while line := self.rfile.readline():
            method, target, _ = line.decode().split(" ", 2)
            headers: dict[str, str] = {}
            while (field := self.rfile.readline().strip()) != b"":
                name, _, value = field.decode().partition(":")
                headers[name.lower()] = value.strip()
            size = int(headers.get("content-length", 0))
            body = bytearray()
            left = size
            while left:
                count = self.rfile.readinto1(view[: min(left, len(view))])
                left -= count
                if size <= KEPT:
                    body += view[:count]
            path, _, query = target.partition("?")
            key = unquote(path).lstrip("/").partition("/")[2]
            asked = {name: each[0] for name, each in parse_qs(query, True).items()}
            status, more, content = respond(method, key, asked, headers, bytes(body), size)
            length = more.pop("Content-Length", str(len(content)))
            head = [f"HTTP/1.1 {status} X", f"Content-Length: {length}"]
            head += [f"{name}: {value}" for name, value in more.items()]
            sent = b"" if method == "HEAD" else content
            self.wfile.write("\r\n".join([*head, "", ""]).encode() + sent)


Response = tuple[int, dict[str, str], bytes]


def respond(
    method: str, key: str, asked: dict[str, str], headers: dict[str, str], body: bytes, size: int
) -> Response:
    if "object-lock" in asked:
        return 404, {}, b"<Error><Code>ObjectLockConfigurationNotFoundError</Code></Error>"
    if "list-type" in asked:
        return 200, {}, listing(asked)
    if "uploadId" in asked and method != "POST":
        return part(method, asked["uploadId"], size)
    if method == "POST":
        return post(key, asked, body)
    return put(key, headers, body, size) if method == "PUT" else look(method, key, headers)


def part(method: str, upload: str, size: int) -> Response:
    if method == "PUT":
        _uploads[upload].append(size)
        return 200, {"ETag": '"part"'}, b""
    return (404, {}, b"") if _uploads.pop(upload, None) is None else (204, {}, b"")


def look(method: str, key: str, headers: dict[str, str]) -> Response:
    there = _objects.get(key)
    if method == "DELETE":
        if there is not None and headers.get("if-match", there[2]) != there[2]:
            return 412, {}, b""
        _objects.pop(key, None)
        return 204, {}, b""
    if there is None:
        return 404, {}, b""
    data, length, etag = there
    more = {"ETag": etag, "Last-Modified": _DATE}
    if method == "HEAD":
        return 200, {**more, "Content-Length": str(length)}, b""
    wanted = re.match(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
    if wanted is None:
        return 200, more, data
    first, last = int(wanted[1]), min(int(wanted[2]), length - 1)
    more["Content-Range"] = f"bytes {first}-{last}/{length}"
    return 206, more, data[first : last + 1]


def put(key: str, headers: dict[str, str], body: bytes, size: int) -> Response:
    there = _objects.get(key)
    wanted = headers.get("if-match")
    if ("if-none-match" in headers and there is not None) or (
        wanted is not None and (there is None or there[2] != wanted)
    ):
        return 412, {}, b""
    if "x-amz-copy-source" in headers:
        source = unquote(headers["x-amz-copy-source"]).lstrip("/").partition("/")[2]
        _objects[key] = _objects[source]
        return 200, {}, b'<CopyObjectResult><ETag>"c"</ETag></CopyObjectResult>'
    etag = f'"{next(_numbers)}"'
    _objects[key] = (body, size, etag)
    return 200, {"ETag": etag}, b""


def post(key: str, asked: dict[str, str], body: bytes) -> Response:
    if "uploads" in asked:
        name = hashlib.md5(str(next(_numbers)).encode()).hexdigest()
        _uploads[name] = []
        root = "InitiateMultipartUploadResult"
        return 200, {}, f"<{root}><UploadId>{name}</UploadId></{root}>".encode()
    if "uploadId" in asked:
        _objects[key] = (b"", sum(_uploads.pop(asked["uploadId"])), f'"{next(_numbers)}"')
        root = "CompleteMultipartUploadResult"
        return 200, {}, f'<{root}><ETag>"m"</ETag></{root}>'.encode()
    names = re.findall(r"<Key>(.*?)</Key>", body.decode())
    for name in names:
        _objects.pop(name, None)
    gone = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
    return 200, {}, f"<DeleteResult>{gone}</DeleteResult>".encode()


def listing(asked: dict[str, str]) -> bytes:
    prefix, shallow = asked["prefix"], "delimiter" in asked
    stamp = time.strftime("%Y-%m-%dT00:00:00.000Z", time.gmtime())
    out: dict[str, str] = {}
    for key in sorted(_objects.copy()):
        if key.startswith(prefix):
            name, slash, _ = key[len(prefix) :].partition("/")
            if shallow and slash:
                shown = quote_plus(f"{prefix}{name}/")
                out[shown] = f"<CommonPrefixes><Prefix>{shown}</Prefix></CommonPrefixes>"
            else:
                out[key] = (
                    f"<Contents><Key>{quote_plus(key)}</Key><Size>{_objects[key][1]}</Size>"
                    f"<LastModified>{stamp}</LastModified></Contents>"
                )
    inside = "".join(out.values())
    return (
        "<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
        f"{inside}</ListBucketResult>"
    ).encode()


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
