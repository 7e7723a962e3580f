"""A remote that fails, stalls and tears on command: the instrument of the tests.

Faults wait in a queue; each operation takes the first that fits its verb and path::

    faults = Faults(remote)
    faults.add("create.commit", Fail(Unreachable("gone")), path="*.xva")
    gate = faults.add("rename", Gate())
    ...
    await gate.reached.wait()   # the operation stands still: cancel it, look at the remote
    gate.release.set()
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import trio

from proxy.errors import Refused
from proxy.remotes import paths
from proxy.remotes.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.remotes.interface import Remote

T = TypeVar("T")


class Fault(Protocol):
    async def strike(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        """Take the place of ``operation``, whose effect is to await ``run()``."""
        ...


FaultT = TypeVar("FaultT", bound=Fault)


@dataclass(slots=True)
class Fail:
    """Raise ``error``; with ``after`` once the effect has happened, as a lost answer does."""

    error: BaseException
    after: bool = False

    async def strike(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        del operation
        await trio.lowlevel.checkpoint()
        if self.after:
            await run()
        raise self.error


@dataclass(slots=True)
class Torn:
    """Write the first ``size`` bytes and raise ``error``; only for writes."""

    size: int
    error: BaseException

    async def strike(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        del run
        assert operation.partially is not None, f"{operation.verb} writes nothing"
        await operation.partially(self.size)
        raise self.error


@dataclass(slots=True)
class Flip:
    """Change one bit in the middle of what is read; only for operations that answer bytes."""

    async def strike(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        content = await run()
        assert isinstance(content, bytes), f"{operation.verb} answers no bytes"
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        return cast("T", bytes(flipped))


@dataclass(slots=True)
class Delay:
    """Take ``seconds`` longer."""

    seconds: float

    async def strike(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        del operation
        await trio.sleep(self.seconds)
        return await run()


@dataclass(slots=True)
class Gate:
    """Stand still, before the effect or ``after`` it, until ``release`` is set or a cancel."""

    after: bool = False
    reached: trio.Event = field(default_factory=trio.Event)
    release: trio.Event = field(default_factory=trio.Event)

    async def strike(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        del operation
        if self.after:
            result = await run()
            await self._stand()
            return result
        await self._stand()
        return await run()

    async def _stand(self) -> None:
        self.reached.set()
        await self.release.wait()


@dataclass(slots=True)
class Call:
    """Call ``function`` with the operation, then do it; what it raises is the failure."""

    function: Callable[[Operation], Awaitable[None] | None]

    async def strike(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        result = self.function(operation)
        if inspect.isawaitable(result):
            await result
        return await run()


@dataclass(slots=True)
class _Rule:
    verb: str
    path: str
    fault: Fault
    skip: int
    times: int


class Faults(Wrapper):
    """Without faults it changes nothing.  ``seen`` holds each operation as ``(verb, path)``."""

    def __init__(self, inner: Remote) -> None:
        super().__init__(inner)
        self.seen: list[tuple[str, str]] = []
        self._rules: list[_Rule] = []
        self._space: int | None = None

    def add(
        self, verb: str, fault: FaultT, *, path: str = "*", skip: int = 0, times: int = 1
    ) -> FaultT:
        """Queue ``fault`` for the next ``times`` operations that fit, after ``skip`` of them.

        ``verb`` and ``path`` are patterns of the shell; the path is normalised.
        """
        self._rules.append(_Rule(verb, path, fault, skip, times))
        return fault

    def fill_after(self, size: int | None) -> None:
        """``ENOSPC`` at the byte after ``size`` more, for all writes; ``None``: space again."""
        self._space = size

    @property
    def unused(self) -> list[str]:
        """The verbs of faults that did not strike yet: a test that leaves some tests nothing."""
        return [rule.verb for rule in self._rules]

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        path = paths.normalise(operation.path)
        self.seen.append((operation.verb, path))
        fault = self._take(operation.verb, path)
        if fault is not None:
            return await fault.strike(operation, run)
        if self._space is not None and operation.partially is not None:
            if operation.size > self._space:
                await operation.partially(self._space)
                self._space = 0
                raise Refused(
                    f"ENOSPC: no space left on device, write '{path}'",
                    code="ENOSPC",
                    data={"path": path},
                )
            self._space -= operation.size
        return await run()

    def _take(self, verb: str, path: str) -> Fault | None:
        for rule in self._rules:
            if fnmatchcase(verb, rule.verb) and fnmatchcase(path, rule.path):
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                if rule.times == 0:
                    self._rules.remove(rule)
                return rule.fault
        return None
