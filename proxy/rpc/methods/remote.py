"""``remote.*``: does a backup repository answer, how fast, how full is it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from proxy.remotes.probe import test_remote
from proxy.repository.totals import total_backup_size
from proxy.rpc.envelope import describe
from proxy.rpc.registry import Params, Registry

if TYPE_CHECKING:
    from proxy.rpc.context import Context

methods = Registry()


class RemoteParams(Params):
    """XO sends ``{remote: {url, options?, …}}``; ``{url, options?}`` alone is taken as well."""

    remote: dict[str, Any]

    @classmethod
    def normalise(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"remote": given} if "url" in given and "remote" not in given else given


@methods.method(
    "remote.getInfo",
    RemoteParams,
    result={
        "type": "object",
        "properties": {
            "size": {"type": "integer"},
            "used": {"type": "integer"},
            "available": {"type": "integer"},
        },
    },
)
async def get_info(context: Context, params: RemoteParams) -> dict[str, int]:
    """Bytes; what the remote cannot tell is left out."""
    async with context.services.remote(params.remote, create=False) as remote:
        info = dataclasses.asdict(await remote.info())
    return {name: value for name, value in info.items() if value is not None}


@methods.method("remote.ping", RemoteParams, result={"type": "object"})
async def ping(context: Context, params: RemoteParams) -> dict[str, bool]:
    """Open the remote and look at it: one that is shared and open may be gone meanwhile."""
    async with context.services.remote(params.remote, create=False) as remote:
        await remote.list("/")
    return {"success": True}


@methods.method(
    "remote.test",
    RemoteParams,
    result={
        "type": "object",
        "properties": {
            "success": {"type": "boolean"},
            "writeRate": {"type": "number", "description": "bytes per second"},
            "readRate": {"type": "number", "description": "bytes per second"},
            "step": {"enum": ["write", "read", "unlink"]},
            "file": {"type": "string"},
            "error": {"type": "string"},
            "capabilities": {"type": "object", "description": "what an object store can do"},
            "warnings": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["success"],
    },
)
async def test(context: Context, params: RemoteParams) -> dict[str, Any]:
    """Whatever goes wrong is in the answer, which is never an error."""
    try:
        return await test_remote(context.services.remote(params.remote))
    except Exception as error:  # noqa: BLE001  logged by describe()
        return {"success": False, "error": describe(error)["message"]}


@methods.method(
    "remote.getTotalBackupSize",
    RemoteParams,
    result={"type": "object", "properties": {"onDisk": {"type": "integer"}}},
)
async def get_total_backup_size(context: Context, params: RemoteParams) -> dict[str, int]:
    async with context.services.remote(params.remote, create=False) as remote:
        return {"onDisk": await total_backup_size(remote)}
