"""A remote in a temporary folder, what Xen Orchestra wrote, and an observer of each step."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from proxy.remotes.local import LocalRemote
from proxy.remotes.wrapper import Operation, Wrapper
from proxy.repository import lock_vm, open_full_backup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from proxy.remotes.interface import Remote
    from proxy.repository import Backup

T = TypeVar("T")

RECORDED = Path(__file__).parent.parent / "fixtures" / "repository"
VM = "fda19ed2-4e86-4644-a698-498a6317efb6"
NOON = 1_795_485_541_901
"""2026-11-24T01:59:01.901Z, the time of a recorded backup."""


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Remote]:
    opened = await open_local(tmp_path / "remote")
    yield opened
    await opened.aclose()


async def open_local(root: Path, **options: Any) -> LocalRemote:
    return await LocalRemote.open(str(root), url=f"file://{root}", **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the files of ``remote`` are."""
    return tmp_path / "remote"


@pytest.fixture
def vm_dir(root: Path) -> Path:
    return root / "xo-vm-backups" / VM


def place_recorded(name: str, root: Path) -> None:
    """Put a recorded remote (without its data) at ``root``."""
    shutil.copytree(RECORDED / name / "remote", root, dirs_exist_ok=True)


def recorded(name: str) -> Any:
    """The ``result`` of a recorded answer."""
    return json.loads((RECORDED / name).read_text())["result"]


def xva_bytes(seed: int = 0, blocks: int = 3) -> bytes:
    """A small archive made by Python's own tar writer: ends with two blocks of zeros."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(blocks):
            content = hashlib.sha256(f"{seed}-{index}".encode()).digest() * 32
            member = tarfile.TarInfo(f"Ref:4/{index:08}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def metadata_of(timestamp: int = NOON, **more: Any) -> dict[str, Any]:
    vm = {
        "uuid": VM,
        "name_label": "vm1",
        "name_description": "simulated VM",
        "tags": [],
        "is_a_template": False,
        "suspend_VDI": "OpaqueRef:NULL",
    }
    return {
        "jobId": "job",
        "scheduleId": "schedule",
        "timestamp": timestamp,
        "vm": vm,
        "vmSnapshot": {**vm, "uuid": "5aa3f422-d502-4dca-b4e0-4b9862e119af"},
        "tags": [],
        **more,
    }


async def write_full(
    remote: Remote, timestamp: int = NOON, *, data: bytes | None = None, **options: Any
) -> Backup:
    """One full backup from lock to metadata, as a run does it."""
    data = data if data is not None else xva_bytes(timestamp)
    async with (
        lock_vm(remote, VM, owner="test"),
        open_full_backup(remote, VM, timestamp, **options) as writer,
    ):
        for start in range(0, len(data), 2048):
            await writer.write(memoryview(data)[start : start + 2048])
        return await writer.commit(metadata_of(timestamp), hashlib.md5(data).digest())


class Watched(Wrapper):
    """Calls ``step(operation, done)`` before and after the whole effect of each operation.

    What ``step`` raises (it may be async) is what the operation raises.
    """

    def __init__(self, remote: Remote, step: Callable[[Operation, bool], Any]) -> None:
        super().__init__(remote)
        self._step = step

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        await self._tell(operation, done=False)
        result = await run()
        await self._tell(operation, done=True)
        return result

    async def _tell(self, operation: Operation, *, done: bool) -> None:
        answer = self._step(operation, done)
        if inspect.isawaitable(answer):
            await answer


def recorded_names(name: str) -> dict[str, str]:
    """Path and mode of everything in a recorded remote; directories end with a slash."""
    lines = (RECORDED / name).read_text().splitlines()
    return {line.split()[-1]: line.split()[0] for line in lines}
