"""The life of a chain on each kind of remote, through the daemon's services alone.

What each kind alone can do wrong is told by the tests beside it; here all of them hold what
wrappers, encryption and runs expect of them together.
"""

from __future__ import annotations

import json
import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from proxy.config import Config
from proxy.config.schema import RemoteOptions, RemotesConfig
from proxy.config.values import Seconds
from proxy.errors import ProxyError
from proxy.jobs.metadata_restore import MetadataRestoreRequest
from proxy.remotes.faults import Flip
from proxy.repository import (
    delete_backups,
    delete_metadata_backup,
    list_all,
    list_config_backups,
    list_pool_backups,
)
from proxy.simulator import SimulatedPool
from tests.remotes import samba as samba_server
from tests.remotes import server as file_server
from tests.remotes.objects.fake_s3 import FakeS3, serving

from . import test_metadata_backup as metadata
from .conftest import KEY, House, open_house
from .test_incremental_backup import MIB, back_up, change, digests, restored
from .test_verify_run import statuses, verified

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.azurite import Azurite

QUERY = f"useVhdDirectory=true&encryptionKey={quote(json.dumps(KEY))}"


async def url_of(
    kind: str, query: str, house: House, stack: AsyncExitStack, request: pytest.FixtureRequest
) -> str:
    if kind == "s3":
        server = await stack.enter_async_context(serving(FakeS3(page=50)))
        url, _, rest = server.url("dir").partition("#")
        return f"{url}?{query}" + (f"#{rest}" if rest else "")
    if kind == "azure":
        emulator: Azurite = request.getfixturevalue("azurite")
        return emulator.url(f"/c{secrets.token_hex(8)}/dir", f"?{query}")
    if kind == "nfs":
        return f"nfs://server:{house.root / 'export'}?{query}"
    if kind == "smb":
        path = str(house.root / "export").replace("/", "\\")
        return f"smb://user:pass@DOMAIN\\\\server\\share\0{path}?{query}"
    reason = samba_server.why_not()
    if reason is not None:
        pytest.skip(reason)
    samba = stack.enter_context(samba_server.started(house.root))
    return samba.url(house.root / "export", query=f"&{query}")


@pytest.mark.parametrize("kind", ["s3", "azure", "nfs", "smb", "smb without a mount"])
async def test_an_encrypted_chain_lives_on_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    await live(tmp_path, kind, QUERY, monkeypatch, request)


@pytest.mark.parametrize("kind", ["nfs", "smb"])
async def test_a_chain_of_files_lives_on_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    await live(tmp_path, kind, "useVhdDirectory=false", monkeypatch, request)


@asynccontextmanager
async def house_with(
    tmp_path: Path,
    kind: str,
    query: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> AsyncIterator[House]:
    """Services of which ``remote1`` is of that kind."""
    async with AsyncExitStack() as stack:
        mounts = tmp_path / "mounts"
        if kind in ("nfs", "smb"):
            mounts = stack.enter_context(file_server.serving(tmp_path, monkeypatch)).mounts
        config = Config(
            remotes=RemotesConfig(disable_file_remotes=False),
            remote_options=RemoteOptions(mounts_dir=mounts),
            resource_cache_delay=Seconds(0),
        )
        pool = SimulatedPool.small(disk_size=8 * MIB)
        house = await stack.enter_async_context(open_house(pool, tmp_path, config=config))
        url = await url_of(kind, query, house, stack, request)
        house.remotes["remote1"] = {"id": "remote1", "name": "remote1", "url": url}
        yield house


async def live(
    tmp_path: Path,
    kind: str,
    query: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    async with house_with(tmp_path, kind, query, monkeypatch, request) as house:
        spec = house.remote_spec("remote1")
        points: list[list[str]] = []
        for number in range(3):
            change(house, number, number + 1)
            points.append(digests(house))
            outcome = await back_up(house, exportRetention=2)
            assert outcome.status == "success", outcome.snapshot
        vm = house.pool.vm_uuid("vm1")
        async with house.services.remote(spec) as remote:
            backups = [backup.id for backup in (await list_all(remote))[vm]]
        assert [await restored(house, each) for each in backups] == points[-2:]
        assert statuses(await verified(house, "remote1", level="read")) == ["ok", "ok"]
        async with house.services.remote(spec) as remote:
            await delete_backups(remote, backups[:1])
        assert await restored(house, backups[1]) == points[-1]
        if query != QUERY:
            return
        async with house.faulty() as faults:
            flip = faults.add("read_file", Flip(), path="*/blocks/*")
            assert statuses(await verified(house, "remote1", level="read")) == ["ok"]
            assert not faults.unused, "one bad read is looked at twice"
            faults.add("read_file", flip, path="*/blocks/*", times=99)
            assert statuses(await verified(house, "remote1", level="read")) == ["damaged"]
        url = spec["url"]
        other = {**spec, "url": url.replace(quote(json.dumps(KEY)), quote(json.dumps(KEY[::-1])))}
        with pytest.raises(ProxyError, match="key"):
            async with house.services.remote(other):
                pass


@pytest.mark.parametrize("kind", ["s3", "azure", "nfs", "smb without a mount"])
async def test_metadata_backups_live_on_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    async with house_with(tmp_path, kind, QUERY, monkeypatch, request) as house:
        spec = house.remote_spec("remote1")
        for _ in range(3):
            outcome = await house.run(metadata.request(house))
            assert outcome.status == "success", outcome.snapshot
        async with house.services.remote(spec) as remote:
            configurations = await list_config_backups(remote)
            pools = (await list_pool_backups(remote))[metadata.pool_uuid(house)]
            assert [len(configurations), len(pools)] == [2, 2], "retention"
            await delete_metadata_backup(remote, configurations[0]["id"])
            assert await list_config_backups(remote) == configurations[1:]
        asked = MetadataRestoreRequest(configurations[1]["id"], spec)
        back = await house.outcome(await house.services.start_metadata_restore(asked))
        assert back.log[-1]["result"] == metadata.CONFIG
        asked = MetadataRestoreRequest(pools[1]["id"], spec, house.xapi_spec, dry_run=True)
        looked = await house.outcome(await house.services.start_metadata_restore(asked))
        assert looked.status == "success", looked.snapshot
        assert house.pool.dry_runs == 1
        assert house.pool.restored == []
