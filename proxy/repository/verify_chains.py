"""Following the chains of one VM's disks: each disk is looked at once, whatever stands on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proxy.disks.merge_state import MergeState, is_disk_name, read_states
from proxy.errors import NotFound, ProxyError
from proxy.remotes import paths
from proxy.repository.verify_disk import Found, link_problem, look_at, look_through_merge
from proxy.repository.verify_reports import Problem, Status, rooted, worst

if TYPE_CHECKING:
    from proxy.remotes.interface import Remote
    from proxy.repository.verify_disk import Reading


@dataclass(slots=True)
class Folder:
    """What a VDI directory holds, for telling a merge and a missing disk."""

    names: frozenset[str] = frozenset()
    merging: frozenset[str] = frozenset()
    """Names of the disks that are members of a merge."""
    is_unclear: bool = False
    """There is a merge of which it cannot be told which disks it is about."""

    @classmethod
    async def look(cls, remote: Remote, path: str) -> Folder:
        """An error of the storage is raised; a directory that is missing is empty."""
        try:
            names = frozenset(entry.name for entry in await remote.list(path))
        except NotFound:
            return cls()
        members: set[str] = set()
        unclear = False
        for disk, state in (await read_states(remote, path, names)).items():
            if isinstance(state, ProxyError) or state.chain is None:
                unclear = True
            if isinstance(state, MergeState):
                members |= {paths.name(disk), *(state.chain or ())}
        return cls(names, frozenset(members), unclear)

    def may_merge(self, disk: str) -> bool:
        return self.is_unclear or paths.name(disk) in self.merging


@dataclass(slots=True)
class Chain:
    """A disk with all that it stands on, newest first."""

    disks: list[Found] = field(default_factory=list[Found])
    problems: list[Problem] = field(default_factory=list[Problem])
    """Those that belong to none of its disks."""


class Chains:
    """The disks of one VM.  Chains of different directories may be looked at at once."""

    def __init__(self, remote: Remote, reading: Reading | None) -> None:
        self._remote = remote
        self._reading = reading
        self.found: dict[str, Found] = {}
        """Every disk so far, by path."""
        self._new: list[Found] = []

    def take_new(self) -> list[Found]:
        """The disks that were looked at since the last call."""
        new, self._new = self._new, []
        return new

    async def chain(self, tip: str) -> Chain:
        """The disk ``tip`` and its ancestors; never raises for what it finds."""
        chain = Chain()
        try:
            folder = await Folder.look(self._remote, paths.parent(tip))
            await self._walk(chain, tip, folder)
            if worst(disk.status for disk in chain.disks) is Status.DAMAGED or chain.problems:
                # a merge may have begun or ended under our eyes
                again = await Folder.look(self._remote, paths.parent(tip))
                if again != folder:
                    _excuse(chain, tip)
        except ProxyError as error:
            chain.problems.append(Problem.of(error, path=tip))
        return chain

    async def _walk(self, chain: Chain, tip: str, folder: Folder) -> None:
        child: Found | None = None
        path: str | None = tip
        while path is not None:
            if folder.may_merge(path) and path not in self.found:
                await self._through_merge(chain, tip, path, folder)
                return
            found = await self._disk(path, folder)
            if child is not None:
                problem = link_problem(child, found)
                if problem is not None and problem not in child.problems:
                    child.add(problem)
            elif found is None:
                chain.problems.append(
                    Problem(
                        status=Status.DAMAGED,
                        what="disk missing",
                        message=f"the disk '{path}' is missing",
                        path=path,
                    )
                )
            if found is None:
                return
            if any(found is each for each in chain.disks):
                message = f"the chain of '{tip}' does not end: '{path}' is an ancestor of itself"
                found.add(Problem(status=Status.DAMAGED, what="chain", message=message, path=path))
                return
            chain.disks.append(found)
            child, path = found, found.parent

    async def _disk(self, path: str, folder: Folder) -> Found | None:
        """``None`` when it is not there."""
        found = self.found.get(path)
        if found is None:
            if paths.name(path) not in folder.names or not is_disk_name(paths.name(path)):
                return None
            found = await look_at(self._remote, path, self._reading)
            self.found[path] = found
            self._new.append(found)
        return found

    async def _through_merge(self, chain: Chain, tip: str, path: str, folder: Folder) -> None:
        """From ``path`` on the chain is being merged: it is looked at as a whole."""
        members = [path]
        directory = paths.parent(path)
        members += [
            member
            for name in sorted(folder.merging & folder.names, reverse=True)
            if (member := rooted(paths.join(directory, name))) != path
        ]
        for found in await look_through_merge(self._remote, tip, members, self._reading):
            self.found[found.path] = found
            chain.disks.append(found)


def _excuse(chain: Chain, tip: str) -> None:
    message = "its chain was changed while it was looked at: verify it again"
    for disk in chain.disks:
        if disk.status is Status.DAMAGED:
            disk.excuse(Status.UNKNOWN, message)
    if chain.problems:
        chain.problems = [Problem(status=Status.UNKNOWN, what="changed", message=message, path=tip)]
