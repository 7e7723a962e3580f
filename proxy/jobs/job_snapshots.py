"""The snapshots that jobs of ours keep on a VM: finding, pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.repository import date_name
from proxy.xapi import ownership, vms
from proxy.xapi.snapshots import TEMPORARY_NAME
from proxy.xapi.together import together

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from proxy.xapi import Xapi


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """One snapshot VM with a job's keys; ``datetime`` sorts by time."""

    ref: str
    uuid: str
    schedule_id: str
    datetime: str


async def list_snapshots(xapi: Xapi, vm: dict[str, Any], job_id: str) -> list[JobSnapshot]:
    """The snapshots of ``vm`` that job ``job_id`` made, oldest first.

    Read from the pool now: a copy fed by events lacks a snapshot whose event has not come.
    A snapshot of which any key disagrees is somebody else's.
    """
    found: list[JobSnapshot] = []
    for ref, record in await _snapshots(xapi, vm):
        keys = keys_of(record)
        if (
            record.get("is_a_snapshot")
            and keys.get(ownership.JOB) == job_id
            and keys.get(ownership.VM) == vm["uuid"]
            and ownership.DATETIME in keys
            and ownership.COPY_OF not in keys
        ):
            found.append(
                JobSnapshot(
                    ref,
                    record["uuid"],
                    keys.get(ownership.SCHEDULE, ""),
                    sortable(keys[ownership.DATETIME]),
                )
            )
    return sorted(found, key=lambda snapshot: snapshot.datetime)


async def unfinished_snapshots(
    xapi: Xapi, vm: dict[str, Any], installation: str, is_live: Callable[[str], bool]
) -> list[str]:
    """Snapshots still under the temporary name that a dead run of this installation left."""
    return [
        ref
        for ref, record in await _snapshots(xapi, vm)
        if record.get("name_label") == TEMPORARY_NAME
        and keys_of(record).get(ownership.PROXY) == installation
        and not is_live(keys_of(record).get(ownership.RUN, ""))
    ]


def keys_of(record: dict[str, Any]) -> dict[str, str]:
    """A record's ``other_config``."""
    return record.get("other_config") or {}


def key_date(timestamp: float) -> str:
    """A time in milliseconds as a :data:`ownership.DATETIME` key."""
    date = date_name(timestamp)
    return f"{date[:11]}:{date[11:13]}:{date[13:]}"


def sortable(datetime: str) -> str:
    """A :data:`ownership.DATETIME` key, of which two forms exist, so that it sorts by time."""
    return datetime.replace(":", "")


async def _snapshots(xapi: Xapi, vm: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    async def read(ref: str) -> tuple[str, dict[str, Any]] | None:
        record = await vms.record_or_none(xapi, "VM", ref)
        return None if record is None else (ref, record)

    refs = [ref for ref in vm.get("snapshots", []) if vms.is_ref(ref)]
    return [one for one in await together(read, refs) if one is not None]


def expired(snapshots: Sequence[JobSnapshot], retention: Callable[[str], int]) -> list[JobSnapshot]:
    """Those beyond the retention of the schedule that made each, oldest first."""
    by_schedule: dict[str, list[JobSnapshot]] = {}
    for snapshot in snapshots:
        by_schedule.setdefault(snapshot.schedule_id, []).append(snapshot)
    gone: list[JobSnapshot] = []
    for schedule_id, ours in by_schedule.items():
        keep = max(0, retention(schedule_id))
        gone += ours[: len(ours) - keep] if keep else ours
    return gone
