"""A file server without a network: programs in the place of ``mount`` and its helpers.

``mount`` writes down what it was called with and bind-mounts the directory that the device
names: ``host:/a/b`` and ``//host\\share/\\a\\b`` are both ``/a/b``.  ``umount`` is the real one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proxy.remotes import RemoteOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOUNT = """#!/bin/sh
state={state}
printf '%s\\037' mount "$@" >> $state/calls
echo >> $state/calls
env -0 > $state/environment
for directory; do device=$previous; previous=$directory; done
case $device in
  //*) place=$(printf %s "$device" | sed 's,^//[^/]*/,,' | tr '\\\\' /) ;;
  *) place=${{device#*:}} ;;
esac
if [ -e $state/behaviour ]; then . $state/behaviour; fi
mkdir -p "$place"
exec {mount} --bind "$place" "$directory"
"""


@functools.cache
def why_no_mounts() -> str | None:
    """Why this process cannot bind-mount, ``None`` when it can."""
    with tempfile.TemporaryDirectory() as directory:
        tried = subprocess.run(
            ["mount", "--bind", directory, directory], capture_output=True, text=True, check=False
        )
        if tried.returncode == 0:
            subprocess.run(["umount", directory], check=True)
            return None
        return tried.stderr.strip()


class Server:
    def __init__(self, tmp_path: Path) -> None:
        self.state = tmp_path / "server"
        self.share = tmp_path / "export"
        self.mounts = tmp_path / "mounts"
        self.programs = tmp_path / "bin"
        for directory in (self.state, self.share, self.programs):
            directory.mkdir()
        self.options = RemoteOptions(
            disable_file_remotes=False,
            mounts_dir=str(self.mounts),
            mount_seconds=10,
            operation_seconds=10,
            open_seconds=10,
        )
        real = next(path for path in ("/usr/bin/mount", "/bin/mount") if os.access(path, os.X_OK))
        self.program("mount", _MOUNT.format(state=shlex.quote(str(self.state)), mount=real))
        for helper in ("mount.nfs", "mount.cifs"):
            self.program(helper, "#!/bin/sh\nexit 1\n")

    @property
    def url(self) -> str:
        return f"nfs://server:{self.share}"

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def behave(self, text: str) -> None:
        """Shell for ``mount`` to run in the place of mounting; ``""``: mount again."""
        (self.state / "behaviour").write_text(text)

    def hang_on_demand(self) -> None:
        """Mount by a program, :attr:`pid`, that may be stopped or killed."""
        self.behave(
            'bindfs -f "$place" "$directory" & echo $! > $state/pid; '
            'while ! grep -q " $directory " /proc/self/mountinfo; do sleep 0.01; done; exit 0'
        )

    @property
    def pid(self) -> int:
        return int((self.state / "pid").read_text())

    def fails(self, text: str, code: int = 32) -> None:
        self.behave(f"printf '%s\\n' {shlex.quote(text)} >&2; exit {code}")

    def calls(self) -> list[list[str]]:
        """The arguments of each ``mount``."""
        path = self.state / "calls"
        if not path.exists():
            return []
        return [line.split("\037")[:-1] for line in path.read_text().splitlines()]

    def environment(self) -> dict[str, str]:
        """Of the last ``mount``."""
        text = (self.state / "environment").read_text()
        return dict(item.split("=", 1) for item in text.split("\0") if item)

    def mounted(self) -> list[str]:
        """Names of the mounts directory at which something is mounted now."""
        return [place.name for place in mounted_below(self.mounts)]


def mounted_below(directory: Path) -> list[Path]:
    """As the kernel tells, by a reader of our own."""
    text = Path("/proc/self/mountinfo").read_text()
    places = [Path(line.split(" ")[4].replace("\\040", " ")) for line in text.splitlines()]
    return [place for place in places if directory in place.parents]


@contextlib.contextmanager
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    reason = why_no_mounts()
    if reason is not None:
        pytest.skip(f"bind mounts are not permitted here: {reason}")
    server = Server(tmp_path)
    monkeypatch.setenv("PATH", f"{server.programs}:{os.environ['PATH']}")
    try:
        yield server
        left = server.mounted()
    finally:
        for place in reversed(mounted_below(tmp_path)):
            subprocess.run(["umount", "-l", str(place)], check=False)
    assert left == [], "left mounted"
