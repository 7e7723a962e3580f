"""Remotes and SRs in one run: what its log says is what is there, whatever failed where."""

from __future__ import annotations

import tempfile
from pathlib import Path

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.jobs.test_status_truth import TROUBLES, Trouble
from tests.jobs.xo_status import rendered

from .conftest import Pair, open_pair

POINTS = [
    *("VDI.create", "VDI.clone", "VDI.destroy", "VBD.create", "VIF.create"),
    *("VM.create", "VM.snapshot", "VM.destroy", "VM.set_name_label", "VM.set_other_config"),
    *("VM.add_to_blocked_operations", "VDI.set_other_config", "VM.get_all_records"),
    *("/import_raw_vdi", "/import", "VM.set_ha_restart_priority", "VDI.get_all_records_where"),
]
STRIKES = st.lists(st.tuples(st.sampled_from(POINTS), st.sampled_from([1, 3, 99])), max_size=2)


def replicas(pair: Pair, mode: str, sr: str) -> set[str]:
    """Complete ones: snapshots of the VM that follows, or VMs of their own."""
    if mode == "delta":
        found = pair.replicas(sr)
    else:
        found = [
            ref
            for ref in pair.vms()
            if pair.vm(ref)["other_config"].get("xo:backup:sr") == sr
            and "xo:backup:run" not in pair.vm(ref)["other_config"]
        ]
    names = {ref: str(pair.vm(ref)["name_label"]) for ref in found}
    return {ref for ref, name in names.items() if not name.startswith(("[Importing", "xo-backup-"))}


async def one_run(
    root: Path,
    mode: str,
    on_remote: Trouble | None,
    on_pool: list[tuple[str, int]],
    retries: int,
    before: int,
) -> None:
    async with open_pair(root, disk_size=4 * 1024 * 1024) as pair:
        srs = (pair.sr_uuid(0), pair.sr_uuid(1))
        how = {"nRetriesVmBackupFailures": retries, "exportRetention": 9, "copyRetention": 9}
        run = {"srs": srs, "remotes": ("remote1",), "mode": mode, "settings": how}
        for _ in range(before):
            await pair.good(**run)
        known = {sr: replicas(pair, mode, sr) for sr in srs}
        stored = set(pair.house.backups())
        for point, times in on_pool:
            pair.there.fail(point, error=("SR_BACKEND_FAILURE_44", "full"), times=times)
        async with pair.house.faulty() as faults:
            if on_remote is not None:
                on_remote.prepare(faults)
            outcome = await pair.run(**run)
        new = {sr: replicas(pair, mode, sr) - known[sr] for sr in srs}
        new["remote1"] = set(pair.house.backups()) - stored
        shown = rendered(outcome.log)
        (vm,) = [one for one in shown["children"] if one["properties"]["name"] == "backup VM"]
        for target, made in new.items():
            said = [
                child["status"]
                for child in vm["children"]
                if child["properties"]["name"] == "export" and child["properties"]["id"] == target
            ]
            assert len(made) <= 1, (target, made)
            assert "success" not in said or len(made) == 1, (target, said, on_pool, on_remote)
            assert "success" in said or not made or shown["status"] == "failure"
        if not all(new.values()):
            assert shown["status"] == "failure", (new, on_pool, on_remote)
        assert (outcome.status == "success") == (shown["status"] == "success")
        assert outcome.log[-1]["status"] == "success", "a failing root would leave the log pending"


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    mode=st.sampled_from(["full", "delta"]),
    on_remote=TROUBLES,
    on_pool=STRIKES,
    retries=st.sampled_from([0, 1]),
    before=st.sampled_from([0, 1]),
)
def test_the_log_says_what_is_there(
    mode: str,
    on_remote: Trouble | None,
    on_pool: list[tuple[str, int]],
    retries: int,
    before: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trio.run(one_run, Path(folder), mode, on_remote, on_pool, retries, before)
