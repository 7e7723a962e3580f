"""What all measurements share: the programs under test, a raw client, floors, tables.

The daemon and the simulated pool are processes of their own, as in life, so that the pool's
CPU does not count as the daemon's.  A *floor* is the least that the same work can cost on
this machine at this moment, written as plainly as possible; it runs between the rounds of
what it is compared with, because a shared machine's speed changes from minute to minute.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1024 * 1024
PIECE = 2 * MIB
_PATIENCE = 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """``quick``: small sizes, one round: does it work at all?"""

    quick: bool = False
    rounds: int = 3
    folder: Path = Path(tempfile.gettempdir())


def options(description: str, arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small and short: a smoke check")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where remotes are made: the disk that is measured",
    )
    given = parser.parse_args(arguments)
    return Options(given.quick, 1 if given.quick else given.rounds, given.folder)


@contextlib.contextmanager
def scratch(chosen: Options) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="xo-proxy-bench-", dir=chosen.folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- programs -----------------------------------------------------------------------------------


@dataclass
class Program:
    """One process under test."""

    process: subprocess.Popen[str]

    @property
    def cpu(self) -> float:
        """Seconds of CPU used until now, user and system."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def peak_memory(self) -> int:
        """Highest resident size so far, in bytes."""
        return self._status("VmHWM")

    @property
    def memory(self) -> int:
        """Resident size now, in bytes."""
        return self._status("VmRSS")

    def _status(self, name: str) -> int:
        lines = self._proc("status").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def forget_peak(self) -> None:
        """Count :attr:`peak_memory` from here."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


@contextlib.contextmanager
def started(folder: Path, *command: str) -> Iterator[tuple[Program, str]]:
    """Run ``command`` until the end of the block; gives its first line of output, too."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XO_PROXY_")}
    environment["XDG_CONFIG_HOME"] = str(folder / "no-config")
    with (folder / "programs.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError((folder / "programs.log").read_text()[-2000:])
        yield Program(process), line.strip()
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


# -- the pool -----------------------------------------------------------------------------------


class Pool:
    """The simulated pool, seen by a plain client."""

    def __init__(self, program: Program, described: dict[str, Any]) -> None:
        self.program = program
        self.url: str = described["url"]
        self.vms: list[str] = [vm["uuid"] for vm in described["vms"]]
        self.sr: str = described["srs"][0]
        self._user: str = described["user"]
        self._password: str = described["password"]
        self._server = xmlrpc.client.ServerProxy(
            self.url,
            allow_none=True,
            context=_trusting() if self.secure else None,
        )
        self.session: str = self._value(
            self._server.session.login_with_password(self._user, self._password)
        )

    @property
    def secure(self) -> bool:
        return self.url.startswith("https:")

    @property
    def spec(self) -> dict[str, Any]:
        """As calls of the API name a pool."""
        credentials = {"username": self._user, "password": self._password}
        return {"url": self.url, "credentials": credentials, "allowUnauthorized": True}

    def call(self, method: str, *arguments: Any) -> Any:
        return self._value(getattr(self._server, method)(self.session, *arguments))

    @staticmethod
    def _value(answer: Any) -> Any:
        if answer["Status"] != "Success":
            raise RuntimeError(answer["ErrorDescription"])
        return answer["Value"]

    def connect(self) -> socket.socket:
        """A blocking connection, with TLS where the pool speaks it."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        sock = socket.create_connection((parts.hostname, parts.port or 80))
        return _trusting().wrap_socket(sock) if self.secure else sock

    def forget_vms(self, keep: set[str]) -> None:
        """Destroy the VMs that restores have made."""
        for ref, vm in self.call("VM.get_all_records").items():
            made = not vm["is_control_domain"] and not vm["is_a_snapshot"]
            if made and vm["uuid"] not in keep:
                for drive in self.call("VM.get_VBDs", ref):
                    vdi = self.call("VBD.get_VDI", drive)
                    if not vdi.startswith("OpaqueRef:NULL") and vdi:
                        self.call("VDI.destroy", vdi)
                self.call("VM.destroy", ref)


def _trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@contextlib.contextmanager
def simulated_pool(folder: Path, *, size: int, vms: int = 1, tls: bool = False) -> Iterator[Pool]:
    """Running VMs with one incompressible disk of ``size`` bytes each."""
    arguments = ["-m", "proxy", "simulate", "--vms", str(vms), "--disk-size", str(size)]
    with started(folder, *arguments, *(["--tls"] if tls else [])) as (program, line):
        yield Pool(program, json.loads(line))


# -- the daemon ---------------------------------------------------------------------------------


@dataclass
class Daemon:
    program: Program
    port: int
    token: str

    def request(self, method: str, **params: Any) -> bytes:
        """A whole HTTP request on a keep-alive connection."""
        message = {"id": 0, "jsonrpc": "2.0", "method": method, "params": params}
        body = json.dumps(message).encode()
        head = (
            "POST /api/v1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Cookie: authenticationToken={self.token}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def call(self, method: str, **params: Any) -> Any:
        """The result; for a stream the list of its records."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        message = {"id": 0, "jsonrpc": "2.0", "method": method, "params": params}
        try:
            connection.request(
                "POST",
                "/api/v1",
                json.dumps(message),
                {
                    "Cookie": f"authenticationToken={self.token}",
                    "Content-Type": "application/json",
                },
            )
            values = [json.loads(line) for line in connection.getresponse().read().splitlines()]
        finally:
            connection.close()
        if "error" in values[0]:
            raise RuntimeError(values[0]["error"])
        result = values[0]["result"]
        return values[1:] if result == {"$responseType": "ndjson"} else result


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[Daemon]:
    token = secrets.token_urlsafe(24)
    home = Path(tempfile.mkdtemp(prefix="daemon-", dir=folder))
    config = home / "config.json"
    config.touch(mode=0o600)
    listener = {"hostname": "127.0.0.1", "port": 0, "autoCert": False, "cert": None, "key": None}
    settings = {
        "authenticationToken": token,
        "datadir": "./data",
        "http": {"listen": {"https": listener}},
        "remotes": {"disableFileRemotes": False},
        "logs": {"level": "warn"},
    }
    config.write_text(json.dumps(settings))
    with started(folder, "-m", "proxy", "serve", "--config", str(config)) as (program, line):
        url = urlsplit(line.removeprefix("listening on "))
        assert url.scheme == "http"
        assert url.port is not None
        yield Daemon(program, url.port, token)


def remote_spec(folder: Path, name: str = "bench") -> dict[str, str]:
    return {"id": name, "name": name, "url": f"file://{folder / name}"}


def job(
    pool: Pool, remote: dict[str, str], vms: list[str], *, concurrency: int = 0, retention: int = 1
) -> dict[str, Any]:
    """The parameters of ``backup.run`` for a full backup."""
    return {
        "job": {
            "id": "d3a0d3a0-0000-4000-8000-000000000001",
            "name": "benchmark",
            "type": "backup",
            "mode": "full",
            "compression": "",
            "vms": {"id": {"__or": vms}},
            "remotes": {"id": {"__or": [remote["id"]]}},
            "settings": {
                "": {"concurrency": concurrency},
                "schedule": {"exportRetention": retention},
            },
        },
        "schedule": {"id": "schedule"},
        "remotes": {remote["id"]: remote},
        "xapis": {"pool": pool.spec},
        "recordToXapi": dict.fromkeys(vms, "pool"),
        "streamLogs": True,
    }


@dataclass
class Run:
    """One run by its log; times in seconds."""

    seconds: float
    records: list[dict[str, Any]] = field(repr=False)

    def spans(self, name: str) -> list[float]:
        """How long each task of that name took."""
        begun = self._begun(name)
        return [(end["timestamp"] - begun[end["id"]]) / 1000 for end in self._ends(begun)]

    def transferred(self) -> int:
        """The bytes of all transfers."""
        return sum(int(end["result"]["size"]) for end in self._ends(self._begun("transfer")))

    def _begun(self, name: str) -> dict[str, int]:
        return {
            r["id"]: r["timestamp"]
            for r in self.records
            if r["type"] == "start" and r["properties"]["name"] == name
        }

    def _ends(self, begun: dict[str, int]) -> list[dict[str, Any]]:
        return [r for r in self.records if r["type"] == "end" and r["id"] in begun]

    def check(self) -> None:
        """Raise unless every task succeeded."""
        bad = [r for r in self.records if r["type"] == "end" and r["status"] != "success"]
        if bad or not self.records:
            raise RuntimeError(f"the run failed: {[end.get('result') for end in bad[:1]]}")


def run(on: Daemon, method: str, params: dict[str, Any]) -> Run:
    began = time.perf_counter()
    records = on.call(method, **params)
    made = Run(time.perf_counter() - began, records)
    made.check()
    return made


# -- floors -------------------------------------------------------------------------------------


@contextlib.contextmanager
def exportable(pool: Pool, vm: str) -> Iterator[str]:
    """A snapshot that ``/export`` takes, for the block."""
    ref = pool.call("VM.snapshot", pool.call("VM.get_by_uuid", vm), "floor")
    disks = [pool.call("VBD.get_VDI", drive) for drive in pool.call("VM.get_VBDs", ref)]
    try:
        yield ref
    finally:
        pool.call("VM.destroy", ref)
        for vdi in disks:
            if pool.call("VDI.get_all").count(vdi):
                pool.call("VDI.destroy", vdi)


def plain_export(pool: Pool, ref: str, path: Path) -> tuple[int, float]:
    """Socket to file with nothing in between, one fsync at the end: bytes and seconds."""
    query = urlencode({"ref": ref, "session_id": pool.session})
    view = memoryview(bytearray(PIECE))
    total = 0
    with pool.connect() as sock, created(path) as target:
        began = time.perf_counter()
        sock.sendall(f"GET /export/?{query} HTTP/1.1\r\nHost: pool\r\n\r\n".encode())
        body = after_head(sock)
        total += os.write(target, body)
        while count := sock.recv_into(view):
            total += os.write(target, view[:count])
        os.fsync(target)
        return total, time.perf_counter() - began


def plain_import(
    pool: Pool, path: Path, handler: str = "/import/", **words: str
) -> tuple[int, float]:
    """File to socket with nothing in between, until the pool has taken it all."""
    size = path.stat().st_size
    task = pool.call("task.create", "floor", "")
    target = words or {"sr_uuid": pool.sr}
    query = urlencode({**target, "session_id": pool.session, "task_id": task})
    view = memoryview(bytearray(PIECE))
    with pool.connect() as sock, path.open("rb", buffering=0) as source:
        began = time.perf_counter()
        head = f"PUT {handler}?{query} HTTP/1.1\r\nHost: pool\r\nContent-Length: {size}\r\n\r\n"
        sock.sendall(head.encode())
        after_head(sock)
        while count := source.readinto(view):
            sock.sendall(view[:count])
        while (status := pool.call("task.get_status", task)) == "pending":
            time.sleep(0.005)
        seconds = time.perf_counter() - began
    if status != "success":
        raise RuntimeError(f"the floor's import ended as {status}")
    pool.call("task.destroy", task)
    return size, seconds


@contextlib.contextmanager
def created(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def after_head(sock: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        more = sock.recv(65536)
        if not more:
            raise RuntimeError(f"no answer: {received!r}")
        received += more
    head, _, rest = received.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise RuntimeError(head.decode())
    return rest


def empty(remote: Path) -> None:
    """Remove what a remote holds, but not the directory that the daemon keeps open."""
    for each in remote.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def settle() -> None:
    """Let the disk finish what the round before has left to it."""
    os.sync()


# -- tables -------------------------------------------------------------------------------------


@dataclass
class Figures:
    """One row: what was measured, round by round, beside its floor."""

    name: str
    unit: str
    floor_name: str = ""
    values: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    goal: str = ""

    def add(self, value: float, floor: float | None = None) -> None:
        self.values.append(value)
        if floor is not None:
            self.floors.append(floor)

    @property
    def ratios(self) -> list[float]:
        return [value / floor for value, floor in zip(self.values, self.floors, strict=True)]

    def row(self) -> str:
        floor = f"{_spread(self.floors)}" if self.floors else "-"
        ratio = _spread([100 * ratio for ratio in self.ratios]) + " %" if self.floors else "-"
        cells = [self.name, f"{_spread(self.values)} {self.unit}", floor, ratio, self.goal or "-"]
        return "| " + " | ".join(cells) + " |"


def _spread(values: list[float]) -> str:
    def shown(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    middle = statistics.median(values)
    if len(values) == 1:
        return shown(middle)
    return f"{shown(middle)} ({shown(min(values))}-{shown(max(values))})"


def show(*rows: Figures) -> None:
    """A table of the rows: median (lowest to highest)."""
    print("| figure | measured | floor | ratio | goal |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(row.row(), flush=True)


def main(description: str, measure: Callable[[Options], list[Figures]]) -> None:
    show(*measure(options(description)))
