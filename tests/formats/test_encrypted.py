"""Encrypted files beside what Xen Orchestra wrote and beside the one-piece AEADs of OpenSSL."""

from __future__ import annotations

import json
import os
import pickle
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt, Refused
from proxy.formats.encrypted import LONGEST, Algorithm, FileCipher

FIXTURES = Path(__file__).parent.parent / "fixtures" / "encryption"
MANIFEST: dict[str, Any] = json.loads((FIXTURES / "manifest.json").read_text())
KEY: str = MANIFEST["keyUtf8"]
WRONG: str = MANIFEST["wrongKeyUtf8"]
AUTHENTICATED = [each for each in Algorithm if each.is_authenticated]
ONE_PIECE: dict[Algorithm, Any] = {
    Algorithm.CHACHA20_POLY1305: ChaCha20Poly1305,
    Algorithm.AES_256_GCM: AESGCM,
}

FILES = [
    (Algorithm(algorithm), name, facts)
    for algorithm in map(str, Algorithm)
    for name, facts in MANIFEST["remotes"][algorithm]["files"].items()
    if facts["encrypted"]
]
UNNOTICED = [(Algorithm.AES_256_CBC, "bad-middle.bin")]
GOOD = [each for each in FILES if not each[1].startswith("bad-") or each[:2] in UNNOTICED]
BAD = [each for each in FILES if each not in GOOD]


def stream_encrypt(cipher: FileCipher, pieces: list[bytes]) -> bytes:
    encryption = cipher.encryption()
    stored = encryption.head
    for piece in pieces:
        into = memoryview(bytearray(len(piece) + 15))
        stored += into[: encryption.update_into(piece, into)]
    return stored + encryption.finish()


def stream_decrypt(cipher: FileCipher, pieces: list[bytes]) -> bytes:
    """The pieces are cut anywhere: what a stream of unknown length looks like."""
    head, tail = cipher.algorithm.iv_size, cipher.algorithm.tag_size
    decryption = None
    held, content = b"", b""
    for piece in pieces:
        held += piece
        if decryption is None:
            if len(held) < head:
                continue
            decryption, held = cipher.decryption(held[:head]), held[head:]
        ready = max(0, len(held) - tail)
        content += decryption.update(held[:ready])
        held = held[ready:]
    assert decryption is not None
    return content + decryption.finish(held)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces: list[bytes] = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


def test_the_fixtures_are_all_there() -> None:
    assert (len(GOOD), len(BAD)) == (37, 8)


@pytest.mark.parametrize(("algorithm", "name", "facts"), GOOD)
def test_what_xen_orchestra_wrote_is_read(
    algorithm: Algorithm, name: str, facts: dict[str, Any]
) -> None:
    stored = (FIXTURES / algorithm / name).read_bytes()
    cipher = FileCipher(algorithm, KEY)
    for content in (cipher.decrypt(stored), stream_decrypt(cipher, cut(stored, [7, 40, 1, 900]))):
        assert len(content) == facts["plaintextSize"]
        assert sha256(content).hexdigest() == facts["plaintextSha256"]
    slack = cipher.plain_size(len(stored)) - facts["plaintextSize"]
    assert slack == (0 if algorithm.is_authenticated else 15 - facts["plaintextSize"] % 16)


@pytest.mark.parametrize(("algorithm", "name", "facts"), BAD)
def test_what_is_damaged_is_corrupt(algorithm: Algorithm, name: str, facts: dict[str, Any]) -> None:
    stored = (FIXTURES / algorithm / name).read_bytes()
    assert len(stored) == facts["size"]
    cipher = FileCipher(algorithm, KEY)
    with pytest.raises(Corrupt):
        cipher.decrypt(stored)
    with pytest.raises(Corrupt):
        stream_decrypt(cipher, [stored])


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_known_answers(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda size: bytes(range(size)))
    cipher = FileCipher(algorithm, KEY)
    answer = bytes.fromhex(MANIFEST["knownAnswers"][algorithm])
    assert cipher.encrypt(b"hello world") == answer
    assert stream_encrypt(cipher, [b"hel", b"", b"lo world"]) == answer


contents = st.binary(max_size=200)
sizes = st.lists(st.integers(0, 70), max_size=5)


@given(content=contents, where=sizes)
@pytest.mark.parametrize("algorithm", AUTHENTICATED)
def test_both_ways_beside_openssl(algorithm: Algorithm, content: bytes, where: list[int]) -> None:
    cipher, peer = FileCipher(algorithm, KEY), ONE_PIECE[algorithm](KEY.encode())
    for stored in (bytes(cipher.encrypt(content)), stream_encrypt(cipher, cut(content, where))):
        assert len(stored) == len(content) + 28
        assert peer.decrypt(stored[:12], stored[12:], None) == content
    iv = bytes(12)
    theirs = iv + peer.encrypt(iv, content, None)
    assert cipher.decrypt(theirs) == content
    assert stream_decrypt(cipher, cut(theirs, where)) == content


@given(content=contents, where=sizes)
def test_padded_both_ways(content: bytes, where: list[int]) -> None:
    cipher = FileCipher(Algorithm.AES_256_CBC, KEY)
    for stored in (bytes(cipher.encrypt(content)), stream_encrypt(cipher, cut(content, where))):
        assert len(stored) == 16 + 16 * (len(content) // 16 + 1)
        assert cipher.decrypt(stored) == stream_decrypt(cipher, cut(stored, where)) == content
        missing = cipher.padding_of(stored[-32:])
        assert cipher.plain_size(len(stored)) - missing + 1 == len(content)


@given(data=st.data(), content=contents, where=sizes)
@pytest.mark.parametrize("algorithm", AUTHENTICATED)
def test_a_flipped_bit_anywhere_is_corrupt(
    algorithm: Algorithm, data: st.DataObject, content: bytes, where: list[int]
) -> None:
    cipher = FileCipher(algorithm, KEY)
    stored = bytearray(cipher.encrypt(content))
    bit = data.draw(st.integers(0, 8 * len(stored) - 1))
    stored[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Corrupt, match="damaged, or was written with another key"):
        cipher.decrypt(bytes(stored))
    with pytest.raises(Corrupt):
        stream_decrypt(cipher, cut(bytes(stored), where))


@given(stored=st.binary(max_size=100))
@pytest.mark.parametrize("algorithm", Algorithm)
def test_anything_else_is_corrupt(algorithm: Algorithm, stored: bytes) -> None:
    """With CBC, anything may look filled up by chance."""
    try:
        content = FileCipher(algorithm, KEY).decrypt(stored)
    except Corrupt:
        return
    assert not algorithm.is_authenticated
    assert len(content) < len(stored)


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("size", [0, 1, 11, 12, 15, 16, 27, 31])
def test_a_short_file_is_corrupt_at_once(algorithm: Algorithm, size: int) -> None:
    if size == 31 and algorithm.is_authenticated:
        return
    with pytest.raises(Corrupt, match=f"{size} bytes are no file encrypted by {algorithm}"):
        FileCipher(algorithm, KEY).decrypt(bytes(size))


@pytest.mark.parametrize("algorithm", AUTHENTICATED)
def test_a_file_ends_before_its_counter_starts_again(
    algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LONGEST[Algorithm.AES_256_GCM] == 64 * 2**30 - 32
    assert LONGEST[Algorithm.CHACHA20_POLY1305] == 256 * 2**30 - 64
    monkeypatch.setitem(LONGEST, algorithm, 100)
    cipher = FileCipher(algorithm, KEY)
    encryption = cipher.encryption()
    into = memoryview(bytearray(200))
    assert encryption.update_into(bytes(60), into) == 60
    with pytest.raises(Refused, match="cannot hold more than") as caught:
        encryption.update_into(bytes(41), into)
    assert caught.value.code == "EFBIG"
    assert encryption.update_into(bytes(40), into) == 40
    with pytest.raises(Corrupt):
        cipher.plain_size(129)
    decryption = cipher.decryption(encryption.head)
    decryption.update(bytes(100))
    with pytest.raises(Corrupt, match="longer"):
        decryption.update(b"x")


def test_in_place() -> None:
    for algorithm in AUTHENTICATED:
        cipher = FileCipher(algorithm, KEY)
        stored = bytearray(cipher.encrypt(bytes(range(256)) * 300))
        body = memoryview(stored)[12:-16]
        decryption = cipher.decryption(bytes(stored[:12]))
        decryption.update_in_place(body[:65536])
        decryption.update_in_place(body[65536:])
        assert decryption.finish(bytes(stored[-16:])) == b""
        assert body == bytes(range(256)) * 300


@pytest.mark.parametrize("key", ["", "short", "x" * 31, "x" * 33, "é" * 32, "x" * 30 + "\ud800"])
def test_a_key_has_32_bytes(key: str) -> None:
    """32 letters that are not ASCII pass Xen Orchestra's check and then fail in every call."""
    with pytest.raises(Refused) as caught:
        FileCipher(Algorithm.AES_256_GCM, key)
    assert caught.value.code == "BAD_ALGORITHM"
    assert not key or key not in f"{caught.value} {caught.value.data}"
    FileCipher(Algorithm.AES_256_GCM, "é" * 16)


def test_the_key_is_not_shown() -> None:
    cipher = FileCipher(Algorithm.CHACHA20_POLY1305, KEY)
    for shown in (repr(cipher), str(cipher), repr(cipher.encryption()), repr([cipher])):
        assert KEY not in shown
        assert KEY[:8] not in shown
    with pytest.raises(TypeError):
        pickle.dumps(cipher)


def test_two_files_never_share_an_iv() -> None:
    cipher = FileCipher(Algorithm.CHACHA20_POLY1305, KEY)
    assert len({cipher.encryption().head for _ in range(1000)}) == 1000
