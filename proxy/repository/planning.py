"""What to do in a VDI directory: decided on values alone, so that it can be tested on all.

Kept is whatever a backup needs, may need, or might turn out to need: each disk that
metadata names, all that its chain stands on, all members of a merge under way; and the
whole directory as soon as something in it cannot be understood on which a needed disk may
stand.  Only what is left is removed, children before their parents, so that no crash in
between leaves a child without its parent.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.disks.alias import is_alias
from proxy.disks.merge_state import CUT, MergeState, Phase, Step, disk_of_state, state_path
from proxy.remotes import paths
from proxy.repository.chains import Lineage, StoredDisk, overlaps

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True, slots=True)
class Interrupted:
    chain: tuple[str, ...]
    state: MergeState
    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Paths throughout.  To be done in the order of the fields."""

    warnings: tuple[tuple[str, dict[str, Any]], ...] = ()
    resume: tuple[Interrupted, ...] = ()
    """Once done, look and plan again: nothing else below knows of its results."""
    delete: tuple[str, ...] = ()
    """Disks that nobody needs, children before parents."""
    merge: tuple[tuple[str, ...], ...] = ()
    """Chains to make one disk of, oldest first; the last keeps its name and content."""
    forget: tuple[str, ...] = ()
    """States of merges that cannot go on because their disks are gone."""
    data: tuple[str, ...] = ()
    """What no alias means."""
    temporary: tuple[str, ...] = ()


def plan(
    lineage: Lineage,
    active: Collection[str],
    *,
    protected: bool = False,
    elsewhere: Collection[str] = (),
) -> Plan:
    """The plan for ``lineage`` when metadata names the disks ``active``.

    ``protected`` says that some metadata of the VM could not be understood: it may name
    anything, so nothing changes.  ``elsewhere``: targets of aliases in other directories.
    """
    planner = _Planner(lineage, frozenset(active), elsewhere)
    planner.warn_of_disks()
    if protected:
        return Plan(warnings=tuple(planner.warnings))
    planner.look_at_states()
    if planner.is_doubtful():
        return Plan(warnings=tuple(planner.warnings), temporary=tuple(lineage.temporary))
    delete, merge = planner.unneeded(), planner.merges()
    return Plan(
        warnings=tuple(planner.warnings),
        resume=tuple(planner.interrupted),
        delete=delete,
        merge=merge,
        forget=tuple(planner.forgotten),
        data=planner.orphaned_data(),
        temporary=tuple(lineage.temporary),
    )


class _Planner:
    def __init__(
        self, lineage: Lineage, active: frozenset[str], elsewhere: Collection[str]
    ) -> None:
        self._lineage = lineage
        self._active = active
        self._elsewhere = elsewhere
        self._stuck = False
        self._merging: set[str] = set()
        self._needed: set[str] = set()
        self.warnings: list[tuple[str, dict[str, Any]]] = []
        self.interrupted: list[Interrupted] = []
        self.forgotten: list[str] = []

    def warn_of_disks(self) -> None:
        lineage = self._lineage
        for path, error in lineage.bad_states.items():
            self._warn(f"Issue loading {paths.name(path)}", path=path, error=error.message)
        for path, error in lineage.unreadable.items():
            self._warn("failed to open disk", path=path, error=error.message)
        for path, target in lineage.dangling.items():
            self._warn("missing target of alias", path=path, target=target)
        merging = {name for state in lineage.states.values() for name in state.chain or ()}
        for disk in lineage.disks.values():
            if disk.parent is None or paths.name(disk.path) in merging:
                continue
            if disk.parent not in lineage:
                self._warn("parent disk is missing", child=disk.path, parent=disk.parent)
            elif disk.parent not in lineage.disks:
                self._warn(
                    "disk broken: parent missing or broken", child=disk.path, parent=disk.parent
                )
        self._warn_of_duplicates(merging)

    def _warn_of_duplicates(self, merging: Collection[str]) -> None:
        seen: dict[Any, str] = {}
        for path in sorted(self._lineage.disks):
            uuid = self._lineage.disks[path].uuid
            if uuid in seen and paths.name(path) not in merging:
                self._warn(
                    "duplicate disk UUID detected", uuid=str(uuid), path1=seen[uuid], path2=path
                )
            seen.setdefault(uuid, path)

    def _warn(self, message: str, **data: Any) -> None:
        self.warnings.append((message, data))

    def look_at_states(self) -> None:
        for parent in sorted(self._lineage.states):
            state = self._lineage.states[parent]
            chain = self._chain(parent, state)
            if parent not in self._lineage and (chain is None or chain[-1] not in self._lineage):
                self._warn("orphan merge state", path=state_path(parent))
                self.forgotten.append(state_path(parent))
                continue
            phase = self._phase(chain, state) if chain is not None else None
            if chain is None or phase is None or self._merging & set(chain):
                self._warn("orphan merge state", path=state_path(parent), kept=True)
                self._stuck = True
                continue
            self._merging |= set(chain)
            self.interrupted.append(Interrupted(chain, state, phase))

        self._look_at_cut_states()

    def _look_at_cut_states(self) -> None:
        """A state that was being written in place when its writer died: of a merge that has
        removed nothing yet, since what comes after that write was not reached.

        Whichever disks it is about, they are among those from its oldest to the next one that
        a backup names: merging all of these finds what is moved already.
        """
        for path, error in self._lineage.bad_states.items():
            parent = paths.join(self._lineage.directory, disk_of_state(paths.name(path)) or "")
            chain = self._linked_chain(parent) if error.data.get("what") == CUT else None
            if chain is None or self._merging & set(chain):
                self._stuck = True
                continue
            first, last = (self._lineage.disks[each] for each in (chain[1], chain[-1]))
            state = MergeState(
                chain=tuple(paths.name(each) for each in chain),
                child_uuid=last.uuid,
                parent_uuid=first.parent_uuid,
            )
            self._merging |= set(chain)
            self.interrupted.append(Interrupted(chain, state, Phase.BLOCKS))

    def _linked_chain(self, parent: str) -> tuple[str, ...] | None:
        """From ``parent`` to the next disk that a backup names, if there is but one way."""
        lineage = self._lineage
        if parent not in lineage.disks or parent in self._active or lineage.unreadable:
            return None
        chain = [parent]
        while chain[-1] not in self._active:
            children = lineage.children(chain[-1])
            if len(children) != 1 or children[0] in chain:
                return None
            chain.append(children[0])
        disks = [lineage.disks[path] for path in chain]
        links = [disk.parent_uuid == before.uuid for before, disk in itertools.pairwise(disks)]
        # Its footer is the newest one's as soon as all blocks are there.
        is_first = links[0] or disks[0].uuid in {disk.uuid for disk in disks[1:]}
        owns = all(self._owns(path) for path in chain)
        return tuple(chain) if is_first and all(links[1:]) and owns else None

    def _chain(self, parent: str, state: MergeState) -> tuple[str, ...] | None:
        """Very old states do not name the chain: two disks, the other one by uuid or link."""
        if state.chain is not None:
            return tuple(paths.join(self._lineage.directory, name) for name in state.chain)
        others = [disk for disk in self._lineage.disks.values() if disk.path != parent]
        found = [disk.path for disk in others if disk.uuid == state.child_uuid] or [
            disk.path for disk in others if disk.parent == parent
        ]
        return (parent, found[0]) if len(found) == 1 else None

    def _phase(self, chain: tuple[str, ...], state: MergeState) -> Phase | None:
        """Where to go on, by what the disks show; ``None`` when they contradict the state.

        The step alone is not believed: it is written before what it announces, and by
        some without being made durable.
        """
        lineage = self._lineage
        parent, target = lineage.disks.get(chain[0]), lineage.disks.get(chain[-1])
        if self._active & set(chain[:-1]):
            return None  # finishing would take a disk that a backup names
        if chain[0] not in lineage:
            # Renamed already when the disk of that name stands on nothing of the chain.
            is_renamed = target is not None and target.parent not in chain
            return Phase.REST if is_renamed else None
        if parent is None:
            return None
        if self._is_half_renamed(parent, target):
            return Phase.RENAME
        return self._phase_of_blocks(chain, state) if self._owns(chain[0]) else None

    def _phase_of_blocks(self, chain: tuple[str, ...], state: MergeState) -> Phase | None:
        disks = self._lineage.disks
        is_complete = self._is_complete(disks[chain[0]], disks.get(chain[-1]), state)
        is_linked = all(
            path in disks and disks[path].parent == before and self._owns(path)
            for before, path in itertools.pairwise(chain)
        )
        if is_linked and not (is_complete and state.step is Step.CLEANUP):
            return Phase.BLOCKS  # what is moved already is found moved
        return Phase.RENAME if is_complete else None

    def _owns(self, path: str) -> bool:
        return self._lineage.owns(path, self._elsewhere)

    @staticmethod
    def _is_half_renamed(parent: StoredDisk, target: StoredDisk | None) -> bool:
        """Both aliases mean the merged data: the new one was made, the old one not removed."""
        return target is not None and target.target is not None and target.target == parent.target

    @staticmethod
    def _is_complete(parent: StoredDisk, target: StoredDisk | None, state: MergeState) -> bool:
        """The merged footer, with the newest disk's uuid, is written behind all blocks."""
        if state.child_uuid is not None and state.child_uuid != state.parent_uuid:
            return parent.uuid == state.child_uuid
        if target is not None:
            return parent.uuid == target.uuid
        return state.step is Step.CLEANUP

    def is_doubtful(self) -> bool:
        """Whether a disk that is needed may stand on any other, for all that can be read.

        Then, and only then, ``_needed`` is not known.
        """
        lineage = self._lineage
        if self._stuck:
            return True
        for path in self._active | self._merging:
            *_, last = lineage.ancestors(path)
            disk = lineage.disks.get(last)
            if path in lineage.disks or path not in self._merging:
                if disk is None and last not in self._merging:
                    return True  # missing or unreadable: what it stands on is unknown
                if self._is_loop(path):
                    return True
            self._needed.update(lineage.ancestors(path))
        return False

    def _is_loop(self, path: str) -> bool:
        *_, last = self._lineage.ancestors(path)
        disk = self._lineage.disks.get(last)
        return disk is not None and disk.parent is not None

    def unneeded(self) -> tuple[str, ...]:
        """Readable disks that no needed one stands on, and aliases of nothing."""
        lineage = self._lineage
        gone = [
            path
            for path in (*lineage.disks, *lineage.dangling)
            if path not in self._needed | self._merging and not self._is_loop(path)
        ]
        depth = {path: len(list(lineage.ancestors(path))) for path in gone}
        return tuple(sorted(gone, key=lambda path: (-depth[path], path)))

    def merges(self) -> tuple[tuple[str, ...], ...]:
        """Runs of disks whose own backups are gone, each with the one that stands on them."""
        into: dict[str, str] = {}
        for path in sorted(self._needed - self._active - self._merging):
            children = [each for each in self._lineage.children(path) if each in self._needed]
            # With two children it is the base of both, and can become neither.
            if len(children) == 1 and children[0] not in self._merging:
                into[path] = children[0]
        chains: list[tuple[str, ...]] = []
        for path in into:
            if self._lineage.disks[path].parent in into:
                continue
            chain = [path]
            while chain[-1] in into:
                chain.append(into[chain[-1]])
            if self._can_merge(chain):
                chains.append(tuple(chain))
        return tuple(chains)

    def _can_merge(self, chain: list[str]) -> bool:
        lineage = self._lineage
        disks = [lineage.disks[path] for path in chain]
        for before, disk in itertools.pairwise(disks):
            if disk.parent_uuid != before.uuid:
                self._warn(
                    "disk broken: parent missing or broken", child=disk.path, parent=before.path
                )
                return False
        if not all(self._owns(path) for path in chain):
            return False
        if is_alias(chain[0]) == is_alias(chain[-1]):
            return True
        # The oldest takes the newest one's name, and the name says what the file is.
        self._warn(
            "disks are kept because a file and an alias cannot be merged: after the next full "
            "backup they go with the backups that stand on them",
            oldest=chain[0],
            newest=chain[-1],
        )
        return False

    def orphaned_data(self) -> tuple[str, ...]:
        """Entries of ``data/`` that no alias means, as long as all aliases can be read."""
        lineage = self._lineage
        claims = lineage.aliases.values()
        if lineage.data is None or None in claims or lineage.states or lineage.bad_states:
            return ()
        claimed = [*(claim for claim in claims if claim is not None), *self._elsewhere]
        return tuple(
            path
            for path in sorted(lineage.data)
            if path.endswith(".vhd") and not any(overlaps(path, claim) for claim in claimed)
        )
