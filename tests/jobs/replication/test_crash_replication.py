"""A run dies in the middle of a replication: the next one removes what it left, and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from proxy.simulator import SimulatedPool
from proxy.xapi import ownership
from proxy.xapi.vm_create import is_importing
from tests.jobs.conftest import until

from .conftest import MIB, Pair, open_pair
from .test_cancel_replication import Stage
from .test_incremental_replication import got


async def die_at(pair: Pair, stage: Stage, **how: object) -> None:
    """Let a run end there as if the daemon was killed: it can undo nothing on the pool."""
    point, where = stage
    gate = pair.there.pause_at(point, **where)
    task = pair.start(**how)
    with trio.fail_after(20):
        await gate.reached()
        await trio.sleep(0.05)  # what goes on beside it
        await lock_out(pair.there)
        task.cancel()
        pair.there.gates.release_all()
        await pair.house.outcome(task)
    pair.there.sessions.password = "simulated"
    with trio.move_on_after(5):
        while pair.there.transfers:
            await trio.sleep(0.01)
    for ref, _ in pair.there.store.all("task"):  # a toolstack forgets them in time
        pair.there.store.destroy("task", ref)


async def lock_out(pool: SimulatedPool) -> None:
    pool.sessions.password = "another"
    for session in list(pool.sessions.open):
        pool.sessions.logout(session)
    await trio.lowlevel.checkpoint()


UPDATE: list[Stage] = [
    ("/import_raw_vdi", {"at_bytes": MIB}),
    ("VDI.set_other_config", {"nth": 2, "stage": "after"}),
    ("VBD.destroy", {"stage": "after"}),
    ("VBD.create", {"stage": "after"}),
    ("VM.snapshot", {"stage": "after"}),
    ("VM.set_name_label", {"stage": "after"}),
    ("VDI.remove_from_other_config", {}),
    ("VDI.destroy", {}),
]


async def test_an_update_that_dies_anywhere(tmp_path: Path) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        await pair.good()
        (ref,) = pair.vms()
        for number, stage in enumerate(UPDATE):
            pair.change(1, number + 1)
            await die_at(pair, stage, settings={"copyRetention": 2})
            assert pair.vms() == [ref], stage
            outcome = await pair.good(settings={"copyRetention": 2})
            assert got(outcome) == ["delta"], stage
            assert pair.vms() == [ref], stage
            assert pair.digests(ref) == pair.live(), stage
            assert pair.digests(pair.replicas()[-1]) == pair.live(), stage
            await pair.quiet()
            left = [vdi["name_label"] for _, vdi in pair.there.store.all("VDI") if vdi["managed"]]
            assert left == ["vm1_0"] * (1 + len(pair.replicas())), stage


CREATE: list[Stage] = [
    ("VDI.create", {"stage": "after"}),
    ("/import_raw_vdi", {"at_bytes": MIB}),
    ("VM.create", {"stage": "after"}),
    ("VBD.create", {"stage": "after"}),
    ("VM.snapshot", {"stage": "after"}),
    ("VM.set_name_label", {"stage": "after"}),
]


async def test_a_first_transfer_that_dies_anywhere(tmp_path: Path) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        for stage in CREATE:
            await die_at(pair, stage)
        await pair.good()
        (ref,) = pair.vms()
        assert pair.digests(ref) == pair.live()
        assert len(pair.replicas()) == 1
        await pair.quiet()
        assert len([1 for _, vdi in pair.there.store.all("VDI") if vdi["managed"]]) == 2


async def test_a_full_replication_that_dies_is_known_by_the_mark_it_got_early(
    tmp_path: Path,
) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        await die_at(pair, ("VM.add_tags", {"stage": "after"}), mode="full")
        (left,) = pair.vms()
        assert pair.vm(left)["name_label"] == "[Importing…] [XO Backup lab job] vm1"
        await pair.good(mode="full")
        (ref,) = pair.vms()
        assert pair.digests(ref) == pair.live()
        await pair.quiet()


async def test_an_import_is_marked_while_it_goes_on(tmp_path: Path) -> None:
    """Should we die when the host has it all and we have not heard so."""
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        gate = pair.there.pause_at("/import", at_bytes=3 * MIB)
        task = pair.start(mode="full")
        await gate.reached()
        run = {ownership.RUN: task.id, ownership.PROXY: pair.house.services.installation}
        await until(
            lambda: (
                run.items() <= pair.vm(pair.vms()[0])["other_config"].items()
                and is_importing(pair.vm(pair.vms()[0])["name_label"])
            )
        )
        gate.release()
        outcome = await pair.house.outcome(task)
        assert outcome.status == "success", outcome.snapshot
        await pair.quiet()


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_marks_on_a_replica_that_is_complete_are_taken_off(tmp_path: Path, mode: str) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        await die_at(pair, ("VM.set_name_label", {"nth": 2, "stage": "after"}), mode=mode)
        await pair.good(mode=mode)
        await pair.quiet()
        points = [pair.digests(ref) for ref in (pair.replicas() or pair.vms())]
        assert points
        assert points == [pair.live()] * len(points)


@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_disks_of_an_old_replica_that_was_being_deleted_are_swept(
    tmp_path: Path, mode: str
) -> None:
    async with open_pair(tmp_path, disk_size=4 * MIB) as pair:
        keep: dict[str, Any] = {"mode": mode, "settings": {"copyRetention": 1}}
        await pair.good(**keep)
        pair.change(1, 1)
        await die_at(pair, ("VM.destroy", {"stage": "after"}), **keep)
        assert len(pair.orphans()) == 1
        await pair.good(**keep)
        assert pair.orphans() == []
        assert len(pair.vms()) == 1
        await pair.quiet()
