"""The real daemon as a process, called over HTTP, with a simulated pool in another process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.cli.client import Client, Stream
from proxy.cli.failures import Failure

TOKEN = "token-of-the-tests"
VM_JOB = "d3a0d3a0-0000-4000-8000-000000000001"
pytestmark = pytest.mark.slow


class Process:
    """One ``xo-proxy`` command; its first line of output has been read."""

    def __init__(self, folder: Path, *command: str, **environment: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("XO_PROXY_")}
        self.errors = folder / f"{command[0]}.err"
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proxy", *command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**kept, "XDG_CONFIG_HOME": str(folder / "xdg"), **environment},
            )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def log(self) -> str:
        return self.errors.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 20) -> int:
        return self.process.wait(seconds)

    def wait_for_log(self, text: str, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while text not in self.log():
            assert time.monotonic() < end, f"no {text!r} in the log:\n{self.log()}"
            time.sleep(0.02)


class Lab:
    def __init__(self, folder: Path, ending: contextlib.ExitStack) -> None:
        self.folder = folder
        self._ending = ending

    def start(self, *command: str, **environment: str) -> Process:
        process = Process(self.folder, *command, **environment)
        self._ending.callback(self._end, process)
        return process

    @staticmethod
    def _end(process: Process) -> None:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()
        assert process.process.stdout is not None
        process.process.stdout.close()

    def config(self, name: str = "config.json", **settings: Any) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        plain = {"hostname": "127.0.0.1", "port": 0, "cert": None, "key": None}
        whole = {
            "authenticationToken": TOKEN,
            "datadir": "./data",
            "http": {"listen": {"https": plain}},
            "remotes": {"disableFileRemotes": False},
            **settings,
        }
        path.write_text(json.dumps(whole))
        return path

    def daemon(self, config: Path) -> tuple[Process, Client]:
        daemon = self.start("serve", "--config", str(config))
        line = daemon.line()
        assert line.startswith("listening on http"), daemon.log()
        return daemon, self.client(line.removeprefix("listening on "))

    def left_on_remote(self) -> list[str]:
        """Files other than the listing's cache, which names what is there: nothing."""
        found = [path for path in (self.folder / "remote").rglob("*") if path.is_file()]
        return [str(path) for path in found if path.name != "cache.json.gz"]

    def client(self, url: str, token: str = TOKEN) -> Client:
        client = Client(url, token)
        self._ending.callback(client.close)
        return client

    def run_params(self, rate: str, size: str = "16MiB") -> dict[str, Any]:
        pool = json.loads(self.start("simulate", "--disk-size", size, "--rate", rate).line())
        vm = pool["vms"][0]["uuid"]
        credentials = {"username": pool["user"], "password": pool["password"]}
        url = f"file://{self.folder / 'remote'}"
        return {
            "job": {
                "id": VM_JOB,
                "name": "job",
                "type": "backup",
                "mode": "full",
                "vms": {"id": {"__or": [vm]}},
                "remotes": {"id": {"__or": ["r"]}},
                "settings": {"s": {"exportRetention": 1}},
            },
            "schedule": {"id": "s"},
            "remotes": {"r": {"id": "r", "url": url}},
            "xapis": {
                "p": {"url": pool["url"], "credentials": credentials, "allowUnauthorized": True}
            },
            "recordToXapi": {vm: "p"},
            "streamLogs": True,
        }


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with contextlib.ExitStack() as ending:
        yield Lab(tmp_path, ending)


class Log(threading.Thread):
    """Reads a run's stream; ``moving`` is set once bytes flow."""

    def __init__(self, client: Client, params: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._client, self._params = client, params
        self.moving = threading.Event()
        self.records: list[dict[str, Any]] = []
        self.error: Failure | None = None

    def run(self) -> None:
        try:
            with self._client.call("backup.run", self._params) as reply:
                assert isinstance(reply, Stream)
                for record in reply.items:
                    self.records.append(record)
                    if record.get("name") == "progress":
                        self.moving.set()
        except Failure as error:
            self.error = error


def test_it_starts_answers_and_stops(lab: Lab) -> None:
    tls = {"hostname": "127.0.0.1", "port": 0, "cert": "./c.pem", "key": "./k.pem"}
    daemon, client = lab.daemon(lab.config(http={"listen": {"https": tls}}))
    assert client.where.startswith("https://")
    assert client.scalar("system.getServerVersion", {}) == "1.0.0"
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert TOKEN not in daemon.log()


def test_a_stream_gets_its_root_end_before_a_stop_closes_it(lab: Lab) -> None:
    """Upstream waits without bound for a backup and is then killed with the log left open."""
    daemon, client = lab.daemon(lab.config(stopGrace=0))
    log = Log(client, lab.run_params("1MiB"))
    log.start()
    assert log.moving.wait(10)
    daemon.signal(signal.SIGTERM)
    log.join(15)
    assert daemon.wait() == 0
    assert log.error is None
    root = log.records[0]["id"]
    assert (log.records[-1]["id"], log.records[-1]["type"]) == (root, "end")
    assert log.records[-1]["status"] == "failure"
    assert lab.left_on_remote() == []


def ended(client: Client, task_id: str, seconds: float = 20) -> dict[str, Any]:
    """The task, once it has ended."""
    until = time.monotonic() + seconds
    while True:
        task: dict[str, Any] = client.scalar("task.get", {"taskId": task_id})
        if "end" in task:
            return task
        assert time.monotonic() < until, task
        time.sleep(0.05)


def test_a_run_goes_on_when_its_watcher_vanishes(lab: Lab) -> None:
    _, client = lab.daemon(lab.config())
    params = lab.run_params("16MiB")
    with client.call("backup.run", params) as reply:
        assert isinstance(reply, Stream)
        for record in reply.items:
            if record.get("name") == "progress":
                break
    with pytest.raises(Failure, match="job is already running"):
        client.scalar("backup.run", params)
    assert client.scalar("backup.listRunningJobs", {}) == [VM_JOB]
    (task,) = client.scalar("task.getAll", {"filter": {"status": "pending"}})
    assert ended(client, task["id"])["status"] == "success"
    assert client.scalar("backup.listRunningJobs", {}) == []
    assert any(name.endswith(".json") for name in lab.left_on_remote())


def test_memory_does_not_grow_with_the_vm(lab: Lab) -> None:
    """Promise I6, under a limit: what a small run has needed is enough for any, to 48 MiB."""
    daemon, client = lab.daemon(lab.config())
    pid = daemon.process.pid
    small = {**lab.run_params("1GiB"), "streamLogs": False}
    assert ended(client, client.scalar("backup.run", small))["status"] == "success"
    status = Path(f"/proc/{pid}/status").read_text()
    used = 1024 * int(status.split("VmData:")[1].split()[0])
    limit = used + 48 * 1024 * 1024
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
    large = {**lab.run_params("1GiB", "256MiB"), "streamLogs": False}
    task = ended(client, client.scalar("backup.run", large), 60)
    assert task["status"] == "success", task


def test_within_the_grace_a_run_ends_by_itself_and_no_other_begins(lab: Lab) -> None:
    daemon, client = lab.daemon(lab.config(stopGrace="30s"))
    params = lab.run_params("8MiB")
    log = Log(client, params)
    log.start()
    assert log.moving.wait(10)
    daemon.signal(signal.SIGTERM)
    daemon.wait_for_log("stopping")
    with pytest.raises(Failure, match="stopping"):
        client.scalar("backup.run", {**params, "job": {**params["job"], "id": "other"}})
    assert client.scalar("backup.listRunningJobs", {}) == [VM_JOB]  # the API still answers
    log.join(15)
    assert daemon.wait() == 0
    assert log.records[-1]["status"] == "success"


def test_a_second_signal_stops_at_once(lab: Lab) -> None:
    daemon, client = lab.daemon(lab.config(stopGrace="1h"))
    log = Log(client, lab.run_params("1MiB"))
    log.start()
    assert log.moving.wait(10)
    daemon.signal(signal.SIGTERM)
    daemon.wait_for_log("a second signal stops at once")
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 1
    assert time.monotonic() - began < 6
    log.join(5)
    assert "undo step failed" not in daemon.log()
    assert lab.left_on_remote() == []


def test_an_idle_long_poll_does_not_hold_the_stop(lab: Lab) -> None:
    daemon, client = lab.daemon(lab.config())
    token = client.scalar("event.from", {"timeout": 0})["token"]
    waiting = threading.Thread(
        target=lambda: client.scalar("event.from", {"token": token, "timeout": 50}), daemon=True
    )
    waiting.start()
    time.sleep(0.3)
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert time.monotonic() - began < 3
    waiting.join(5)


def test_a_task_cut_by_a_kill_is_interrupted_after_the_next_start(lab: Lab) -> None:
    config = lab.config()
    daemon, client = lab.daemon(config)
    log = Log(client, lab.run_params("1MiB"))
    log.start()
    assert log.moving.wait(10)
    time.sleep(1)  # the journal writes every so often
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    _, client = lab.daemon(config)
    (task,) = client.scalar("task.getAll", {})
    assert task["status"] == "interrupted"


class Pool:
    """The simulated pool, asked directly."""

    def __init__(self, params: dict[str, Any]) -> None:
        given = params["xapis"]["p"]
        self._url = given["url"] + "/jsonrpc"
        user, password = given["credentials"]["username"], given["credentials"]["password"]
        self._session = self._call("session.login_with_password", user, password)

    def _call(self, method: str, *params: Any) -> Any:
        request = {"jsonrpc": "2.0", "id": 0, "method": method, "params": params}
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(self._url, json=request, headers=headers).json()
        return answer["result"]

    def vms(self) -> list[dict[str, Any]]:
        return list(self._call("VM.get_all_records", self._session).values())

    def snapshots(self) -> list[dict[str, Any]]:
        return [vm for vm in self.vms() if vm["is_a_snapshot"]]


def _until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def _check_backups(folder: Path) -> int:
    """Every metadata file names a whole archive; says how many there are."""
    count = 0
    for metadata in folder.rglob("*Z.json"):
        record = json.loads(metadata.read_text())
        archive = metadata.with_suffix(".xva")
        assert archive.stat().st_size == record["size"]
        with tarfile.open(archive) as tar:
            assert tar.getnames()[0] == "ova.xml"
        assert archive.read_bytes().endswith(bytes(1024))
        digest = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        assert metadata.with_suffix(".xva.checksum").read_text() == f"$1$${digest}"
        count += 1
    return count


@pytest.mark.parametrize("moment", ["snapshot", "bytes", "named", "metadata"])
def test_what_a_killed_run_left_is_removed_by_the_next(lab: Lab, moment: str) -> None:
    """``kill -9`` loses no backup, lists no broken one, and needs nobody to clean up."""
    config = lab.config()
    daemon, client = lab.daemon(config)
    params = {**lab.run_params("16MiB"), "streamLogs": False}
    pool = Pool(params)
    remote = lab.folder / "remote"
    task_id = client.scalar("backup.run", params)
    reached = {
        "snapshot": pool.snapshots,
        "bytes": lambda: any(p.stat().st_size for p in remote.rglob(".*.xva.tmp")),
        "named": lambda: any(remote.rglob("*Z.xva")),
        "metadata": lambda: any(remote.rglob("*Z.json")),
    }
    _until(reached[moment])
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    kept = _check_backups(remote)
    assert kept == (1 if moment == "metadata" else kept)

    daemon, client = lab.daemon(config)
    assert client.scalar("task.get", {"taskId": task_id})["status"] == "interrupted"
    listed = client.scalar("backup.listVmBackups", {"remotes": params["remotes"]})["r"]
    assert sum(map(len, listed.values())) == kept
    again = client.scalar("backup.run", params)
    _until(lambda: client.scalar("task.get", {"taskId": again})["status"] != "pending")
    assert client.scalar("task.get", {"taskId": again})["status"] == "success"
    assert _check_backups(remote) == 1, "exportRetention is 1"
    names = sorted(path.name for path in remote.rglob("*") if path.is_file())
    assert len(names) == 4, names  # archive, checksum, metadata, cache
    assert pool.snapshots() == []
    assert [vm["blocked_operations"] for vm in pool.vms()] == [{}] * len(pool.vms())
    assert not list(remote.rglob("*.lock"))


def test_sighup_reloads_and_a_broken_file_changes_nothing(lab: Lab) -> None:
    config = lab.config()
    daemon, client = lab.daemon(config)
    config.write_text("{broken")
    daemon.signal(signal.SIGHUP)
    daemon.wait_for_log("configuration not reloaded")
    assert client.scalar("system.getServerVersion", {})
    lab.config(authenticationToken="another-good-token")
    daemon.signal(signal.SIGHUP)
    daemon.wait_for_log("configuration changed")
    with pytest.raises(Failure, match="does not accept"):
        client.scalar("system.getServerVersion", {})


def test_a_token_set_by_a_call_survives_a_restart(lab: Lab) -> None:
    config = lab.config()
    daemon, client = lab.daemon(config)
    client.scalar("authentication.setToken", {"token": "token-set-by-a-call"})
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    daemon, client = lab.daemon(config)
    with pytest.raises(Failure, match="does not accept"):
        client.scalar("system.getServerVersion", {})
    client = lab.client(client.where, "token-set-by-a-call")
    assert client.scalar("system.getServerVersion", {})


def test_a_second_daemon_on_the_same_datadir_is_refused(lab: Lab) -> None:
    config = lab.config()
    lab.daemon(config)
    second = lab.start("serve", "--config", str(config))
    assert second.wait() == 1
    assert "another xo-proxy uses" in second.log()


def test_a_taken_port_is_named_and_another_listener_serves(lab: Lab) -> None:
    """Upstream goes on even without a single listener."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listen = {
            "https": None,
            "taken": {"hostname": "127.0.0.1", "port": port},
            "free": {"hostname": "127.0.0.1", "port": 0},
        }
        daemon, client = lab.daemon(lab.config(http={"listen": listen}))
        assert f"127.0.0.1:{port}" in daemon.log()
        assert client.scalar("system.getServerVersion", {})
        del listen["free"]
        config = lab.config("b.json", http={"listen": listen}, datadir="./other")
        failed = lab.start("serve", "--config", str(config))
        assert failed.wait() == 1
        assert "no listener could be opened" in failed.log()


def test_a_unix_socket(lab: Lab) -> None:
    path = lab.folder / "s"
    listen = {"https": None, "local": {"socket": str(path)}}
    daemon = lab.start("serve", "--config", str(lab.config(http={"listen": listen})))
    assert daemon.line() == f"listening on unix:{path}"
    assert lab.client(f"unix:{path}").scalar("system.getServerVersion", {})


def test_it_never_runs_without_a_token(lab: Lab) -> None:
    """Upstream accepts an empty cookie until its configuration is loaded again."""
    config = lab.config(authenticationToken="")
    daemon = lab.start("serve", "--config", str(config), PATH=str(lab.folder))
    assert daemon.wait() == 5
    assert "XO_PROXY_AUTHENTICATION_TOKEN" in daemon.log()
    assert "Traceback" not in daemon.log()


def test_wrong_configuration_is_one_line_a_fault(lab: Lab) -> None:
    config = lab.config(stopGrace="soon", logs={"level": 3})
    daemon = lab.start("serve", "--config", str(config))
    assert daemon.wait() == 5
    assert sorted(line.partition(": ")[2] for line in daemon.log().splitlines()) == [
        f"{config}: logs.level: expected str, got int",
        f"{config}: stopGrace: expected a duration (milliseconds, or text such as '5m')",
    ]


def test_optimised_python_is_refused(lab: Lab) -> None:
    daemon = lab.start("serve", "--config", str(lab.config()), PYTHONOPTIMIZE="1")
    assert daemon.wait() == 1
    assert "python -O" in daemon.log()


def test_systemd_is_told(lab: Lab) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = lab.folder / "notify"
        manager.bind(str(path))
        manager.settimeout(10)
        daemon = lab.start(
            "serve",
            "--config",
            str(lab.config()),
            NOTIFY_SOCKET=str(path),
            WATCHDOG_USEC="200000",
        )
        daemon.line()
        heard = {manager.recv(4096).decode() for _ in range(8)}
        assert "READY=1\nSTATUS=serving" in heard
        assert "WATCHDOG=1" in heard
        daemon.signal(signal.SIGTERM)
        while "STOPPING=1" not in manager.recv(4096).decode():
            pass
        assert daemon.wait() == 0
