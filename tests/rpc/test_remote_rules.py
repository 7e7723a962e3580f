"""Rules of remotes that every method keeps: whoever adds a method is found here."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.config import ApiConfig, Config
from proxy.config.schema import RemotesConfig
from proxy.config.values import Seconds
from proxy.errors import ProxyError
from proxy.jobs import open_services
from proxy.rpc import Authenticator, Context
from proxy.rpc.methods import standard
from proxy.tasks import open_tasks
from tests.rpc.conftest import Tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from proxy.rpc.registry import Method

METHODS = {
    method.name: method
    for method in standard()
    if {"remote", "remotes"} & set(method.schema["properties"])
}
WRITES = {"backup.run", "remote.test"}
"""What may make the directory of a remote."""
LISTINGS = {
    "backup.listVmBackups",
    "backup.listPoolMetadataBackups",
    "backup.listXoMetadataBackups",
}
"""What leaves a remote out that fails."""
VM = "11111111-2222-4333-8444-555555555555"
BACKUP = f"/xo-vm-backups/{VM}/20261124T120000Z.json"
CONFIGURATION = f"xo-config-backups/{VM}/20261124T120000Z"
KNOWN: dict[str, Any] = {
    "backupId": BACKUP,
    "filename": BACKUP,
    "filenames": [BACKUP],
    "id": BACKUP,
    "srUuid": VM,
    "vmId": VM,
    "xapi": {"url": "https://127.0.0.1:1", "credentials": {"username": "u", "password": "p"}},
}
EMPTY = {"string": "x", "object": {}, "array": [], "number": 1, "integer": 1, "boolean": False}


@contextlib.asynccontextmanager
async def context_of(tmp_path: Path, *, disabled: bool) -> AsyncIterator[Context]:
    config = Config(
        datadir=tmp_path,
        remotes=RemotesConfig(disable_file_remotes=disabled),
        resource_cache_delay=Seconds(0),
    )
    async with trio.open_nursery() as nursery:
        async with (
            open_tasks(str(tmp_path / "tasks.db"), nursery) as tasks,
            open_services(lambda: config, tasks, nursery) as services,
        ):
            authenticator = Authenticator(Tokens(), grace=lambda: 0)
            yield Context(services, ApiConfig(), standard(), authenticator, trio.Event())
            services.cancel_all("the test is over")
            await services.wait_idle()
        nursery.cancel_scope.cancel()


def params_of(method: Method, url: str) -> dict[str, Any]:
    remote = {"id": "r", "url": url}
    given: dict[str, Any] = {"remote": remote, "remotes": {"r": remote}, **KNOWN}
    if method.name == "backup.run":
        return {
            "job": {
                "id": "j",
                "name": "j",
                "type": "backup",
                "mode": "full",
                "vms": {"id": VM},
                "remotes": {"id": "r"},
                "settings": {"": {}, "s": {"exportRetention": 1}},
            },
            "schedule": {"id": "s"},
            "remotes": {"r": remote},
            "xapis": {},
            "recordToXapi": {},
        }
    if method.name.endswith("MetadataBackup"):
        given["backupId"] = CONFIGURATION
    return {
        name: given.get(name, EMPTY[part.get("type", "object")])
        for name, part in method.schema["properties"].items()
        if name in method.schema["required"] or name in ("remote", "remotes")
    }


async def called(context: Context, method: Method, url: str) -> str:
    """Everything that a call answers, as one text."""
    told: list[Any] = []
    try:
        answer = method.function(context, method.read_params(params_of(method, url)))
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, AsyncIterable):
            told += [item async for item in answer]
        elif isinstance(answer, Iterable) and not isinstance(answer, str | dict):
            told += answer
        told.append(answer)
    except ProxyError as error:
        told.append(error.message)
    if method.name in ("backup.run", "backup.sweep"):  # they answer before they open anything
        await context.services.wait_idle()  # type: ignore[attr-defined]
        told += [bytes(task) async for task in context.services.tasks.list()]
    return repr(told)


def test_the_methods_with_remotes_are_these() -> None:
    assert {"backup.run", "backup.listVmBackups", "remote.test", "backup.verify"} <= set(METHODS)
    assert len(METHODS) >= 9


@pytest.mark.parametrize("name", METHODS)
async def test_disabled_file_remotes_are_refused_by_every_method(tmp_path: Path, name: str) -> None:
    """Else whoever may call us could write anywhere on the appliance, or learn what is there."""
    there = tmp_path / "there"
    there.mkdir()
    async with context_of(tmp_path, disabled=True) as context:
        for folder in (there, tmp_path / "missing"):
            text = await called(context, METHODS[name], f"file://{folder}")
            if name in LISTINGS:
                assert text == "[{}]"
            else:
                assert "Local remotes are disabled in proxies" in text
    assert list(there.iterdir()) == []
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("name", METHODS)
async def test_only_what_writes_makes_the_directory_of_a_remote(tmp_path: Path, name: str) -> None:
    missing = tmp_path / "mistyped"
    async with context_of(tmp_path, disabled=False) as context:
        text = await called(context, METHODS[name], f"file://{missing}")
    assert missing.exists() == (name in WRITES)
    if name not in WRITES | LISTINGS:
        assert "does not exist" in text
