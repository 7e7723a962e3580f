"""azurite, Microsoft's emulator of Azure Storage: the peer of our client that is not ours."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCOUNT = "devstoreaccount1"
# the emulator's documented key, the same everywhere
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_MAIN = Path(sys.prefix) / "azurite/node_modules/azurite/dist/src/blob/main.js"


@dataclass(frozen=True)
class Azurite:
    address: str
    """``127.0.0.1:port``."""

    def url(self, path: str, query: str = "") -> str:
        """The URL of a remote whose path is ``/container/directory``."""
        return f"azurite+http://{ACCOUNT}:{quote(KEY, safe='')}@{self.address}{path}{query}"


@contextlib.contextmanager
def running_azurite(directory: Path) -> Iterator[Azurite]:
    """Starts in about 2 s, keeps everything in memory, ends with the block.

    ``scripts/setup`` installs it; telemetry is off and nothing but loopback is listened to.
    """
    options = ["--blobHost", "127.0.0.1", "--blobPort", "0"]
    flags = ["--inMemoryPersistence", "--silent", "--disableTelemetry"]
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(directory)}
    with subprocess.Popen(
        ["node", str(_MAIN), *options, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=directory,
        env=environment,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said: list[str] = []
            for line in process.stdout:
                said.append(line)
                if match := re.search(r"successfully listens on http://([\d.]+:\d+)", line):
                    break
            else:
                raise AssertionError(f"azurite did not start: {''.join(said)}")
            yield Azurite(match[1])
        finally:
            process.kill()
