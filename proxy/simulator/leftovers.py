"""What a run may not leave on the pool: see :meth:`SimulatedPool.leftovers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.simulator.pool import SimulatedPool

Found = dict[str, list[str]]


def leftovers(pool: SimulatedPool, baseline: set[str]) -> Found:
    """Everything found by kind, also the kinds of which nothing was."""
    store = pool.store
    return {
        **_vms(pool, baseline),
        **_disks(pool, baseline),
        "importing": _importing(pool),
        "dom0_vbds": [ref for ref, record in store.all("VBD") if record["VM"] == pool.dom0],
        "tasks": [
            f"{record['name_label']}: {record['status']}"
            for ref, record in store.all("task")
            if ref not in baseline
        ],
        "transfers": [f"{each.path} {each.sent} bytes" for each in pool.transfers],
    }


def _vms(pool: SimulatedPool, baseline: set[str]) -> Found:
    found: Found = {
        "snapshots": [],
        "vms": [],
        "blocked_operations": [],
        "current_operations": [],
    }
    for ref, record in pool.store.all("VM"):
        name = record["name_label"]
        if ref not in baseline:
            found["snapshots" if record["is_a_snapshot"] else "vms"].append(name)
        found["blocked_operations"] += [f"{name}: {op}" for op in record["blocked_operations"]]
        running = record["current_operations"].values()
        found["current_operations"] += [f"{name}: {op}" for op in running]
    return found


def _disks(pool: SimulatedPool, baseline: set[str]) -> Found:
    found: Found = {"vdis": [], "cbt_metadata": [], "unfinished": []}
    suspended = {record["suspend_VDI"] for _, record in pool.store.all("VM")}
    for ref, record in pool.store.all("VDI"):
        if ref in pool.disks.unfinished:
            found["unfinished"].append(record["uuid"])
        if ref in baseline or not record["managed"]:
            continue
        if record["type"] == "cbt_metadata":
            found["cbt_metadata"].append(record["name_label"])
        elif not record["VBDs"] and ref not in suspended:
            found["vdis"].append(record["name_label"])
    return found


def _importing(pool: SimulatedPool) -> list[str]:
    return [
        record["name_label"]
        for kind in ("VM", "VDI")
        for _, record in pool.store.all(kind)
        if record["name_label"].startswith("[Importing")
        or "xo:import:task" in record["other_config"]
    ]
