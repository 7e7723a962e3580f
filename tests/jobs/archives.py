"""What an ``.xva`` holds, by other means than ours: ``tarfile``, ``gzip``, ``zstandard``."""

from __future__ import annotations

import gzip
import io
import tarfile
import xmlrpc.client
from pathlib import Path
from typing import Any

import zstandard

MIB = 1024 * 1024


def unpacked(path: Path, compression: str = "none") -> bytes:
    data = path.read_bytes()
    if compression == "native":
        return gzip.decompress(data)
    if compression == "zstd":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def records(archive: bytes) -> dict[str, list[dict[str, Any]]]:
    """The objects of ``ova.xml`` by class; each has its id in the archive as ``id``."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile("ova.xml")
        assert member is not None
        document = member.read()
    call = b"<methodResponse><params><param>" + document + b"</param></params></methodResponse>"
    (value,), _ = xmlrpc.client.loads(call)
    assert isinstance(value, dict)
    found: dict[str, list[dict[str, Any]]] = {}
    for each in value["objects"]:
        found.setdefault(each["class"], []).append({**each["snapshot"], "id": each["id"]})
    return found


def disks(archive: bytes) -> dict[str, bytes]:
    """The content of each disk by the name of its VDI; chunks that are left out are zeros."""
    chunks: dict[str, dict[int, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for entry in tar:
            folder, _, number = entry.name.partition("/")
            if number.isdigit():
                member = tar.extractfile(entry)
                assert member is not None
                chunks.setdefault(folder, {})[int(number)] = member.read()
    content: dict[str, bytes] = {}
    for vdi in records(archive)["VDI"]:
        whole = bytearray(int(vdi["virtual_size"]))
        at, previous = 0, -1
        for index, data in sorted(chunks[vdi["id"]].items()):
            # A chunk of no bytes only keeps the connection alive; a gap is zeros of 1 MiB each.
            at += (index - previous - 1) * MIB
            whole[at : at + len(data)] = data
            at += len(data)
            previous = index
        content[vdi["name_label"]] = bytes(whole)
    return content
