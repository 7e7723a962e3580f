"""All that a run does to a pool for a time: left by a dead run it is undone, else never touched."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.errors import XapiError
from proxy.jobs import Services, open_services
from proxy.jobs.sweep import Fate, Report, sweep_pool
from proxy.simulator import SimulatedPool, serve
from proxy.tasks import open_tasks
from proxy.xapi import Xapi, XapiOptions, connect, migration, ownership
from proxy.xapi.ownership import Owner
from proxy.xapi.snapshots import TEMPORARY_NAME

from .conftest import House, open_house
from .test_sweep import dead_run, exists, good_run, make_disk, make_vm, swept

MIB = 1024 * 1024
OURS = "ours"


@dataclass
class Litter:
    """One of everything that a run of ``owner`` may leave, and how to see that it is undone."""

    pool: SimulatedPool
    owner: Owner
    vm: str = "vm1"
    """A VM that is blocked."""
    halted: str = "vm2"
    """A VM that was shut down."""
    undone: dict[str, Callable[[], bool]] = field(default_factory=dict[str, Callable[[], bool]])

    def scatter(self) -> Litter:
        marks = self.owner.marks
        self._objects(marks)
        self._interventions()
        self._tasks(marks)
        return self

    def _objects(self, marks: dict[str, str]) -> None:
        pool = self.pool
        vm, disk = make_vm(pool, marks)
        self.undone["half-made VM"] = lambda: exists(pool, vm, disk) == [False, False]
        test_vm, test_disk = make_vm(pool, marks, "Health Check - vm9")
        pool.store.update("VM", test_vm, power_state="Running", blocked_operations={})
        for kind, ref in (("VM", test_vm), ("VDI", test_disk)):
            uuid = pool.store.get(kind, ref)["uuid"]
            pool.do(f"{kind}.add_to_other_config", ref, ownership.HEALTH_CHECK, uuid)
        self.undone["health check"] = lambda: exists(pool, test_vm, test_disk) == [False, False]
        lone = make_disk(pool, marks, "[Importing…] vm9_0")
        self.undone["half-made disk"] = lambda: exists(pool, lone) == [False]
        snapshot = pool.do("VM.snapshot", pool.vm(self.vm), TEMPORARY_NAME)
        for key, value in marks.items():
            pool.do("VM.add_to_other_config", snapshot, key, value)
        self.undone["snapshot"] = lambda: exists(pool, snapshot) == [False]

    def _interventions(self) -> None:
        pool, owner = self.pool, self.owner
        vm, halted = pool.vm(self.vm), pool.vm(self.halted)
        key = ownership.BLOCKED + owner.run
        mark = f"{owner.installation}/{pool.vm_uuid(self.vm)}"
        if key not in pool.store.get("VM", vm)["other_config"]:
            pool.do("VM.add_to_other_config", vm, key, mark)
        for operation in migration.OPERATIONS:
            if operation not in pool.store.get("VM", vm)["blocked_operations"]:
                pool.do("VM.add_to_blocked_operations", vm, operation, migration.REASON)
        self.undone["block"] = lambda: key not in pool.store.get("VM", vm)["other_config"]
        if pool.store.get("VM", halted)["power_state"] == "Running":
            pool.do("VM.hard_shutdown", halted)
        value = ownership.shut_down_mark(owner, pool.vm_uuid(self.halted))
        if ownership.SHUT_DOWN not in pool.store.get("VM", halted)["other_config"]:
            pool.do("VM.add_to_other_config", halted, ownership.SHUT_DOWN, value)
        self.undone["shut-down"] = lambda: (
            pool.store.get("VM", halted)["power_state"] == "Running"
            and ownership.SHUT_DOWN not in pool.store.get("VM", halted)["other_config"]
        )

    def _tasks(self, marks: dict[str, str]) -> None:
        pool = self.pool
        task = pool.do("task.create", "[XO] VM export", "")
        pool.do("task.set_other_config", task, marks)
        pool.tasks.succeed(task)
        disk = pool.vms.disks(pool.do("VM.snapshot", pool.vm(self.vm), "a committed one"))[0]
        drive = pool.disks.attach_to_dom0(disk, task=task)
        self.undone["task"] = lambda: pool.store.find("task", task) is None
        self.undone["attached disk"] = lambda: pool.store.find("VBD", drive) is None

    def left(self) -> list[str]:
        return [kind for kind, is_undone in self.undone.items() if not is_undone()]


@pytest.fixture
async def pool() -> AsyncIterator[SimulatedPool]:
    made = SimulatedPool.small(vms=4, disk_size=2 * MIB)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, made)
        yield made
        nursery.cancel_scope.cancel()


def options(pool: SimulatedPool) -> XapiOptions:
    return XapiOptions.from_record(
        {
            "url": pool.url,
            "credentials": {"username": "root", "password": "simulated"},
            "allowUnauthorized": True,
        },
        {},
    )


FATES = {"dead": Fate.DEAD, "live": Fate.LIVE, "well": Fate.WELL}


async def fates(run: str) -> Fate:
    return FATES.get(run.partition("-")[0], Fate.UNKNOWN)


async def sweep(pool: SimulatedPool, *, dry_run: bool = False, installation: str = OURS) -> Report:
    async with connect(options(pool)) as xapi:
        with ownership.acting_for(Owner(installation, "the-sweep"), lambda run: "live" in run):
            return await sweep_pool(xapi, installation, fates, dry_run=dry_run)


def state(pool: SimulatedPool) -> dict[str, Any]:
    """Everything that a client can see and change."""
    kinds = ("VM", "VDI", "VBD", "VIF", "task")
    return {ref: copy.deepcopy(r) for kind in kinds for ref, r in pool.store.all(kind)}


# -- what goes ----------------------------------------------------------------------------------


async def test_everything_that_a_dead_run_left_is_undone(pool: SimulatedPool) -> None:
    litter = Litter(pool, Owner(OURS, "dead-1")).scatter()
    before = state(pool)
    planned = await sweep(pool, dry_run=True)
    assert state(pool) == before, "a dry run changes nothing"
    report = await sweep(pool)
    assert litter.left() == []
    assert pool.store.get("VM", pool.vm("vm1"))["blocked_operations"] == {}
    assert (report.left, report.errors) == ([], [])
    assert sorted(one["type"] for one in report.swept) == [
        *("VBD", "VDI", "VM", "VM", "VM"),
        *("blocked_operations", "shutdown", "task"),
    ]
    assert {one["run"] for one in report.swept} == {"dead-1"}
    assert all(one["reason"] and one["uuid"] and "name" in one for one in report.swept)

    def key(entry: Mapping[str, str]) -> tuple[str, str]:
        return entry["type"], entry["uuid"]

    assert sorted(planned.swept, key=key) == sorted(report.swept, key=key)
    assert (await sweep(pool)).swept == []


@pytest.mark.parametrize(
    ("installation", "run", "reason"),
    [
        (OURS, "live-1", str(Fate.LIVE)),
        (OURS, "well-1", str(Fate.WELL)),
        (OURS, "forgotten-1", str(Fate.UNKNOWN)),
        ("another", "dead-1", "another installation made it"),
    ],
)
async def test_whatever_is_not_of_a_dead_run_of_ours_stays(
    pool: SimulatedPool, installation: str, run: str, reason: str
) -> None:
    litter = Litter(pool, Owner(installation, run)).scatter()
    before = state(pool)
    report = await sweep(pool)
    if run == "well-1":  # its undo failed, which cannot be told from a user's wish by power alone
        assert [one["type"] for one in report.swept] == ["blocked_operations"]
        assert "shut-down" in litter.left()
    else:
        assert report.swept == []
        assert state(pool) == before
    assert {one["reason"].partition("; ")[2] for one in report.left} == {reason}
    objects = [one for one in report.left if one["type"] in ("VM", "VDI")]
    assert len(objects) >= 4


def job_keys(pool: SimulatedPool, vm: str) -> dict[str, str]:
    return {
        ownership.JOB: "job",
        ownership.SCHEDULE: "schedule",
        ownership.VM: pool.vm_uuid(vm),
        ownership.DATETIME: "20261124T10:00:00Z",
    }


async def test_weakness_5_replicas_that_were_not_finished_are_removed(pool: SimulatedPool) -> None:
    """Upstream looks for them and then never calls what would destroy them."""
    keys = {**job_keys(pool, "vm1"), **Owner(OURS, "dead-1").marks}
    vm, disk = make_vm(pool, keys, "[Importing…] vm1")
    lone = make_disk(pool, keys, "[Importing…] vm1_1")
    done, its_disk = make_vm(pool, job_keys(pool, "vm1"), "vm1 - job - (20261124T100000Z)")
    report = await sweep(pool)
    assert report.errors == []
    assert exists(pool, vm, disk, lone, done, its_disk) == [False, False, False, True, True]


async def test_weakness_28_the_sources_own_snapshots_are_never_removed(
    pool: SimulatedPool,
) -> None:
    """Upstream takes them for copies that broke off, when the replicas' SR is in their pool."""
    kept: list[str] = []
    for date in ("20261124T10:00:00Z", "19700101T000000Z"):
        snapshot = pool.do("VM.snapshot", pool.vm("vm1"), "[XO Backup job] vm1")
        keys = {**job_keys(pool, "vm1"), ownership.DATETIME: date, **Owner(OURS, "dead-1").marks}
        for ref, kind in [(snapshot, "VM"), *((d, "VDI") for d in pool.vms.disks(snapshot))]:
            pool.store.update(kind, ref, other_config=keys)
            kept.append(ref)
    Litter(pool, Owner(OURS, "dead-1")).scatter()
    report = await sweep(pool)
    assert report.errors == []
    assert exists(pool, *kept) == [True] * len(kept)


async def test_only_what_names_the_very_vm_is_undone(pool: SimulatedPool) -> None:
    """A user cloned VMs that we had blocked and shut down."""
    Litter(pool, Owner(OURS, "dead-1")).scatter()
    clones = [
        pool.do("VM.clone", pool.vm("vm2"), "clone"),
        pool.do("VM.clone", pool.vm("vm2"), "b"),
    ]
    mark = f"{OURS}/{pool.vm_uuid('vm1')}"
    pool.do("VM.add_to_other_config", clones[0], ownership.BLOCKED + "dead-1", mark)
    pool.do("VM.add_to_blocked_operations", clones[0], "pool_migrate", migration.REASON)
    before = [pool.store.get("VM", clone) for clone in clones]
    assert all(ownership.SHUT_DOWN in one["other_config"] for one in before)
    await sweep(pool)
    assert [pool.store.get("VM", clone) for clone in clones] == before


async def test_a_live_vm_that_is_called_like_an_unfinished_one_stays(
    pool: SimulatedPool,
) -> None:
    """A run died while it took its snapshot: VM and snapshot carry the same marks."""
    owner = Owner(OURS, "dead-1")
    vm = pool.vm("vm2")
    pool.do("VM.hard_shutdown", vm)
    pool.do("VM.set_name_label", vm, "[Importing…] what another tool left")
    mark = f"{OURS}/{pool.vm_uuid('[Importing…] what another tool left')}"
    for key, value in {**owner.marks, ownership.BLOCKED + owner.run: mark}.items():
        pool.do("VM.add_to_other_config", vm, key, value)
    snapshot = pool.do("VM.snapshot", vm, TEMPORARY_NAME)
    report = await sweep(pool)
    assert exists(pool, vm, snapshot, *pool.vms.disks(vm)) == [True, False, True]
    (left,) = report.left
    assert "the VM that was backed up" in left["reason"]


async def test_a_vm_that_its_owner_started_again_is_only_unmarked(pool: SimulatedPool) -> None:
    Litter(pool, Owner(OURS, "dead-1")).scatter()
    pool.do("VM.start", pool.vm("vm2"), False, False)
    starts = sum(call.method == "Async.VM.start" for call in pool.calls.log)
    await sweep(pool)
    assert ownership.SHUT_DOWN not in pool.store.get("VM", pool.vm("vm2"))["other_config"]
    assert sum(call.method == "Async.VM.start" for call in pool.calls.log) == starts


def _never(run: str) -> bool:
    return not run


@pytest.mark.parametrize("other", ["live-2", "another"])
async def test_a_block_that_another_run_needs_stays(pool: SimulatedPool, other: str) -> None:
    Litter(pool, Owner(OURS, "dead-1")).scatter()
    installation = "another" if other == "another" else OURS
    now = "9zzzzzzzz-2" if other == "another" else other  # of today: its id says when it began
    mark = f"{installation}/{pool.vm_uuid('vm1')}"
    pool.do("VM.add_to_other_config", pool.vm("vm1"), ownership.BLOCKED + now, mark)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migration, "_is_over", _never)
        report = await sweep(pool)
    assert report.errors == []
    record = pool.store.get("VM", pool.vm("vm1"))
    assert record["blocked_operations"] == dict.fromkeys(migration.OPERATIONS, migration.REASON)
    assert [owner.run for owner in ownership.blocked_by(record)] == [now]


async def test_a_task_at_work_is_stopped_first(pool: SimulatedPool) -> None:
    """The host still exports to a client that it takes for alive."""
    snapshot = pool.do("VM.snapshot", pool.vm("vm1"), "a committed one")
    gate = pool.pause_at("/export", at_bytes=MIB)
    async with connect(options(pool)) as dying:
        dying._destroy_task = _nothing  # type: ignore[method-assign]
        with ownership.acting_for(Owner(OURS, "dead-1")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_export, dying, snapshot)
                with trio.fail_after(10):
                    await gate.reached()
                drives = [r for _, r in pool.store.all("VBD") if r["VM"] == pool.dom0]
                assert len(drives) == 1
                report = await sweep(pool)
                nursery.cancel_scope.cancel()
    assert (report.left, report.errors) == ([], [])
    assert [one["type"] for one in report.swept] in (["task"], ["VBD", "task"])
    assert not [r for _, r in pool.store.all("VBD") if r["VM"] == pool.dom0]
    assert pool.snapshots() == [snapshot]


async def _nothing(task: object) -> None:
    """What a dead client does."""


async def _export(xapi: Xapi, snapshot: str) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(20):
        try:
            async with xapi.export_vm(snapshot, compression="none") as body:
                buffer = memoryview(bytearray(MIB))
                while await body.read_into(buffer):
                    pass
        except Exception:  # noqa: BLE001  it dies: that is what this is about
            pass


async def test_a_task_that_no_host_ends_is_left_and_told(
    pool: SimulatedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.jobs.sweep.pool_sweep._TASK_SECONDS", 0.05)
    task = pool.do("task.create", "[XO] VM export", "")
    pool.do("task.set_other_config", task, Owner(OURS, "dead-1").marks)
    report = await sweep(pool)
    assert [(one["type"], one["reason"]) for one in report.left] == [
        ("task", "a task of a transfer; no host has ended it yet")
    ]
    assert (report.swept, report.errors) == ([], [])


@pytest.mark.parametrize(
    "keys", [{}, {"task_id": "OpaqueRef:gone"}, {"task_id": "theirs"}, {"task_id": "live"}]
)
async def test_disks_that_others_attached_stay(pool: SimulatedPool, keys: dict[str, str]) -> None:
    """An NBD client, a task that is gone, another installation, a live run of ours."""
    Litter(pool, Owner(OURS, "dead-1")).scatter()
    tasks = {
        name: pool.do("task.create", "[XO] VM export", "")
        for name, _ in (("theirs", 0), ("live", 0))
    }
    pool.do("task.set_other_config", tasks["theirs"], Owner("another", "dead-1").marks)
    pool.do("task.set_other_config", tasks["live"], Owner(OURS, "live-1").marks)
    disk = pool.vms.disks(pool.do("VM.snapshot", pool.vm("vm3"), "s"))[0]
    drive = pool.disks.attach_to_dom0(disk)
    pool.store.update("VBD", drive, other_config={k: tasks.get(v, v) for k, v in keys.items()})
    await sweep(pool)
    record = pool.store.find("VBD", drive)
    assert record is not None
    assert record["currently_attached"]


@pytest.mark.parametrize("code", ["DEVICE_DETACH_REJECTED", "DEVICE_DETACH_TIMEOUT"])
async def test_a_disk_that_a_control_domain_has_open_stays(pool: SimulatedPool, code: str) -> None:
    litter = Litter(pool, Owner(OURS, "dead-1")).scatter()
    pool.fail("VBD.unplug", error=(code, "VBD", "it", "in use"))
    report = await sweep(pool)
    assert litter.left() == ["task", "attached disk"], "the task tells whose disk it is"
    (left,) = report.left
    assert left["type"] == "VBD"
    assert "it is in use" in left["reason"]
    assert report.errors == []
    assert not any(call.method == "VBD.unplug_force" for call in pool.calls.log)


async def test_what_goes_or_changes_meanwhile_is_no_trouble(pool: SimulatedPool) -> None:
    """Between the reading of everything and the touching of one."""
    litter = Litter(pool, Owner(OURS, "dead-1")).scatter()
    vm = next(ref for ref, r in pool.store.all("VM") if r["name_label"].startswith("[Importing"))
    snapshot = next(r for r in pool.snapshots() if _name(pool, r) == TEMPORARY_NAME)
    gate = pool.pause_at("VM.get_all_records", stage="after")

    async def interfere() -> None:
        await gate.reached()
        pool.do("VM.set_name_label", vm, "mine now")
        pool.do("VM.destroy", snapshot)
        pool.do("VM.remove_from_other_config", pool.vm("vm2"), ownership.SHUT_DOWN)
        gate.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interfere)
        report = await sweep(pool)
    assert report.errors == []
    assert exists(pool, vm) == [True]
    assert pool.store.get("VM", pool.vm("vm2"))["power_state"] == "Halted"
    assert set(litter.left()) == {"half-made VM", "shut-down"}
    assert {one["reason"].partition("; ")[2] for one in report.left} == {
        "somebody has changed it just now",
        "the VM mine now has it",  # its disk
    }


def _name(pool: SimulatedPool, ref: str) -> str:
    return str(pool.store.get("VM", ref)["name_label"])


# -- interrupted sweeps -------------------------------------------------------------------------


async def calls_of_a_sweep() -> list[tuple[str, int]]:
    """Each call that a sweep makes, with how many of that name it is."""
    made = SimulatedPool.small(vms=4, disk_size=2 * MIB)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, made)
        Litter(made, Owner(OURS, "dead-1")).scatter()
        await sweep(made)
        nursery.cancel_scope.cancel()
    counted: dict[str, int] = {}
    found: list[tuple[str, int]] = []
    for call in made.calls.log:
        name = call.method.removeprefix("Async.")
        counted[name] = counted.get(name, 0) + 1
        if not name.startswith(("session.", "event.", "pool.get_all")):
            found.append((name, counted[name]))
    return found


@pytest.mark.parametrize("how", ["error", "cancel"])
async def test_a_sweep_that_ends_anywhere_can_be_run_again(how: str) -> None:
    calls = await calls_of_a_sweep()
    assert len(calls) > 40
    last = dict(calls)
    calls = [call for call in calls if call[1] in (1, last[call[0]])]
    if how == "cancel":  # a cut between two looks is one between two changes
        calls = [call for call in calls if ".get_" not in call[0]]
        assert len(calls) > 15
    for method, nth in calls:
        made = SimulatedPool.small(vms=4, disk_size=2 * MIB)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, made)
            litter = Litter(made, Owner(OURS, "dead-1")).scatter()
            if how == "error":
                await _sweep_with_an_error(made, method, nth)
            else:
                await _sweep_cut_at(made, method, nth)
            made.faults.clear()
            report = await sweep(made)
            assert (litter.left(), report.errors) == ([], []), (method, nth)
            record = made.store.get("VM", made.vm("vm1"))
            assert record["blocked_operations"] == {}, (method, nth)
            nursery.cancel_scope.cancel()


async def _sweep_with_an_error(pool: SimulatedPool, method: str, nth: int) -> None:
    if nth > 1:
        pool.fail(method, times=nth - 1)
    pool.fail(method, error=("INTERNAL_ERROR", "no"))
    with contextlib.suppress(XapiError):  # of the lists that it begins with
        await sweep(pool)


async def _sweep_cut_at(pool: SimulatedPool, method: str, nth: int) -> None:
    gate = pool.pause_at(method, nth=nth, stage="after")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sweep, pool)
            await gate.reached()
            nursery.cancel_scope.cancel()
            gate.release()  # the host does what it was told


# -- two daemons on one pool --------------------------------------------------------------------


@asynccontextmanager
async def second_daemon(house: House) -> AsyncIterator[House]:
    """Another installation, on the same pool and the same remotes."""
    async with trio.open_nursery() as nursery:
        async with (
            open_tasks(str(house.root / "second.db"), nursery) as tasks,
            open_services(lambda: house.services.config, tasks, nursery) as services,
        ):
            try:
                yield House(house.pool, services, house.root, house.remotes)
            finally:
                services.cancel_all("the test is over")
                with trio.CancelScope(shield=True), trio.move_on_after(10):
                    await services.wait_idle()
        nursery.cancel_scope.cancel()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(SimulatedPool.small(vms=4, disk_size=4 * MIB), tmp_path) as opened:
        yield opened


async def test_two_daemons_on_one_pool_sweep_only_their_own(house: House) -> None:
    pool = house.pool
    async with second_daemon(house) as other:
        daemons: list[Services] = [house.services, other.services]
        assert daemons[0].installation != daemons[1].installation
        dead = [await dead_run(house), await dead_run(other)]
        gate = pool.pause_at("/export", at_bytes=MIB)
        live = house.services.start_backup(house.request(vms=[pool.vm_uuid("vm3")], id="live"))
        with trio.fail_after(10):
            await gate.reached()
        litters = [
            Litter(pool, Owner(daemon.installation, run), vm, halted).scatter()
            for daemon, run, vm, halted in (
                (daemons[0], dead[0], "vm1", "vm2"),
                (daemons[1], dead[1], "vm2", "vm4"),
            )
        ]
        # of a live run of the first, and of one of the second that only it knows
        of_live = Litter(pool, Owner(daemons[0].installation, live.id), "vm3", "vm4").scatter()
        everything = set(litters[1].left())
        outcome = await other.run(other.request(remotes=("remote2",)))
        assert outcome.status == "success", outcome.snapshot
        assert litters[1].left() == []
        assert {one["run"] for one in swept(outcome)} == {dead[1]}
        assert set(litters[0].left()) == everything, "of the other installation"
        assert set(of_live.left()) >= everything - {"shut-down"}
        blocked = pool.store.get("VM", pool.vm("vm3"))["blocked_operations"]
        assert set(blocked) == set(migration.OPERATIONS), "the live run still needs it"
        await dead_run(house)
        again = await house.run(house.request(vms=[pool.vm_uuid("vm4")], id="second"))
        assert again.status == "success", again.snapshot
        assert litters[0].left() == []
        assert {one["run"] for one in swept(again)} == {dead[0]}
        assert set(of_live.left()) >= everything - {"shut-down"}
        gate.release()
        assert (await house.outcome(live)).status == "success"


async def test_a_live_run_of_this_daemon_is_not_disturbed(house: House) -> None:
    """It is swept at every moment of the run, by a run that comes."""
    pool = house.pool
    stages: dict[str, dict[str, Any]] = {
        "VM.snapshot": {"stage": "after"},
        "VM.set_name_label": {"stage": "before"},
        "/export": {"at_bytes": MIB},
    }
    for point, where in stages.items():
        gate = pool.pause_at(point, **where)
        task = house.services.start_backup(house.request())
        with trio.fail_after(10):
            await gate.reached()
        async with connect(options(pool)) as xapi:
            report = await house.services.sweeper.sweep_pool(xapi, dry_run=False)
        assert (report.swept, report.errors) == ([], [])
        gate.release()
        assert (await house.outcome(task)).status == "success"
    await house.clean()


async def test_what_was_finished_carries_no_mark(house: House) -> None:
    """A restored VM, with its disks; also one whose archive holds what was being done to it."""
    pool = house.pool
    pool.do("VM.hard_shutdown", pool.vm("vm1"))
    vm = pool.vm("vm1")
    pool.do("VM.add_to_other_config", vm, ownership.BLOCKED + "0mwv00000-x", "another/of-another")
    await house.run(house.request(settings={"offlineBackup": True}))
    before = {ref for ref, _ in pool.store.all("VM")}
    disks = {ref for ref, _ in pool.store.all("VDI")}
    outcome = await house.outcome(await house.restore(house.backups()[0]))
    assert outcome.status == "success", outcome.snapshot
    made = [r for ref, r in pool.store.all("VM") if ref not in before]
    made += [r for ref, r in pool.store.all("VDI") if ref not in disks]
    assert len(made) == 2
    for record in made:
        keys = [key for key in record["other_config"] if key.startswith("xo:backup:")]
        assert keys == [], record["name_label"]
    assert made[0]["blocked_operations"] == {}
    await good_run(house)


# -- random pools -------------------------------------------------------------------------------

RUNS = ("dead-1", "dead-2", "live-1", "well-1", "forgotten-1", "")
NAMES = (TEMPORARY_NAME, "[Importing…] vm", "Health Check - vm", "vm (20261124T120000Z)", "vm")

marked = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["VM", "snapshot", "VDI", "block", "shutdown", "task"]),
        "name": st.sampled_from(NAMES),
        "installation": st.sampled_from([OURS, "another", ""]),
        "run": st.sampled_from(RUNS),
        "state": st.sampled_from(["Halted", "Running", "Suspended"]),
        "is_own": st.booleans(),
    }
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(things=st.lists(marked, max_size=8))
def test_of_random_pools_only_what_dead_runs_of_ours_left_goes(
    things: list[dict[str, Any]],
) -> None:
    trio.run(_random_pool, things)


async def _random_pool(things: list[dict[str, Any]]) -> None:
    pool = SimulatedPool.small(vms=2, disk_size=2 * MIB)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, pool)
        made = [(thing, *_make(pool, thing)) for thing in things]
        before = state(pool)
        report = await sweep(pool)
        assert report.errors == []
        after = state(pool)
        gone = {ref for ref in before if ref not in after and before[ref].get("managed", True)}
        expected: set[str] = set()
        for thing, ref, parts in made:
            if _goes(thing):
                expected |= {ref, *parts}
        assert gone == expected
        for ref, record in after.items():
            if not any(ref == one for _, one, _ in made):
                continue
            thing = next(thing for thing, one, _ in made if one == ref)
            changed = record != before[ref]
            ours = thing["installation"] == OURS and thing["is_own"]
            match thing["kind"]:
                case "block":
                    ended = thing["run"] in ("dead-1", "dead-2", "well-1")
                    assert changed == (ours and ended)
                case "shutdown":
                    assert changed == (ours and thing["run"] in ("dead-1", "dead-2"))
                    if changed:
                        assert record["power_state"] in ("Running", "Suspended")
                case _:
                    assert not changed
        nursery.cancel_scope.cancel()


def _goes(thing: Mapping[str, Any]) -> bool:
    """The rule, said once more."""
    if thing["installation"] != OURS or thing["run"] not in ("dead-1", "dead-2"):
        return False
    name, kind = str(thing["name"]), str(thing["kind"])
    importing = name.startswith("[Importing")
    return {
        "VM": thing["is_own"] or (importing and thing["state"] != "Running"),
        "snapshot": name == TEMPORARY_NAME,
        "VDI": importing or name == TEMPORARY_NAME,
        "task": True,
    }.get(kind, False)


def _make(pool: SimulatedPool, thing: Mapping[str, Any]) -> tuple[str, set[str]]:
    """The thing, and what goes with it."""
    marks = {ownership.PROXY: thing["installation"], ownership.RUN: thing["run"]}
    marks = {key: value for key, value in marks.items() if value}
    match thing["kind"]:
        case "VM":
            vm, disk = make_vm(pool, marks, thing["name"])
            pool.store.update("VM", vm, power_state=thing["state"], blocked_operations={})
            uuid = pool.store.get("VM", vm)["uuid"] if thing["is_own"] else "of another"
            pool.do("VM.add_to_other_config", vm, ownership.HEALTH_CHECK, uuid)
            return vm, {disk, *pool.store.get("VM", vm)["VBDs"]}
        case "snapshot":
            ref = pool.do("VM.snapshot", pool.vm("vm1"), thing["name"])
            pool.do("VM.set_other_config", ref, marks)
            record = pool.store.get("VM", ref)
            devices = {*record["VBDs"], *record["VIFs"]}
            return ref, {*pool.vms.disks(ref), *devices}
        case "VDI":
            return make_disk(pool, marks, thing["name"]), set()
        case "task":
            task = str(pool.do("task.create", "[XO] x", ""))
            pool.do("task.set_other_config", task, marks)
            pool.tasks.succeed(task)
            return task, set()
        case _:
            return _intervene(pool, thing), set()


def _intervene(pool: SimulatedPool, thing: Mapping[str, Any]) -> str:
    vm, _ = make_vm(pool, {}, "a VM of a user")
    uuid = pool.store.get("VM", vm)["uuid"] if thing["is_own"] else "of another"
    if thing["kind"] == "block":
        key, value = ownership.BLOCKED + thing["run"], f"{thing['installation']}/{uuid}"
        blocks = {"pool_migrate": migration.REASON, "start": "by its owner"}
    else:
        owner = Owner(thing["installation"], thing["run"])
        key, value = ownership.SHUT_DOWN, ownership.shut_down_mark(owner, uuid)
        blocks = {}
    pool.store.update("VM", vm, other_config={key: value}, blocked_operations=blocks)
    pool.store.update("VM", vm, power_state=thing["state"])
    return vm
