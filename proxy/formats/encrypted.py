"""Encrypted files, as Xen Orchestra writes them: bytes in, bytes out.

::

    chacha20-poly1305, aes-256-gcm     IV 12, ciphertext as long as the plaintext, tag 16
    aes-256-cbc                        IV 16, ciphertext filled up to whole blocks (PKCS#7)

One IV, random, and one tag for each file, however long it is, and whether it was written whole
or as a stream.  Nothing else is authenticated: neither the file's name nor its time.  So where
a tag is right, its bytes are what somebody with the key once wrote to *some* file of the remote.

The key is the UTF-8 form of a text of 32 characters, as it is: no derivation.

``cryptography`` does ChaCha20-Poly1305 in one piece only; here it is composed (RFC 8439, section
2.8) of its ChaCha20 and Poly1305.  That takes a tenth to a fifth more time than the one piece,
and a fifth of that of pycryptodome's stream.  Everything releases the GIL.
"""

from __future__ import annotations

import os
import struct
from enum import StrEnum
from hmac import compare_digest
from typing import TYPE_CHECKING, Final, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.poly1305 import Poly1305

from proxy.errors import Corrupt, Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.ciphers import (
        AEADDecryptionContext,
        AEADEncryptionContext,
        CipherContext,
    )

KEY_SIZE: Final = 32
TAG_SIZE: Final = 16
_BLOCK: Final = 16
MOST_OVERHEAD: Final = 32
"""Bytes by which any stored file is longer than its content, at most."""


class Algorithm(StrEnum):
    """By the names in ``encryption.json``."""

    CHACHA20_POLY1305 = "chacha20-poly1305"
    """Of every new remote, since 2025."""
    AES_256_GCM = "aes-256-gcm"
    AES_256_CBC = "aes-256-cbc"
    """Of remotes from 2022.  Authenticates nothing: a changed file is read without an error."""

    @property
    def is_authenticated(self) -> bool:
        return self is not Algorithm.AES_256_CBC

    @property
    def iv_size(self) -> int:
        return 12 if self.is_authenticated else 16

    @property
    def tag_size(self) -> int:
        return TAG_SIZE if self.is_authenticated else 0


DEFAULT: Final = Algorithm.CHACHA20_POLY1305

LONGEST: Final = {
    # 32 bits count the blocks of 64 bytes; the first one is the MAC's key
    Algorithm.CHACHA20_POLY1305: (2**32 - 1) * 64,
    # 32 bits count the blocks of 16 bytes; the first two are taken
    Algorithm.AES_256_GCM: (2**32 - 2) * 16,
    Algorithm.AES_256_CBC: 2**63,
}
"""Bytes that one file can hold.  Behind them the counter starts again and the key stream with
it, which would give away the content."""


def key_bytes(key: str) -> bytes:
    """The key that a remote's ``encryptionKey`` stands for; ``Refused`` (``BAD_ALGORITHM``)."""
    raw = key.encode(errors="surrogatepass")
    if len(raw) != KEY_SIZE:
        raise Refused(
            f"the encryption key must have exactly {KEY_SIZE} characters (bytes in UTF-8); this"
            f" one has {len(raw)}",
            code="BAD_ALGORITHM",
            data={"expected": KEY_SIZE, "actual": len(raw)},
        )
    return raw


class FileCipher:
    """What encrypts and decrypts the files of a remote.  Thread-safe; never shows its key."""

    __slots__ = ("_key", "algorithm")

    def __init__(self, algorithm: Algorithm, key: str) -> None:
        self.algorithm = algorithm
        self._key = key_bytes(key)

    def __repr__(self) -> str:
        return f"<FileCipher {self.algorithm}>"

    def __reduce__(self) -> str:
        raise TypeError("a key is not written down")

    def encryption(self) -> Encryption:
        """For a new file, with an IV of its own."""
        return Encryption(self.algorithm, self._key, os.urandom(self.algorithm.iv_size))

    def decryption(self, head: bytes) -> Decryption:
        """For the file that starts with ``head``: its IV, ``algorithm.iv_size`` bytes."""
        return Decryption(self.algorithm, self._key, head)

    def encrypt(self, data: bytes | memoryview) -> memoryview:
        """A whole file as stored.  Blocking: 1 to 2 ms for 2 MiB."""
        stored = memoryview(bytearray(len(data) + MOST_OVERHEAD))
        return stored[: self.encrypt_into((data,), stored)]

    def encrypt_into(
        self, pieces: Sequence[bytes | memoryview], stored: bytearray | memoryview
    ) -> int:
        """Write the whole file whose content is ``pieces`` into ``stored``; how many bytes it has.

        There must be room for :data:`MOST_OVERHEAD` more than the content.  Blocking, as
        :meth:`encrypt`.
        """
        encryption = self.encryption()
        into = memoryview(stored)
        end = len(encryption.head)
        into[:end] = encryption.head
        for piece in pieces:
            end += encryption.update_into(piece, into[end:])
        tail = encryption.finish()
        into[end : end + len(tail)] = tail
        return end + len(tail)

    def decrypt(self, stored: bytes | memoryview) -> bytes:
        """The content of a whole file; ``Corrupt``.  Blocking, as :meth:`encrypt`."""
        self.plain_size(len(stored))
        view = memoryview(stored)
        decryption = self.decryption(bytes(view[: self.algorithm.iv_size]))
        end = len(view) - self.algorithm.tag_size
        content = decryption.update(view[self.algorithm.iv_size : end])
        return content + decryption.finish(bytes(view[end:]))

    def plain_size(self, stored: int) -> int:
        """Bytes of content in a file of ``stored`` bytes; with aes-256-cbc the most that it can
        have, up to 15 more than it has.  ``Corrupt`` when no encrypted file has this size."""
        algorithm = self.algorithm
        if algorithm.is_authenticated:
            size = stored - algorithm.iv_size - algorithm.tag_size
            possible = 0 <= size <= LONGEST[algorithm]
        else:
            size = stored - algorithm.iv_size - 1
            possible = stored >= algorithm.iv_size + _BLOCK and stored % _BLOCK == 0
        if not possible:
            raise Corrupt(
                f"{stored} bytes are no file encrypted by {algorithm}: it was cut, or is not"
                " encrypted at all",
                data={"what": "encryption", "size": stored},
            )
        return size

    def padding_of(self, last: bytes) -> int:
        """How much was filled up in a file of aes-256-cbc that ends with the 32 bytes ``last``;
        ``Corrupt``."""
        decryption = self.decryption(last[:_BLOCK])
        decryption.update(last[_BLOCK:])
        return _BLOCK - len(decryption.finish(b""))


class Encryption:
    """One file being encrypted: :attr:`head`, what the updates give, what :meth:`finish` gives.

    For one thread at a time.
    """

    __slots__ = ("_algorithm", "_cipher", "_filling", "_left", "_mac", "head")

    def __init__(self, algorithm: Algorithm, key: bytes, iv: bytes) -> None:
        self.head = iv
        self._algorithm = algorithm
        self._left = LONGEST[algorithm]
        self._filling = 0
        self._cipher, self._mac = _contexts(algorithm, key, iv, encrypts=True)

    def update_into(self, data: bytes | memoryview, into: memoryview) -> int:
        """Encrypt ``data``; how many bytes that gave.  ``into`` has room for 15 more.

        ``Refused`` (``EFBIG``) when the file becomes longer than it can be.
        """
        if len(data) > self._left:
            raise Refused(
                f"EFBIG: a file encrypted by {self._algorithm} cannot hold more than"
                f" {LONGEST[self._algorithm] / 2**30:.0f} GiB:"
                " make incremental backups, or use a remote with another algorithm",
                code="EFBIG",
                data={"algorithm": self._algorithm.value, "longest": LONGEST[self._algorithm]},
            )
        self._left -= len(data)
        self._filling = (self._filling + len(data)) % _BLOCK
        count = self._cipher.update_into(data, into)
        if self._mac is not None:
            self._mac.update(into[:count])
        return count

    def finish(self) -> bytes:
        """The end of the file.  Nothing can be encrypted afterwards."""
        if self._mac is not None:
            return self._mac.finish()
        if self._algorithm is Algorithm.AES_256_CBC:
            missing = _BLOCK - self._filling
            return self._cipher.update(bytes([missing]) * missing) + self._cipher.finalize()
        self._cipher.finalize()
        return cast("AEADEncryptionContext", self._cipher).tag


class Decryption:
    """One file being decrypted: give it what is between the IV and the tag, then the tag.

    **What the updates give is not authenticated before** :meth:`finish` **returns.**  For one
    thread at a time.
    """

    __slots__ = ("_algorithm", "_cipher", "_held", "_left", "_mac")

    def __init__(self, algorithm: Algorithm, key: bytes, iv: bytes) -> None:
        self._algorithm = algorithm
        self._left = LONGEST[algorithm]
        self._held = b""
        self._cipher, self._mac = _contexts(algorithm, key, iv, encrypts=False)

    def update(self, data: bytes | memoryview) -> bytes:
        """The content so far; with aes-256-cbc it lags behind by up to 32 bytes."""
        self._account(data)
        content = self._cipher.update(data)
        if self._algorithm is not Algorithm.AES_256_CBC:
            return content
        content = self._held + content
        self._held = content[-_BLOCK:]
        return content[:-_BLOCK]

    def update_in_place(self, data: memoryview) -> None:
        """Turn ciphertext into content; not with aes-256-cbc."""
        assert self._algorithm.is_authenticated, "the content of CBC lags behind"
        self._account(data)
        self._cipher.update_into(data, data)

    def _account(self, data: bytes | memoryview) -> None:
        if len(data) > self._left:
            raise Corrupt(
                f"longer than any file encrypted by {self._algorithm}", data={"what": "encryption"}
            )
        self._left -= len(data)
        if self._mac is not None:
            self._mac.update(data)

    def finish(self, tag: bytes) -> bytes:
        """The rest of the content.  ``Corrupt`` when the file is not what was written: then
        nothing of it is to be believed."""
        if self._algorithm is Algorithm.AES_256_CBC:
            return self._without_padding()
        if self._mac is not None:
            valid = compare_digest(self._mac.finish(), tag)
        else:
            try:
                cast("AEADDecryptionContext", self._cipher).finalize_with_tag(tag)
                valid = True
            except (InvalidTag, ValueError):  # ValueError: a tag of another length
                valid = False
        if not valid:
            raise _damaged()
        return b""

    def _without_padding(self) -> bytes:
        try:
            self._cipher.finalize()
        except ValueError as error:
            raise _damaged() from error
        missing = self._held[-1] if self._held else 0
        if not 1 <= missing <= _BLOCK or not self._held.endswith(bytes([missing]) * missing):
            raise _damaged()
        return self._held[:-missing]


class _Mac:
    """Poly1305 of the ciphertext as RFC 8439 has it, without additional data."""

    __slots__ = ("_poly", "_size")

    def __init__(self, key: bytes) -> None:
        self._poly = Poly1305(key)
        self._size = 0

    def update(self, data: bytes | memoryview) -> None:
        self._poly.update(data)
        self._size += len(data)

    def finish(self) -> bytes:
        self._poly.update(bytes(-self._size % 16) + struct.pack("<QQ", 0, self._size))
        return self._poly.finalize()


def _contexts(
    algorithm: Algorithm, key: bytes, iv: bytes, *, encrypts: bool
) -> tuple[CipherContext, _Mac | None]:
    mac = None
    if algorithm is Algorithm.CHACHA20_POLY1305:
        # block 0 of the key stream is the MAC's key, the content begins with block 1
        first = algorithms.ChaCha20(key, struct.pack("<L", 0) + iv)
        mac = _Mac(Cipher(first, mode=None).encryptor().update(bytes(32)))
        content = algorithms.ChaCha20(key, struct.pack("<L", 1) + iv)
        made = Cipher(content, mode=None)
        return (made.encryptor() if encrypts else made.decryptor()), mac
    mode = modes.GCM(iv) if algorithm is Algorithm.AES_256_GCM else modes.CBC(iv)
    block = Cipher(algorithms.AES(key), mode)
    return (block.encryptor() if encrypts else block.decryptor()), mac


def _damaged() -> Corrupt:
    return Corrupt(
        "it cannot be decrypted: it is damaged, or was written with another key",
        data={"what": "encryption"},
    )
