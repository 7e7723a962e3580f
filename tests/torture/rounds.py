"""One round after the other: something is begun, and mostly killed."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import trio

from tests.torture.programs import ROOT_TASK_WAIT, Daemon, Pool
from tests.torture.reading import digests, metadata_of, unexplained

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["delta", "full", "restore"]
Ending = Literal["kill", "cancel", "end"]

REMOTES = {"files": "", "directories": "?useVhdDirectory=true"}
RETENTION = 2
JOBS: dict[Kind, str] = {
    "delta": "d3a0d3a0-0000-4000-8000-00000000000d",
    "full": "d3a0d3a0-0000-4000-8000-00000000000f",
}


class Broken(Exception):
    """A promise was not kept."""


@dataclass
class Counts:
    """What was done, for the report."""

    rounds: Counter[tuple[Kind, Ending]] = field(default_factory=Counter[tuple[Kind, Ending]])
    read: int = 0
    """Disks that were read back."""
    merges: int = 0
    swept: Counter[str] = field(default_factory=Counter[str])


class Torture:
    def __init__(self, folder: Path, seed: int) -> None:
        self.counts = Counts()
        self.doing = ""
        """What the round is about, for whoever reads that it failed."""
        self._folder = folder
        self._random = random.Random(seed)
        self._seconds: dict[Kind, float] = defaultdict(lambda: 2.0)
        """How long a run of each kind took lately when it was let alone."""
        self._known: dict[str, dict[str, str]] = {name: {} for name in REMOTES}
        """The mode of each backup that is on a remote, by id."""
        self._restorable: list[list[str]] = []
        """The digests of the disks of every backup that ever was."""
        for name in REMOTES:
            (folder / name).mkdir()
        self.pool = Pool(folder, seed)
        self.daemon = Daemon(folder)

    def close(self) -> None:
        self.daemon.end()
        self.pool.end()

    # -- rounds ------------------------------------------------------------------------------

    def round(self) -> None:
        """Begin something, end it somehow, check everything."""
        picked = self._random
        kind: Kind = picked.choices(("delta", "full", "restore"), (6, 2, 3))[0]
        ending: Ending = picked.choices(("kill", "cancel", "end"), (6, 2, 2))[0]
        share = picked.uniform(0, 1.1)
        if kind == "restore" and not any(self._known.values()):
            kind = "delta"
        self.doing = f"{kind}, {ending} at {share:.3f} of {self._seconds[kind]:.2f} s"
        self.counts.rounds[kind, ending] += 1
        task = self._begin(kind)
        if ending == "end":
            self._let_end(kind, task)
            return
        time.sleep(share * self._seconds[kind])
        if ending == "cancel":
            self._cancel(task)
            self._check_backups()
        else:
            self._kill(task)

    def last(self) -> None:
        """The healthy runs behind all rounds: nothing may be left."""
        for kind in JOBS:
            self.doing = f"the last {kind} run"
            self._let_end(kind, self._begin(kind))
        state = self.pool.ask("state")
        if set(state) != {"bases"}:
            raise Broken(f"left behind the last run: {state}")

    def _begin(self, kind: Kind) -> str:
        method, params = self._restore() if kind == "restore" else self._backup(kind)
        return str(self.daemon.call(method, **params))

    def _kill(self, task: str) -> None:
        self.daemon.end()
        self._check_backups()  # as a restore would read them before any recovery
        self.daemon = Daemon(self._folder)
        try:
            status = self.daemon.call("task.get", taskId=task)["status"]
        except LookupError:
            return  # killed before it was written down
        if status not in ("interrupted", "success"):
            raise Broken(f"the task of the killed life is {status}")

    def _cancel(self, task: str) -> None:
        try:
            self.daemon.call("task.cancel", taskId=task)
        except LookupError as error:
            if "EFINISHED" not in str(error):
                raise
        found = self._ended(task)
        if found["status"] not in ("canceled", "success"):
            raise Broken(f"the cancelled task is {found['status']}: {_errors(found)}")
        self._note(found)

    def _let_end(self, kind: Kind, task: str) -> None:
        began = time.monotonic()
        found = self._ended(task)
        self._seconds[kind] = time.monotonic() - began
        if found["status"] != "success":
            raise Broken(f"the run ended as {found['status']}: {_errors(found)}")
        self._note(found)
        self._check_backups()
        self._check_left(kind)

    def _ended(self, task: str) -> dict[str, Any]:
        until = time.monotonic() + ROOT_TASK_WAIT
        while (found := self.daemon.call("task.get", taskId=task))["status"] == "pending":
            if time.monotonic() > until:
                raise Broken(f"the task did not end: {found}")
            time.sleep(0.05)
        return dict(found)

    def _note(self, task: dict[str, Any]) -> None:
        for each in _walk(task):
            self.counts.merges += each["data"]["name"] == "merge"
            for info in each["data"].get("infos", []):
                for one in info.get("data", {}).get("swept", []):
                    self.counts.swept[one["type"]] += 1

    # -- calls -------------------------------------------------------------------------------

    def _remote(self, name: str) -> dict[str, str]:
        url = f"file://{self._folder / name}{REMOTES[name]}"
        return {"id": name, "name": name, "url": url}

    def _backup(self, kind: Kind) -> tuple[str, dict[str, Any]]:
        remotes = list(REMOTES) if kind == "delta" else ["files"]
        settings = {
            "concurrency": self._random.choice((1, 2)),
            "preferNbd": self._random.random() < 0.4,
            "fullInterval": self._random.choice((0, 0, 4)),
            "exportRetention": RETENTION,
        }
        return "backup.run", {
            "job": {
                "id": JOBS[kind],
                "name": kind,
                "type": "backup",
                "mode": kind,
                "compression": "",
                "vms": {"id": {"__or": self.pool.vms}},
                "remotes": {"id": {"__or": remotes}},
                "settings": {"": settings},
            },
            "schedule": {"id": "schedule"},
            "remotes": {name: self._remote(name) for name in remotes},
            "xapis": {"pool": self.pool.spec},
            "recordToXapi": dict.fromkeys(self.pool.vms, "pool"),
        }

    def _restore(self) -> tuple[str, dict[str, Any]]:
        name, backup = self._random.choice(
            [(name, backup) for name in REMOTES for backup in sorted(self._known[name])]
        )
        differential = self._random.random() < 0.3
        self.doing += f" of {name} {backup} ({self._known[name][backup]}, {differential=})"
        return "backup.importVmBackup", {
            "backupId": backup,
            "remote": self._remote(name),
            "srUuid": self._random.choice(self.pool.described["srs"]),
            "xapi": self.pool.spec,
            "settings": {
                "newMacAddresses": True,
                "useDifferentialRestore": differential,
            },
        }

    # -- checks ------------------------------------------------------------------------------

    def _check_backups(self) -> None:
        """Each backup is byte for byte what its snapshot was, and none is missing."""
        for name in REMOTES:
            found = trio.run(digests, self._folder / name)
            uuids = [uuid for disks in found.values() for uuid in disks]
            truth = self.pool.ask("digests", uuids=uuids)
            for backup, disks in found.items():
                wrong = [uuid for uuid, digest in disks.items() if truth[uuid] != digest]
                if wrong or len(disks) != 2:
                    raise Broken(f"{name} {backup}: wrong disks {wrong} of {sorted(disks)}")
                self.counts.read += len(disks)
                if sorted(disks.values()) not in self._restorable:
                    self._restorable.append(sorted(disks.values()))
            self._check_none_missing(name, set(found))

    def _check_none_missing(self, name: str, found: set[str]) -> None:
        metadata = metadata_of(self._folder / name)
        now = {backup: str(metadata[backup]["mode"]) for backup in found}
        left = _by_vm_and_mode(now)
        for key, before in _by_vm_and_mode(self._known[name]).items():
            youngest = before[-(RETENTION - 1) :]
            if len(left[key]) < min(RETENTION, len(before)) or not set(youngest) <= set(left[key]):
                raise Broken(f"{name}: of {before} only {left[key]} are left")
        self._known[name] = now

    def _check_left(self, kind: Kind) -> None:
        """After a healthy run: what it, and all that died before it, left."""
        self._check_made()
        state = self.pool.ask("state")
        bases = state.pop("bases", [])
        if kind == "delta" and sorted(bases) != sorted(self.pool.vms):
            raise Broken(f"one base for each VM, not {bases}")
        others = state.pop("other snapshots", []) + state.pop("vdis", [])
        # a job prunes its own, whatever became of the run that made them
        if set(others) - set(JOBS.values()) or (kind != "restore" and JOBS[kind] in others):
            raise Broken(f"snapshots and disks that should be gone, of jobs {others}")
        if kind == "restore":  # what lies on the VMs of a job waits for their next run
            state = {key: state[key] for key in ("importing", "unfinished") if key in state}
        if state:
            raise Broken(f"left on the pool: {state}")
        remotes = {"delta": list(REMOTES), "full": ["files"], "restore": []}[kind]
        for name in remotes:
            found = unexplained(self._folder / name)
            if kind == "full":  # it leaves merges to the runs that make what is merged
                found = [each for each in found if "/vdis/" not in each]
            if found:
                raise Broken(f"left on {name}: {found}")

    def _check_made(self) -> None:
        """Each VM of a restore is finished and equal to some backup."""
        for vm in self.pool.ask("made"):
            if vm["digests"] not in self._restorable:
                raise Broken(f"a restored VM is like no backup: {vm}")
            self.pool.ask("forget", vm=vm["ref"])


def _walk(task: dict[str, Any]) -> list[dict[str, Any]]:
    return [task, *(each for child in task.get("tasks", []) for each in _walk(child))]


def _errors(task: dict[str, Any]) -> list[Any]:
    return [
        (each["data"]["name"], each["data"].get("error"))
        for each in _walk(task)
        if each["status"] not in ("success", "pending")
    ]


def _by_vm_and_mode(backups: dict[str, str]) -> defaultdict[tuple[str, str], list[str]]:
    """The backups of one VM and mode, sorted by time."""
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for backup, mode in sorted(backups.items()):
        found[backup.split("/")[2], mode].append(backup)
    return found
