"""A Samba server of our own: unprivileged port, private databases, one local user.

The real peer of the SMB client.  Its shares lie on a directory of this machine, so that a test can
look at the files themselves.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSWORD = "p@ss://w,o?rd"  # all that a URL and a list of options use themselves


@dataclass(frozen=True)
class Samba:
    """``share`` may be written, ``readonly`` not, ``sealed`` demands encryption, ``open`` takes
    guests; all show ``root``."""

    root: Path
    port: int
    user: str
    process: subprocess.Popen[bytes]

    def place(self, directory: Path) -> str:
        """How ``directory`` is called on the shares, with backslashes."""
        return str(directory.relative_to(self.root)).replace("/", "\\")

    def url(
        self,
        directory: Path,
        *,
        share: str = "share",
        options: str = "",
        password: str = PASSWORD,
        query: str = "",
    ) -> str:
        text = ",".join(filter(None, (f"port={self.port}", options)))
        return (
            f"smb://{self.user}:{password}@WORKGROUP\\\\127.0.0.1\\{share}\0"
            f"\\{self.place(directory)}?options={quote(f'{chr(34)}{text}{chr(34)}')}{query}"
        )

    def children(self) -> list[int]:
        """The processes that serve one connection each."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [
            int(pid)
            for pid in listed.split()
            if b"smbd" in _command(int(pid)) and _is_connected(int(pid), self.port)
        ]


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _is_connected(pid: int, port: int) -> bool:
    inodes = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(entry.readlink()))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        is_ours = int(fields[1].split(":")[1], 16) == port and fields[3] == "01"
        if is_ours and f"socket:[{fields[9]}]" in inodes:
            return True
    return False


def why_not() -> str | None:
    """Why no server can be started here."""
    if smbd() is None:
        return "smbd is not installed (Debian package samba, see scripts/setup)"
    if os.getuid() != 0:
        return "smbd serves files only when it is started by root"
    return None


def smbd() -> str | None:
    return shutil.which("smbd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@contextlib.contextmanager
def started(root: Path, **extra: Any) -> Iterator[Samba]:
    """``extra`` goes into the configuration's ``[global]``, with spaces for underscores."""
    program = smbd()
    assert program is not None
    user = pwd.getpwuid(os.getuid()).pw_name
    with tempfile.TemporaryDirectory(prefix="samba-", ignore_cleanup_errors=True) as home:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        configuration = Path(home, "smb.conf")
        configuration.write_text(_configuration(Path(home), root, port, user, extra))
        both = f"{PASSWORD}\n{PASSWORD}\n".encode()
        command = ["smbpasswd", "-c", str(configuration), "-s", "-a", user]
        subprocess.run(command, input=both, check=True, capture_output=True)
        arguments = ["--foreground", "--no-process-group", "--debug-stdout"]
        with subprocess.Popen(
            [program, *arguments, f"--configfile={configuration}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                _wait_for(port, process)
                yield Samba(root, port, user, process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _configuration(home: Path, root: Path, port: int, user: str, extra: dict[str, Any]) -> str:
    kept = {}
    for name in (
        "private dir",
        "lock directory",
        "state directory",
        "cache directory",
        "pid directory",
        "ncalrpc dir",
    ):
        kept[name] = home / name.partition(" ")[0]
        kept[name].mkdir()
    settings = {
        "server role": "standalone server",
        "smb ports": port,
        "interfaces": "lo",
        "bind interfaces only": "yes",
        "passdb backend": "tdbsam",
        "log level": 0,
        "load printers": "no",
        "disable spoolss": "yes",
        "map to guest": "bad user",
        "guest account": user,
        "follow symlinks": "no",
        "strict sync": "no",  # what a flush costs on the disk is not what is tested
        **kept,
        **{name.replace("_", " "): value for name, value in extra.items()},
    }
    lines = ["[global]", *(f"{name} = {value}" for name, value in settings.items())]
    for share, options in (
        ("share", "read only = no"),
        ("readonly", "read only = yes"),
        ("sealed", "read only = no\nsmb encrypt = required"),
        ("open", "read only = no\nguest ok = yes"),
    ):
        lines.append(f"[{share}]\npath = {root}\n{options}")
    return "\n".join(lines)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 10
    while True:
        assert process.poll() is None, "smbd ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < until, "smbd does not listen"
        time.sleep(0.02)
