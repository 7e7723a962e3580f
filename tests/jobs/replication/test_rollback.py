"""An update of a replica that fails at any call is taken back: the pool is as it was, the next
transfer is a delta to the same VM.  Weakness 14: upstream leaves the replica half-written."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from proxy.simulator import SimulatedPool
from tests.jobs.conftest import Outcome

from .conftest import MIB, Pair, differences, open_pair, state
from .test_incremental_replication import got

_EFFECT_FREE = re.compile(
    r"\w+\.get_\w+|event\.from|session\.\w+|task\.\w+|Async\.VDI\.list_changed_blocks"
)


CREATE = [
    ("VDI.create", 1),
    ("VM.create", 1),
    ("VM.add_to_blocked_operations", 1),
    ("VBD.create", 1),
    ("VTPM.set_contents", 1),
    ("VM.set_blocked_operations", 1),
    ("VDI.add_to_other_config", 1),
    ("VM.snapshot", 1),
    ("VM.set_name_label", 1),
    ("VM.set_name_label", 2),
    ("VM.remove_from_other_config", 1),
]


def effects(pair: Pair, since: int) -> list[tuple[str, int]]:
    """The calls with an effect on the other pool: method and the how manieth it was."""
    counted: Counter[str] = Counter()
    found: list[tuple[str, int]] = []
    for call in pair.there.calls.log[since:]:
        if not _EFFECT_FREE.fullmatch(call.method):
            name = call.method.removeprefix("Async.")
            counted[name] += 1
            found.append((name, counted[name]))
    return found


def check_kept(pair: Pair, before: dict[str, object], replicas: list[str], where: str) -> bool:
    """Whether the transfer is there in spite of the failure; else the pool must be as before."""
    if pair.replicas() == replicas:
        assert differences(state(pair.there), before) == [], where
        return False
    assert len(pair.replicas()) == len(replicas) + 1, where
    assert pair.digests(pair.replicas()[-1]) == pair.live(), where
    return True


@pytest.mark.parametrize("mode", ["create", "update"])
async def test_weakness_14_every_call_may_fail(tmp_path: Path, mode: str) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        tpm = pair.here.store.create("VTPM", VM=pair.here.vm("vm1"), is_unique=False)
        pair.here.vtpm_contents[tpm] = "secrets"
        pair.here.store.update("VM", pair.here.vm("vm1"), name_description="one")
        settings = {"copyRetention": 1000}
        if mode == "update":
            await pair.good(settings=settings)
        since = len(pair.there.calls.log)
        pair.change(1, 1)
        pair.here.store.update("VM", pair.here.vm("vm1"), name_description="two")
        await pair.good(settings=settings)
        points = effects(pair, since)
        if mode == "create":  # most of it is done as in an update
            points = [each for each in points if each in CREATE]
            assert len(points) == len(CREATE)
        kept: list[str] = []
        for method, nth in points:
            where = f"{method} #{nth}"
            if mode == "create":
                forget(pair)
            pair.change(1, nth + 1)
            before, replicas = state(pair.there), pair.replicas()
            fault = pair.there.fail(method, nth=nth, error=("INTERNAL_ERROR", "no"))
            outcome = await pair.run(settings=settings)
            assert fault.hits == 1, where
            assert outcome.status == "failure", where
            assert not troubles(outcome), where
            if check_kept(pair, before, replicas, where):
                kept.append(where)
                await pair.good(settings=settings)  # which tidies up
            pair.there.faults.clear()
        assert len(points) >= len(CREATE)
        # what can fail behind the commit: tidying up, which the next run makes good
        assert 0 < len(kept) < len(points) / 2, kept
        if mode == "update":
            pair.change(0, 99)
            outcome = await pair.good(settings=settings)
            assert got(outcome) == ["delta"]
            assert len(pair.vms()) == 1
            assert pair.digests(pair.vms()[0]) == pair.live()
            await pair.quiet()


def forget(pair: Pair) -> None:
    """Start again without a replica."""
    for ref in [*pair.there.snapshots(), *pair.vms()]:
        for vdi in pair.there.vms.disks(ref):
            pair.there.disks.forget(vdi)
        pair.there.vms.destroy(ref)


def troubles(outcome: Outcome) -> list[str]:
    """What the log says of undo steps that failed."""
    return [
        warning["message"]
        for name in ("backup run", "backup VM", "export", "transfer", "target snapshot")
        for task in outcome.of(name)
        for warning in task["data"].get("warnings", [])
        if warning["message"].startswith("could not")
    ]


TRANSFERS = [
    {"cut": "reset", "after_bytes": MIB},
    {"error": ("VDI_IO_ERROR", "Device I/O errors")},
    {"status": 500, "error": ("SR_FULL", "no")},
]


@pytest.mark.parametrize("fault", TRANSFERS, ids=["cut", "at the end", "refused"])
async def test_a_disk_that_does_not_arrive(pair: Pair, fault: dict[str, object]) -> None:
    await pair.good()
    pair.change(2, 2)
    before = state(pair.there)
    pair.there.fail("/import_raw_vdi", **fault)
    outcome = await pair.run()
    assert outcome.status == "failure"
    assert state(pair.there) == before
    await pair.quiet()
    assert got(await pair.good()) == ["delta"]
    assert pair.digests(pair.vms()[0]) == pair.live()


@pytest.mark.parametrize("fault", TRANSFERS, ids=["cut", "at the end", "refused"])
async def test_an_archive_that_does_not_arrive(pair: Pair, fault: dict[str, object]) -> None:
    before = state(pair.there)
    pair.there.fail("/import", **fault)
    outcome = await pair.run(mode="full")
    assert outcome.status == "failure"
    assert state(pair.there) == before
    await pair.quiet()


async def test_a_source_that_breaks_leaves_no_replica(pair: Pair) -> None:
    before = state(pair.there)
    for mode, point in (("full", "/export"), ("delta", "/export_raw_vdi")):
        pair.here.fail(point, cut="reset", after_bytes=3 * MIB)
        outcome = await pair.run(mode=mode)
        assert outcome.status == "failure"
        assert state(pair.there) == before
    await pair.quiet()


async def test_every_call_of_a_full_replication_may_fail(tmp_path: Path) -> None:
    beside = mock.patch("proxy.jobs.replication.full_replica._LOOKS", ())
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        pair.here.store.update("VM", pair.here.vm("vm1"), ha_restart_priority="restart")
        with beside:
            await pair.good(mode="full")
            last = dict(effects(pair, 0))
            kept: list[str] = []
            points = [(method, nth) for method in last for nth in {1, last[method]}]
            for method, nth in points:
                forget(pair)
                before, where = state(pair.there), f"{method} #{nth}"
                fault = pair.there.fail(method, nth=nth, error=("INTERNAL_ERROR", "no"))
                outcome = await pair.run(mode="full")
                assert outcome.status == "failure", where
                assert fault.hits == 1, where
                assert not troubles(outcome), where
                if pair.vms():
                    (ref,) = pair.vms()
                    kept.append(where)
                    assert pair.digests(ref) == pair.live(), where
                else:
                    assert differences(state(pair.there), before) == [], where
                pair.there.faults.clear()
        # what is left to do when it has its name
        assert {where.partition(" ")[0] for where in kept} == {"VM.remove_from_other_config"}


async def test_an_undo_that_fails_is_told_and_made_good_by_the_next_run(tmp_path: Path) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        await pair.good()
        (ref,) = pair.vms()
        pair.change(1, 1)
        # the snapshot fails, and giving back the former drive too
        pair.there.fail("VM.snapshot", error=("SR_FULL", "no"))
        pair.there.fail("VBD.create", nth=2, error=("INTERNAL_ERROR", "no"))
        outcome = await pair.run()
        assert outcome.status == "failure"
        assert troubles(outcome) == ["could not put the replica back as it was"]
        assert pair.digests(ref) == []
        outcome = await pair.good()
        assert got(outcome) == ["delta"]
        assert pair.vms() == [ref]
        assert pair.digests(ref) == pair.live()
        await pair.quiet()
        assert len([1 for _, vdi in pair.there.store.all("VDI") if vdi["managed"]]) == 3


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_a_disk_of_an_old_replica_that_cannot_be_destroyed_goes_later(
    tmp_path: Path, mode: str
) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        settings = {"copyRetention": 1}
        await pair.good(mode=mode, settings=settings)
        old = pair.replicas()[0] if mode == "delta" else pair.vms()[0]
        (left,) = pair.there.vms.disks(old)
        nth = 2 if mode == "delta" else 1  # the first is the disk that was put aside
        pair.there.fail("VDI.destroy", nth=nth, error=("SR_BACKEND_FAILURE_80", "no"))
        outcome = await pair.run(mode=mode, settings=settings)
        assert outcome.status == "failure"
        assert pair.there.store.find("VM", old) is None
        assert pair.there.store.find("VDI", left) is not None
        await pair.good(mode=mode, settings=settings)
        assert pair.there.store.find("VDI", left) is None
        await pair.quiet()


def test_the_pools_of_these_tests_differ() -> None:
    """A reference of one pool must never be by chance the right one on the other."""
    assert SimulatedPool(seed=77).srs[0] != SimulatedPool(seed=0).srs[0]


async def test_what_an_attempt_could_not_undo_goes_though_its_retry_went_well(
    tmp_path: Path,
) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        pair.there.fail("VM.create", error=("SR_FULL", "no"))
        pair.there.fail("VDI.destroy", error=("SR_BACKEND_FAILURE_80", "no"))
        outcome = await pair.run(settings={"nRetriesVmBackupFailures": 1})
        assert outcome.status == "success", outcome.snapshot
        assert troubles(outcome) == ["could not destroy a half-made disk"]
        await pair.good()
        await pair.quiet()
