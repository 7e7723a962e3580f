"""Runs that replicate: which SRs and VMs they take, and how they distribute them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from proxy.errors import Refused

from .conftest import MIB, Pair, open_pair
from .test_incremental_replication import got


@pytest.mark.parametrize("what", ["unknown", "no pool", "unreachable"])
async def test_an_sr_that_cannot_be_had_is_a_failed_task_and_the_run_goes_on(
    pair: Pair, what: str
) -> None:
    lost = "00000000-0000-4000-8000-000000000000"
    request = pair.request(srs=(lost, pair.sr))
    if what == "no pool":
        known = {key: value for key, value in request.record_to_xapi.items() if key != lost}
        request = replace(request, record_to_xapi=known)
    if what == "unreachable":
        spec = {**request.xapis["xapi2"], "url": "http://127.0.0.1:1"}
        request = replace(
            request,
            xapis={**request.xapis, "xapi3": spec},
            record_to_xapi={**request.record_to_xapi, lost: "xapi3"},
        )
    outcome = await pair.house.run(request)
    assert outcome.status == "failure"
    (failed,) = outcome.of("get SR record")
    assert (failed["data"]["id"], failed["data"]["type"]) == (lost, "SR")
    assert failed["status"] == "failure"
    assert [export["status"] for export in outcome.of("export")] == ["success"]
    assert pair.digests(pair.vms()[0]) == pair.live()


async def test_nothing_is_done_when_no_target_can_be_had(pair: Pair) -> None:
    outcome = await pair.run(srs=("00000000-0000-4000-8000-000000000000",))
    assert outcome.status == "failure"
    assert outcome.of("backup VM") == []
    assert pair.here.snapshots() == []


async def test_an_sr_may_be_left_out_by_its_setting(pair: Pair) -> None:
    request = pair.request(srs=(pair.sr_uuid(0), pair.sr))
    settings = {**request.job["settings"], pair.sr: {"copyRetention": 0}}
    outcome = await pair.house.run(replace(request, job={**request.job, "settings": settings}))
    assert [export["data"]["id"] for export in outcome.of("export")] == [pair.sr_uuid(0)]


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_a_replica_is_not_replicated_by_its_own_job(pair: Pair, mode: str) -> None:
    sr = str(pair.here.store.get("SR", pair.here.srs[1])["uuid"])
    before = {ref for ref, _ in pair.here.store.all("VM")}
    await pair.good(srs=(sr,), to=pair.here, mode=mode)
    (replica,) = [
        record["uuid"]
        for ref, record in pair.here.store.all("VM")
        if ref not in before and not record["is_a_snapshot"]
    ]
    request = pair.request(srs=(sr,), to=pair.here, mode=mode)
    request = replace(
        request,
        job={**request.job, "vms": {"id": replica}},
        record_to_xapi={**request.record_to_xapi, replica: "xapi1"},
    )
    outcome = await pair.house.run(request)
    assert outcome.error("backup VM")["message"] == "cannot backup a VM created by this very job"


async def test_two_vms_and_two_srs(tmp_path: Path) -> None:
    async with open_pair(tmp_path, vms=2, disk_size=4 * MIB) as pair:
        uuids = [pair.here.vm_uuid(name) for name in ("vm1", "vm2")]
        srs = (pair.sr_uuid(0), pair.sr_uuid(1))
        for _ in range(2):
            request = pair.request(srs=srs)
            request = replace(
                request,
                job={**request.job, "vms": {"id": {"__or": uuids}}},
                record_to_xapi={**request.record_to_xapi, uuids[1]: "xapi1"},
            )
            outcome = await pair.house.run(request)
            assert outcome.status == "success", outcome.snapshot
        assert len(pair.vms()) == 4
        assert [len(pair.replicas(sr)) for sr in srs] == [4, 4]
        expected = sorted([*pair.live("vm1"), *pair.live("vm2")] * 2)
        assert sorted(digest for ref in pair.vms() for digest in pair.digests(ref)) == expected


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_weakness_6_replicas_are_distributed_also_by_the_second_run(
    tmp_path: Path, mode: str
) -> None:
    """Upstream finds no old replicas then, and cannot look for their bases."""
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        srs = (pair.sr_uuid(0), pair.sr_uuid(1))
        settings = {"distributeReplications": True, "copyRetention": 2}
        for number in range(4):
            pair.change(1, number + 1)
            outcome = await pair.good(srs=srs, mode=mode, settings=settings)
            transfers = [len(export.get("tasks", [])) for export in outcome.of("export")]
            assert sorted(transfers) == [0, 1]
            if mode == "delta":
                assert got(outcome) == ["full" if number == 0 else "delta"]
        if mode == "delta":
            assert len(pair.vms()) == 1
            assert sorted(len(pair.replicas(sr)) for sr in srs) == [0, 2]
            assert pair.digests(pair.vms()[0]) == pair.live()
        else:
            assert len(pair.vms()) == 2, "retention counts over all SRs"
            assert pair.live() in [pair.digests(ref) for ref in pair.vms()]
        await pair.quiet()


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_a_vm_without_disks(tmp_path: Path, mode: str) -> None:
    async with open_pair(tmp_path, disks_per_vm=0) as pair:
        for _ in range(2):
            await pair.good(mode=mode)
        assert len(pair.vms()) == (2 if mode == "full" else 1)
        assert len(pair.replicas()) == (0 if mode == "full" else 2)
        await pair.quiet()


@pytest.mark.parametrize("mode", ["full", "delta"])
@pytest.mark.parametrize("tagged", [True, False])
async def test_weakness_4_a_replica_is_checked_or_not_and_its_export_ends(
    tmp_path: Path, mode: str, tagged: bool
) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        if not tagged:
            pair.here.store.update("VM", pair.here.vm("vm1"), tags=["xo:no-health-check"])
        health = pair.sr_uuid(0)
        for number in range(2):
            request = pair.request(mode=mode, settings={"healthCheckSr": health})
            known = {**request.record_to_xapi, health: "xapi2"}
            outcome = await pair.house.run(replace(request, record_to_xapi=known))
            assert outcome.status == "success", outcome.snapshot
            assert all("end" in export for export in outcome.of("export"))
            assert len(outcome.of("health check")) == 1
            assert len(outcome.of("vmstart")) == tagged
            if mode == "delta":
                assert got(outcome) == [("full", "delta")[number]]
        assert len(pair.vms()) == (2 if mode == "full" else 1)
        await pair.quiet()


async def test_a_remote_and_an_sr_of_one_id_are_refused(pair: Pair) -> None:
    """One would stand for the other, and get both backups or none."""
    with pytest.raises(Refused, match="both a remote and an SR"):
        pair.start(remotes=(pair.sr,))
