"""Whether a remote is encrypted, and whether the key that was given opens it.

Two files at the root say so, of Xen Orchestra's making: ``encryption.json``, plain, names the
algorithm; ``metadata.json``, encrypted, is there to be decrypted and parsed.  A key that is
wrong, missing or superfluous is *one* error, before anything else is read or written.

The table of Xen Orchestra's outcomes is kept where it protects data.  Otherwise:

- without a key nothing is ever written, and what looks encrypted is refused.  Xen Orchestra
  turns an encrypted remote that is still empty into a plain one, which the key then no longer
  opens, and takes one that lost its ``encryption.json`` for a plain one;
- a key for a remote that says ``none`` is refused, or makes it an encrypted one while it is
  empty.  Xen Orchestra opens it, and every access fails afterwards;
- a remote is *empty* only when its listing succeeded, agrees with what was just read, and when
  the folders of backups, each asked by name, are not there either;
- files that are replaced on an empty remote stay beside it under hidden names: if that was not
  the remote, or somebody was still writing with the former key, they bring it back;
- who only looks writes nothing: what one opening serves both, those who look and those who write
  (``set_up=False``), lets the latter call :func:`settle`.  Until then a remote that is empty and
  nobody's is what it is; one that is empty but set up for another key is that error;
- what stays open from one run to the next is looked at again before each that writes: a remote
  that was emptied meanwhile, with its two files, would be filled with what nobody could tell from
  plain data, and one that got another key with what that key does not open.

A crash between the two writes: ``metadata.json`` is first, and alone it says "the default
algorithm, this key", to Xen Orchestra too; the next opening that may write writes the other one.
A file of the two that was cut while it was written, as Xen Orchestra writes them and we do on an
immutable remote, is written again: the description when the key opens ``metadata.json``, and
``metadata.json`` while the remote is empty.  Two who set a remote up at once with one key: the
second finds its name taken and uses what is there.  With two keys: one of them is refused, because
what was written is read back before it is believed.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import structlog
import trio

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused, Unauthorized, Unreachable
from proxy.formats.encrypted import DEFAULT, Algorithm, FileCipher
from proxy.remotes.encryption import DESCRIPTION, PROBE, Encrypted
from proxy.remotes.retry import Retry
from proxy.remotes.wrapper import Operation, Wrapper, tries_again

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from proxy.remotes.interface import Remote

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_NONE: Final = "none"
_LONGEST: Final = 64 * 1024
_BACKUPS: Final = ("xo-vm-backups", "xo-config-backups", "xo-pool-metadata-backups")
_SHOWN: Final = 5
_UUID_LENGTH: Final = 36
_CUT: Final = ""
"""In the place of an algorithm: the description ends in the middle."""
_SHORTEST_PROBE: Final = 77
"""Bytes of the shortest ``metadata.json`` that Xen Orchestra or we write."""
_LOOKS: Final = frozenset(
    {
        "aclose",
        "info",
        "list",
        "open_uploads",
        "protected",
        "read_file",
        "read_files",
        "read.open",
        "read.read_at",
        "read.read_into",
        "read.read_into_at",
        "stat",
        "walk",
    }
)


def key_of(record: Mapping[str, Any]) -> str | None:
    """The ``encryptionKey`` of a remote's record merged with its URL's options.

    ``Refused`` for one that is there and none: the remote would be taken for a plain one.
    """
    key = record.get("encryptionKey")
    if key is None:
        return None
    if not isinstance(key, str) or not key:
        raise Refused(
            "the option 'encryptionKey' is set but holds no key: set one of 32 characters, or"
            " remove the option",
            code="EINVAL",
            data={"part": "encryptionKey"},
        )
    FileCipher(DEFAULT, key)  # as long as a key is
    return key


async def unlocked(remote: Remote, key: str | None, *, set_up: bool = True) -> Remote:
    """``remote`` itself when it is not encrypted, else around it what decrypts.

    An empty remote is set up for the key if ``set_up``; else that is left to :func:`settle`, and
    until then nothing can be written while it is nobody's.  ``Unauthorized`` (``EAUTH``): a key is
    missing or wrong.  ``Conflict`` (``ENOTEMPTY``): a key for a remote that holds plain data.
    ``Refused`` (``BAD_ALGORITHM``): an algorithm that is not known, or no key at all.  ``Corrupt``:
    a file of the two is damaged.  Any error of the storage is that error.  Nothing was changed
    then.
    """
    roots = await _Roots.read(remote)
    if key is None:
        roots.refuse_without_key()
        return remote
    if set_up:
        return Encrypted(remote, _accepted(remote, await _settled(roots, key)))
    cipher = roots.opened_by(key)
    if cipher is None:
        await roots.refuse_unless_empty(key)
    return _Unlocked(remote, key, roots, cipher)


async def _settled(roots: _Roots, key: str) -> FileCipher:
    """What decrypts the remote, whose two files are there then."""
    cipher = roots.opened_by(key)
    if cipher is None:
        await roots.refuse_unless_empty(key)
        cipher = await _set_up(roots, key)
    elif not roots.is_described:
        await _describe_again(roots, cipher)
    return cipher


def _accepted(remote: Remote, cipher: FileCipher) -> FileCipher:
    if not cipher.algorithm.is_authenticated:
        _log.warning(
            "the encryption of this remote does not notice changed files",
            remote=remote.url,
            algorithm=cipher.algorithm.value,
        )
    return cipher


@dataclass(frozen=True, slots=True)
class _Roots:
    """The two files as they are; ``None``: missing."""

    remote: Remote
    description: bytes | None
    probe: bytes | None
    algorithm: str
    """That the description names; without a description the default, ``""`` when it is cut."""

    @classmethod
    async def read(cls, remote: Remote) -> _Roots:
        contents = await remote.read_files([DESCRIPTION, PROBE], limit=_LONGEST)
        description, probe = (_content(each) for each in contents)
        return cls(remote, description, probe, _algorithm(description))

    # -- without a key -------------------------------------------------------------------------

    def refuse_without_key(self) -> None:
        if self.description is None:
            if self.probe is None or _is_json(self.probe):
                return
            raise Unauthorized(
                f"this remote looks encrypted: its {PROBE} cannot be read without a key. Set the"
                f" remote's encryption key; if it is not encrypted, remove its {PROBE}",
            )
        if self.algorithm == _NONE:
            return
        if self.algorithm == _CUT:
            raise _unknown("it was cut while it was written")
        raise Unauthorized(
            f"this remote is encrypted ({self.algorithm[:40]}): set its encryption key. A remote"
            " that is empty and is to be used without encryption must be rid of"
            f" {DESCRIPTION} and {PROBE} first",
            data={"algorithm": self.algorithm[:40]},
        )

    @property
    def is_described(self) -> bool:
        return self.description is not None and self.algorithm != _CUT

    # -- with a key ----------------------------------------------------------------------------

    def opened_by(self, key: str) -> FileCipher | None:
        """What decrypts this remote; ``None`` when it is not set up for this key."""
        if self.algorithm == _NONE:
            return None
        if self.algorithm == _CUT:
            for algorithm in self._possible():
                cipher = FileCipher(algorithm, key)
                if self.probe is not None and _opens(cipher, self.probe):
                    return cipher
            return None
        cipher = FileCipher(_known(self.algorithm), key)
        return cipher if self.probe is not None and _opens(cipher, self.probe) else None

    def _possible(self) -> Iterator[Algorithm]:
        """Those that the description may have been about to name."""
        begun = self.description or b""
        return (each for each in Algorithm if _description(each).startswith(begun))

    def chosen(self) -> Algorithm:
        """By what it is encrypted when it is set up: the default, as Xen Orchestra has it, unless
        somebody put another one that authenticates into its description before there was a
        key."""
        if self.probe is not None or self.algorithm in (_NONE, _CUT):
            return DEFAULT
        named = _known(self.algorithm)
        return named if named.is_authenticated else DEFAULT

    def is_anothers(self, key: str) -> bool:
        """Whether an empty remote that ``key`` does not open was set up for something else: not
        when that was cut before ``metadata.json`` was whole, or, for this key, behind it."""
        if self.probe is None or len(self.probe) < _SHORTEST_PROBE:
            return self.algorithm == _NONE
        return not any(_opens(FileCipher(each, key), self.probe) for each in Algorithm)

    def refuse_anothers(self, key: str) -> None:
        """Of an empty remote."""
        if not self.is_anothers(key):
            return
        how = "without encryption" if self.algorithm == _NONE else "with another encryption key"
        raise Unauthorized(
            f"this remote is empty, but was set up {how}, and the key that was given does not open"
            " it. Nothing was changed. If the key is right, test the remote or make a backup: that"
            " sets an empty remote up for it",
            data={"algorithm": self.algorithm},
        )

    async def refuse_unless_empty(self, key: str) -> None:
        found = await self._others()
        if not found and not (self.remote.is_immutable and self.is_anothers(key)):
            return
        shown = ", ".join(sorted(found)[:_SHOWN])
        data = {"found": sorted(found)[:_SHOWN]}
        if self.algorithm == _NONE or (self.description is None and self.probe is None):
            raise Conflict(
                f"Remote directory must be empty. It is not encrypted and holds {shown}: remove"
                " the encryption key from its settings, or use an empty remote"
                + (" (a directory inside of this file system)" if "lost+found" in found else ""),
                code="ENOTEMPTY",
                data=data,
            )
        if self.algorithm == _CUT:
            raise _unknown("it was cut while it was written")
        if self.probe is None:
            raise Conflict(
                f"Remote directory must be empty. It holds {shown}, and {PROBE}, which tells"
                " whether a key is the right one, is missing: bring that file back",
                code="ENOTEMPTY",
                data=data,
            )
        if self.description is None:
            for algorithm in Algorithm:
                if _opens(FileCipher(algorithm, key), self.probe):
                    raise Corrupt(
                        f"{DESCRIPTION} is missing: the key is right, and the file must hold"
                        f' {{"algorithm":"{algorithm}"}}',
                        data={"what": "encryption", "path": DESCRIPTION},
                    )
        raise Unauthorized(
            "the encryption key does not open this remote: it was set up with another one, or"
            f" its {PROBE} is damaged. Nothing was changed. Set the key that it was set up with;"
            " the key of a remote with backups cannot be changed, for another key use an empty"
            " remote",
            data={"algorithm": self.algorithm},
        )

    async def _others(self) -> set[str]:
        """What the remote holds besides: names at its root, and folders that its listing hides."""
        names = {entry.name for entry in await self.remote.list("")}
        for name, content in ((DESCRIPTION, self.description), (PROBE, self.probe)):
            if (content is not None) != (name in names):
                raise Unreachable(
                    f"the listing of the remote contradicts what was just read of its '{name}':"
                    " whether it is empty is not known. Nothing was changed",
                    code="EIO",
                    data={"path": name},
                )
        found = {name for name in names if not name.startswith(".")} - {DESCRIPTION, PROBE}
        for folder in _BACKUPS:
            try:
                if await self.remote.list(folder):
                    found.add(folder)
            except NotFound as error:
                if error.code != "ENOENT":
                    raise
        return found


class _Unlocked(Wrapper):
    """A remote with a key, for users of whom some only look.

    While it is nobody's, empty or another key's, it is looked at before each operation whether
    somebody has set it up meanwhile: from then on it is what that made of it.  What it is then is
    looked at again for each that wants to write: it may have been emptied.
    """

    def __init__(self, storage: Remote, key: str, roots: _Roots, cipher: FileCipher | None) -> None:
        super().__init__(Encrypted(storage, cipher or FileCipher(roots.chosen(), key)))
        self._storage = storage
        self._key = key
        self._cipher: FileCipher | None = None
        """``None`` while it is nobody's."""
        self._settling = trio.Lock()
        if cipher is not None:
            self._opened_by(cipher)

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        if self._cipher is None and operation.verb != "aclose":
            await self.look()
            if self._cipher is None:
                _refuse_change(operation)
        return await run()

    async def look(self) -> None:
        """Raise as :func:`unlocked` does, and when it is empty but another key's."""
        if self._cipher is not None:
            return
        roots = await _Roots.read(self._storage)
        cipher = roots.opened_by(self._key)
        if cipher is not None:
            self._opened_by(cipher)
        else:
            await roots.refuse_unless_empty(self._key)
            roots.refuse_anothers(self._key)

    async def settle(self) -> None:
        """Write what is missing.  Several at once are fine."""
        storage = self._storage
        async with self._settling:
            # it is open already: a failure that passes is none of the run that comes now
            roots = await _Roots.read(storage if tries_again(storage) else Retry(storage))
            self._opened_by(await _settled(roots, self._key))

    def _opened_by(self, cipher: FileCipher) -> None:
        if self._cipher is None or self._cipher.algorithm is not cipher.algorithm:
            self._cipher = _accepted(self._storage, cipher)
            self.inner = Encrypted(self._storage, cipher)


def _unlocked(remote: Remote) -> _Unlocked | None:
    while isinstance(remote, Wrapper):
        if isinstance(remote, _Unlocked):
            return remote
        remote = remote.inner
    return None


async def settle(remote: Remote) -> None:
    """Set up what was opened without: for those who are about to write.  Nothing where it is
    settled, which is looked at each time.  Raises what :func:`unlocked` does."""
    if (found := _unlocked(remote)) is not None:
        await found.settle()


async def look(remote: Remote) -> None:
    """For those who only look at what was opened without setting up: ``Unauthorized`` when it is
    empty, but was set up for another key."""
    if (found := _unlocked(remote)) is not None:
        await found.look()


def _refuse_change(operation: Operation) -> None:
    why = f"the remote is empty, and not set up for its encryption key yet, {operation.verb}"
    data = {"path": operation.path}
    if operation.verb.startswith("lock."):
        raise NotFound(f"ENOENT: {why} '{operation.path}'", data=data)
    if operation.verb not in _LOOKS:
        raise Refused(f"EROFS: {why} '{operation.path}'", code="EROFS", data=data)


async def _set_up(roots: _Roots, key: str) -> FileCipher:
    """Make the empty remote one for ``key``; what was there stays under hidden names."""
    chosen = roots.chosen()
    cipher = FileCipher(chosen, key)
    remote = roots.remote
    former = {PROBE: roots.probe, DESCRIPTION: roots.description}
    if roots.probe is not None:
        await _keep(remote, former)
    probe = msgspec.json.encode({"random": str(uuid.uuid4())})
    await _write(remote, PROBE, bytes(cipher.encrypt(probe)), former=roots.probe)
    if roots.description is None or roots.algorithm != chosen:
        await _write(remote, DESCRIPTION, _description(chosen), former=roots.description)
    found = (await _Roots.read(remote)).opened_by(key)
    if found is None:
        raise Unauthorized(
            "somebody else set this remote up with another encryption key at the same time:"
            " give the same key to all who use it"
        )
    _log.info("set up an encrypted remote", remote=remote.url, algorithm=found.algorithm.value)
    return found


async def _write(remote: Remote, name: str, data: bytes, *, former: bytes | None) -> None:
    exclusive = former is None or remote.is_immutable
    if former is not None and remote.is_immutable:
        await remote.unlink(name)  # what was cut; where that is protected already, it says so
    try:
        await remote.write_file(name, data, exclusive=exclusive)
    except Conflict as error:
        if error.code != "EEXIST" or not exclusive:
            raise
        # somebody else was faster: what is there now is read back and decides


async def _keep(remote: Remote, former: Mapping[str, bytes | None]) -> None:
    milliseconds = time.time_ns() // 1_000_000
    for name, content in former.items():
        if content is not None:
            kept = f".{name}.{milliseconds}.replaced"
            await remote.write_file(kept, content, exclusive=True)
            _log.warning(
                "an empty remote gets another encryption key; the former file is kept",
                remote=remote.url,
                path=kept,
            )


async def _describe_again(roots: _Roots, cipher: FileCipher) -> None:
    """Without its description, whoever has no key takes the remote for a plain one."""
    description = _description(cipher.algorithm)
    try:
        await _write(roots.remote, DESCRIPTION, description, former=roots.description)
    except ProxyError as error:
        _log.warning(
            f"{DESCRIPTION} is missing or cut and could not be written",
            remote=roots.remote.url,
            error=error.message,
        )


def _description(algorithm: Algorithm) -> bytes:
    return msgspec.json.encode({"algorithm": algorithm.value})


def _content(found: bytes | ProxyError) -> bytes | None:
    """``None`` for what is missing for certain; any other error is raised."""
    if isinstance(found, NotFound) and found.code == "ENOENT":
        return None
    if isinstance(found, ProxyError):
        raise found
    return found


def _algorithm(description: bytes | None) -> str:
    if description is None:
        return DEFAULT
    if any(
        _description(each).startswith(description) and len(description) < len(_description(each))
        for each in Algorithm
    ):
        return _CUT
    try:
        named = msgspec.json.decode(description, type=dict[str, Any]).get("algorithm", DEFAULT)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unknown("it is no JSON object") from error
    if not isinstance(named, str):
        raise _unknown("its algorithm is no text")
    return named


def _unknown(why: str) -> Corrupt:
    return Corrupt(
        f"{DESCRIPTION} does not tell how this remote is encrypted: {why}. If the remote is empty,"
        f' remove it; otherwise it must hold {{"algorithm":"{DEFAULT}"}} or the algorithm that'
        " the remote was set up with",
        data={"what": "encryption", "path": DESCRIPTION},
    )


def _known(name: str) -> Algorithm:
    try:
        return Algorithm(name)
    except ValueError as error:
        raise Refused(
            f"this remote is encrypted by {name[:40]!r}, of which this version knows nothing:"
            f" it knows {', '.join(Algorithm)}",
            code="BAD_ALGORITHM",
            data={"algorithm": name[:40], "supported": [each.value for each in Algorithm]},
        ) from error


def _opens(cipher: FileCipher, probe: bytes) -> bool:
    """With CBC any key may decrypt it, to something that is no JSON.

    And whoever knows some content of a remote of aes-256-gcm, of which CBC uses the same block
    cipher with the same key, can make up one block for CBC: too short for all of Xen Orchestra's
    probe.  So an exchanged ``encryption.json`` does not take the authentication away.
    """
    try:
        content = cipher.decrypt(probe)
    except Corrupt:
        return False
    if cipher.algorithm.is_authenticated:
        return _is_json(content)
    try:
        return len(msgspec.json.decode(content, type=_Probe).random) == _UUID_LENGTH
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


class _Probe(msgspec.Struct):
    random: str


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True
