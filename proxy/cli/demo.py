"""``xo-proxy demo``: what runs do, against a simulated pool, checked.

Everything that is claimed is verified from outside: restored and replicated disks are exported
again and compared byte for byte, and what a cancelled run left is read from the pool over XAPI
and from the remote's folder.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xmlrpc.client
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode, urlsplit

import click
import msgspec
from rich.console import Console
from rich.filesize import decimal

from proxy.cli.client import Client, Stream
from proxy.cli.failures import Failure
from proxy.cli.following import follow_tasks, transfers
from proxy.cli.tasks import outline
from proxy.cli.views import TaskView

if TYPE_CHECKING:
    from collections.abc import Iterator


MIB = 1024 * 1024
DISK = 64 * MIB
FILLED = 44 * MIB  # most of it: an empty disk would be read before it could be cancelled
RATE = 12 * MIB
"""Bytes a second of the simulated pool, slow enough to watch."""
CANCEL_AT = 40
_PATIENCE = 30.0
_TEXT = b"what this VM is for\n"
"""In a file of the VM: to be found in a plain backup, and not in an encrypted one."""


Records = dict[str, dict[str, Any]]


class Described(msgspec.Struct):
    """The line that ``simulate`` prints."""

    url: str
    user: str
    password: str
    srs: list[str]
    vms: list[dict[str, Any]]


@click.command()
@click.option("--keep", is_flag=True, help="Keep the temporary folder and say where it is.")
def demo(keep: bool) -> None:
    """Show a backup, a restore, a mirror, a replication and a cancel, and check each.

    Needs no pool and no root: the pool is simulated, the remote is a temporary folder. Ends
    with exit code 1 when a comparison fails.
    """
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="xo-proxy-demo-"))
    try:
        Demo(folder, console).run()
    finally:
        if keep:
            console.print(f"kept: {folder}", highlight=False)
        else:
            shutil.rmtree(folder, ignore_errors=True)


class Pool:
    """The simulated pool as any XAPI client sees it."""

    def __init__(self, described: Described) -> None:
        self._address = urlsplit(described.url).netloc
        self._server = xmlrpc.client.ServerProxy(described.url, allow_none=True)
        self._session = self._value(
            self._server.session.login_with_password(described.user, described.password)
        )

    @staticmethod
    def _value(answer: Any) -> Any:
        if answer["Status"] != "Success":
            raise Failure(f"the pool answered {answer['ErrorDescription']}")
        return answer["Value"]

    def ask(self, method: str, *args: Any) -> Any:
        return self._value(getattr(self._server, method)(self._session, *args))

    def inventory(self) -> dict[str, list[str]]:
        """Every VM, snapshot and disk, by name and uuid: what a leftover would change."""
        vms = cast("Records", self.ask("VM.get_all_records")).values()
        vdis = cast("Records", self.ask("VDI.get_all_records")).values()
        return {
            "VMs": sorted(_name(vm) for vm in vms if not vm["is_a_snapshot"]),
            "snapshots": sorted(_name(vm) for vm in vms if vm["is_a_snapshot"]),
            "disks": sorted(map(_name, vdis)),
            "blocked operations": sorted(
                f"{operation} of {_name(vm)}"
                for vm in vms
                for operation in vm["blocked_operations"]
            ),
        }

    def first_disk(self, vm_uuid: str) -> str:
        """The reference of a VM's first disk."""
        vm = self.ask("VM.get_record", self.ask("VM.get_by_uuid", vm_uuid))
        drives = [self.ask("VBD.get_record", ref) for ref in vm["VBDs"]]
        disks = sorted((d["userdevice"], d["VDI"]) for d in drives if d["type"] == "Disk")
        return str(disks[0][1])

    def read_disk(self, vdi: str) -> Iterator[bytes]:
        connection = http.client.HTTPConnection(self._address, timeout=_PATIENCE)
        with contextlib.closing(connection):
            query = urlencode({"session_id": self._session, "vdi": vdi, "format": "raw"})
            connection.request("GET", f"/export_raw_vdi/?{query}")
            answer = connection.getresponse()
            if answer.status != 200:
                raise Failure(f"the pool refused to export the disk: {answer.status}")
            while chunk := answer.read(MIB):
                yield chunk


def _name(record: dict[str, Any]) -> str:
    return f"{record['name_label']} ({record['uuid']})"


class Demo:
    def __init__(self, folder: Path, console: Console) -> None:
        self._folder = folder
        self._remote = folder / "remote"
        self._key = secrets.token_hex(16)
        self._console = console
        self._step = 0

    def run(self) -> None:
        began = time.monotonic()
        with contextlib.ExitStack() as ending:
            self._title("A VM with a file system on its disk")
            image = self._image()
            described = self._simulate(ending, image)
            pool = Pool(described)
            vm = str(described.vms[0]["uuid"])
            self._say(f"simulated pool at {described.url}, VM {vm}")

            self._title("The daemon")
            client, daemon = self._serve(ending)
            job = self._job(described, vm)

            self._title("A full backup")
            before = pool.inventory()
            self._check(self._backup(client, job).status == "success", "the backup succeeded")
            self._check(pool.inventory() == before, "the pool is as it was: no snapshot is left")
            identifier = self._list(client)

            self._title("A restore")
            restored = self._restore(client, described, identifier)
            self._compare(pool, restored, image)

            self._title("A mirror of it on an encrypted remote")
            self._check(
                self._backup(client, self._mirror_job()).status == "success", "the mirror succeeded"
            )
            self._check_mirror(client)

            self._title("A replica on a storage of the pool, checked by starting a copy of it")
            replicating = self._replication_job(described, vm)
            ended = self._backup(client, replicating)
            for line in outline(ended):
                self._say(line)
            self._check(ended.status == "success", "the replica was made, and its copy started")
            self._compare(pool, self._only_replica(pool), image)

            self._title(f"A second backup, cancelled at {CANCEL_AT} %")
            before, files = pool.inventory(), self._files()
            ended = self._backup(client, job, cancel_at=CANCEL_AT)
            for line in outline(ended):
                self._say(line)
            self._check(ended.status == "canceled", "the run ended as canceled")
            self._check(pool.inventory() == before, "nothing is left on the pool")
            self._check(self._files() == files, "nothing is left on the remote")
            for name, found in pool.inventory().items():
                self._say(f"{name} on the pool: {', '.join(found) or 'none'}")

            self._title("The end")
            daemon.send_signal(signal.SIGTERM)
            self._check(daemon.wait(_PATIENCE) == 0, "the daemon stopped cleanly")
        self._console.print(f"\n[bold green]Every check held[/], {time.monotonic() - began:.0f} s.")

    # -- output --------------------------------------------------------------------------------

    def _title(self, text: str) -> None:
        self._step += 1
        self._console.print(f"\n[bold]{self._step}. {text}[/]")

    def _say(self, text: str) -> None:
        self._console.print(f"   {text}", highlight=False, markup=False, soft_wrap=True)

    def _check(self, holds: bool, claim: str) -> None:
        if not holds:
            raise Failure(f"not true: {claim}")
        self._console.print(f"   [green]✓[/] {claim}", highlight=False)

    # -- parts ---------------------------------------------------------------------------------

    def _image(self) -> Path:
        """An ext4 image with files in it, made without root."""
        files = self._folder / "files"
        (files / "etc").mkdir(parents=True)
        (files / "etc" / "hostname").write_text("demo\n")
        (files / "notes.txt").write_bytes(_TEXT * 1000)
        (files / "database.bin").write_bytes(os.urandom(FILLED))
        image = self._folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(DISK)
        tool = shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")
        if tool is None:
            raise Failure("mke2fs is missing: install the package e2fsprogs")
        subprocess.run(  # noqa: S603 - constant arguments and our own paths
            [tool, "-q", "-t", "ext4", "-d", str(files), str(image)], check=True
        )
        self._say(f"ext4, {decimal(DISK)}, three files, {decimal(FILLED)} of them random")
        return image

    def _simulate(self, ending: contextlib.ExitStack, image: Path) -> Described:
        options = ["--disk-image", str(image), "--rate", str(RATE)]
        pool = self._start(ending, "simulate", *options)
        return msgspec.json.decode(_line(pool), type=Described)

    def _serve(self, ending: contextlib.ExitStack) -> tuple[Client, subprocess.Popen[str]]:
        token = secrets.token_urlsafe(24)
        config = self._folder / "config.json"
        config.touch(mode=0o600)
        settings = {
            "authenticationToken": token,
            "datadir": "./data",
            "http": {
                "listen": {
                    "https": {"hostname": "127.0.0.1", "port": 0}
                    | {"cert": "./certificate.pem", "key": "./key.pem"}
                }
            },
            "remotes": {"disableFileRemotes": False},
        }
        config.write_text(json.dumps(settings, indent=2))
        daemon = self._start(ending, "serve", "--config", str(config))
        line = _line(daemon).strip()
        self._say(line)
        client = Client(line.removeprefix("listening on "), token)
        ending.callback(client.close)
        self._say(f"version {client.scalar('system.getServerVersion', {})} answers")
        return client, daemon

    def _start(self, ending: contextlib.ExitStack, *command: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("XO_PROXY_")}
        # a user's own configuration must not decide what the demo shows
        environment["XDG_CONFIG_HOME"] = str(self._folder / "no-config")
        log = ending.enter_context((self._folder / f"{command[0]}.log").open("w"))
        process = subprocess.Popen(  # noqa: S603 - this program itself
            [sys.executable, "-m", "proxy", *command],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        ending.callback(_end, process)
        return process

    def _remote_spec(self) -> dict[str, str]:
        return {"id": "demo", "name": "demo", "url": f"file://{self._remote}"}

    def _xapi(self, described: Described) -> dict[str, Any]:
        credentials = {"username": described.user, "password": described.password}
        return {"url": described.url, "credentials": credentials, "allowUnauthorized": True}

    def _job(self, described: Described, vm: str) -> dict[str, Any]:
        job = {
            "id": "d3a0d3a0-0000-4000-8000-000000000001",
            "name": "demo job",
            "type": "backup",
            "mode": "full",
            "compression": "",
            "vms": {"id": {"__or": [vm]}},
            "remotes": {"id": {"__or": ["demo"]}},
            "settings": {"": {}, "demo-schedule": {"exportRetention": 3}},
        }
        return {
            "job": job,
            "schedule": {"id": "demo-schedule"},
            "remotes": {"demo": self._remote_spec()},
            "xapis": {"pool": self._xapi(described)},
            "recordToXapi": {vm: "pool"},
            "streamLogs": True,
        }

    def _mirror_job(self) -> dict[str, Any]:
        return {
            "job": {
                "id": "d3a0d3a0-0000-4000-8000-000000000002",
                "name": "demo mirror",
                "type": "mirrorBackup",
                "mode": "full",
                "sourceRemote": "demo",
                "remotes": {"id": "mirror"},
                "settings": {"demo-schedule": {"exportRetention": 3}},
            },
            "schedule": {"id": "demo-schedule"},
            "remotes": {"demo": self._remote_spec(), "mirror": self._mirror_spec()},
            "xapis": {},
            "recordToXapi": {},
            "streamLogs": True,
        }

    def _mirror_spec(self) -> dict[str, str]:
        key = quote(json.dumps(self._key))
        url = f"file://{self._folder / 'mirror'}?encryptionKey={key}"
        return {"id": "mirror", "name": "mirror", "url": url}

    def _check_mirror(self, client: Client) -> None:
        listed = client.scalar("backup.listVmBackups", {"remotes": {"mirror": self._mirror_spec()}})
        found = [backup for of_vm in listed["mirror"].values() for backup in of_vm]
        self._check(len(found) == 1, "the mirror lists the backup")
        for folder, holds in ((self._remote, True), (self._folder / "mirror", False)):
            files = [path for path in folder.rglob("*.xva") if path.is_file()]
            readable = any(_TEXT in path.read_bytes() for path in files)
            claim = "can" if holds else "cannot"
            self._check(
                bool(files) and readable == holds,
                f"a text of the VM {claim} be read in the archive below {folder.name}",
            )

    def _replication_job(self, described: Described, vm: str) -> dict[str, Any]:
        sr = described.srs[1]
        levels = {"copyRetention": 2, "healthCheckSr": sr}
        return {
            "job": {
                "id": "d3a0d3a0-0000-4000-8000-000000000003",
                "name": "demo replication",
                "type": "backup",
                "mode": "delta",
                "vms": {"id": vm},
                "srs": {"id": sr},
                "settings": {"demo-schedule": levels},
            },
            "schedule": {"id": "demo-schedule", "name": "demo"},
            "remotes": {},
            "xapis": {"pool": self._xapi(described)},
            "recordToXapi": {vm: "pool", sr: "pool"},
            "streamLogs": True,
        }

    def _only_replica(self, pool: Pool) -> str:
        """The uuid of the VM that follows its source; whatever else was made for it is gone."""
        records = cast("Records", pool.ask("VM.get_all_records")).values()
        followers = [
            each["uuid"]
            for each in records
            if not each["is_a_snapshot"] and "Continuous Replication" in each["tags"]
        ]
        self._check(len(followers) == 1, "one replica is on the pool, and its test VM is gone")
        return str(followers[0])

    def _backup(
        self, client: Client, job: dict[str, Any], *, cancel_at: int | None = None
    ) -> TaskView:
        """Run the job, show its progress, cancel it when asked to; the ended root task."""
        root = self._follow(client, "backup.run", job, cancel_at=cancel_at)
        return TaskView.read(client.scalar("task.get", {"taskId": root}))

    def _follow(
        self, client: Client, method: str, params: dict[str, Any], *, cancel_at: int | None = None
    ) -> str:
        """Start a run in a thread and watch its events here; the root task's id."""
        started: list[str] = []
        known = threading.Event()
        failed: list[BaseException] = []

        def read_log() -> None:
            try:
                with client.call(method, params) as reply:
                    if isinstance(reply, Stream):
                        for record in reply.items:
                            if not started:
                                started.append(record["id"])
                                known.set()
            except Failure as error:
                failed.append(error)
            finally:
                known.set()

        reader = threading.Thread(target=read_log, daemon=True)
        reader.start()
        known.wait(_PATIENCE)
        if failed or not started:
            raise failed[0] if failed else Failure(f"{method} did not start")
        asked = False

        def ended(task: TaskView) -> bool:
            nonlocal asked
            if task.id != started[0]:
                return False
            moving = [moved.data.progress for moved, _ in transfers(task)]
            if cancel_at is not None and not asked and moving and max(moving) >= cancel_at:
                client.scalar("task.cancel", {"taskId": task.id})
                asked = True
            return task.status != "pending"

        follow_tasks(client, self._console, until=ended)
        reader.join(_PATIENCE)
        return started[0]

    def _list(self, client: Client) -> str:
        params = {"remotes": {"demo": self._remote_spec()}}
        listed = client.scalar("backup.listVmBackups", params)["demo"]
        found = [backup for of_vm in listed.values() for backup in of_vm]
        self._check(len(found) == 1, "the remote lists one backup")
        for path, size in self._files():
            self._say(f"{decimal(size):>10}  {path}")
        return str(found[0]["id"])

    def _files(self) -> list[tuple[str, int]]:
        """Everything below the remote, hidden files too; caches and locks come and go."""
        return sorted(
            (str(path.relative_to(self._remote)), path.stat().st_size)
            for path in self._remote.rglob("*")
            if path.is_file()
        )

    def _restore(self, client: Client, described: Described, identifier: str) -> str:
        params = {
            "backupId": identifier,
            "remote": self._remote_spec(),
            "srUuid": described.srs[0],
            "xapi": self._xapi(described),
            "streamLogs": True,
        }
        root = self._follow(client, "backup.importVmBackup", params)
        task = client.scalar("task.get", {"taskId": root})
        self._check(task["status"] == "success", "the restore succeeded")
        return str(cast("dict[str, Any]", task["data"]["result"])["id"])

    def _compare(self, pool: Pool, vm: str, image: Path) -> None:
        position = 0
        with image.open("rb") as original:
            for chunk in pool.read_disk(pool.first_disk(vm)):
                if original.read(len(chunk)) != chunk:
                    raise Failure(f"its disk differs from the original near byte {position}")
                position += len(chunk)
            rest = original.read(1)
        self._check(
            position == DISK and not rest,
            f"its disk equals the original, all {position} bytes",
        )


def _line(process: subprocess.Popen[str]) -> str:
    """The first line that a program prints."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise Failure("a program of the demo did not start: see its log with --keep")
    return line


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
