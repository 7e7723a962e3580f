"""Whether each disk of a VM is backed up whole or as a delta, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from proxy.jobs.disk_snapshots import chain_length, newest_exported

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.jobs.disk_snapshots import DiskSnapshot, Group
    from proxy.jobs.target import Target


@dataclass(frozen=True, slots=True)
class Base:
    """A snapshot that every target has."""

    snapshot: DiskSnapshot


@dataclass(frozen=True, slots=True)
class Whole:
    """Why a disk is read whole: a stable code, a sentence, and what was seen."""

    reason: str
    message: str
    evidence: dict[str, Any] = field(default_factory=dict[str, Any])


Choice = Base | Whole

FULL_INTERVAL: Final = "FULL_INTERVAL"


async def choose(
    disks: Sequence[str],
    groups: Sequence[Group],
    targets: Sequence[Target],
    *,
    full_interval: int,
    others: Sequence[Group] = (),
) -> dict[str, Choice]:
    """For each live disk (uuid) what it is backed up from.

    ``groups`` are the job's snapshots, oldest first.  A disk is a delta only if every target
    has its base as the youngest disk of a chain that can be read.  An error of a target's
    storage counts as a refusal, with the error as evidence: the full backup that follows will
    tell it.  So does what ``damage`` says of the chain.

    ``others`` are the snapshots of other jobs.  When there is no base at all, a lone target
    that knows disks by their content may have got one of them from another job.
    """
    found = await _of_this_job(disks, groups, targets, full_interval)
    is_due = any(isinstance(one, Whole) and one.reason == FULL_INTERVAL for one in found.values())
    if is_due or any(isinstance(one, Base) for one in found.values()):
        return found
    if len(targets) == 1 and targets[0].knows_content:
        for group in reversed(others):
            by_content = await _of_content(disks, group, targets[0])
            if by_content:
                return {**found, **by_content}
    return found


async def _of_content(disks: Sequence[str], group: Group, target: Target) -> dict[str, Base]:
    """The disks of which the target has the content of their snapshot in ``group``."""
    known = {
        one.source_uuid: one
        for one in group
        if one.source_uuid in disks and one.content_key and one.has_data
    }
    refused = await target.find_bases(known, by_content=True)
    return {disk: Base(one) for disk, one in known.items() if disk not in refused}


async def _of_this_job(
    disks: Sequence[str], groups: Sequence[Group], targets: Sequence[Target], full_interval: int
) -> dict[str, Choice]:
    group = newest_exported(groups)
    if not group:
        why = Whole("NO_SNAPSHOT", "no earlier snapshot of this job was exported")
        return dict.fromkeys(disks, why)
    length = chain_length(group)
    by_disk = {one.source_uuid: one for one in group}
    due = bool(full_interval) and full_interval <= length + 1
    known = {disk: by_disk[disk] for disk in disks if disk in by_disk}
    refused = {} if due else await _refused(known, targets)
    found: dict[str, Choice] = {}
    for disk in disks:
        if disk not in known:
            found[disk] = Whole(
                "NEW_DISK",
                "the disk is not in the last exported snapshot",
                {"snapshot": group[0].datetime},
            )
        elif due:
            found[disk] = Whole(
                FULL_INTERVAL,
                f"a key backup is due after {length} deltas",
                {"fullInterval": full_interval, "chainLength": length},
            )
        else:
            found[disk] = refused.get(disk) or Base(known[disk])
    return found


async def _refused(
    snapshots: Mapping[str, DiskSnapshot], targets: Sequence[Target]
) -> dict[str, Whole]:
    """The disks that some target has no base of: the first that says so counts."""
    left = dict(snapshots)
    refused: dict[str, Whole] = {}
    for target in targets:
        for disk, refusal in (await target.find_bases(left)).items():
            evidence = {**refusal.evidence, "target": target.id}
            refused[disk] = Whole(refusal.reason, refusal.message, evidence)
            del left[disk]
    return refused


def describe(choices: Mapping[str, Choice], got: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The record for the log: for each disk what was wanted, what it got, and why.

    ``got`` says of each disk how it was really read.
    """
    told: list[dict[str, Any]] = []
    memory = Whole("MEMORY", "the memory of a suspended VM has no base")
    everything = {**choices, **dict.fromkeys(set(got) - set(choices), memory)}
    for disk, choice in everything.items():
        wanted: dict[str, Any] = {"disk": disk}
        if isinstance(choice, Base):
            wanted |= {"wanted": "delta", "base": choice.snapshot.uuid}
        else:
            wanted |= {
                "wanted": "full",
                "reason": choice.reason,
                "message": choice.message,
                "evidence": choice.evidence,
            }
        told.append({**wanted, **got.get(disk, {})})
    return {"disks": told}
