"""Restores of metadata backups: the recorded logs, the host's word, a configuration as it was."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.errors import Corrupt, NotFound, ProxyError, Refused, Unauthorized
from proxy.jobs import MetadataRestoreRequest
from proxy.remotes.faults import Fail
from proxy.runtime import secrets
from proxy.tasks import Task

from .conftest import House
from .test_full_backup import recorded, shape
from .test_metadata_backup import backups, clean, request
from .test_sweep import dead_run, exists, make_vm, marks, swept

RECORDED = Path(__file__).parents[1] / "fixtures" / "repository" / "metadata" / "remote"


def backup_id(house: House, folder: Path) -> str:
    """As Xen Orchestra sends it: without the leading slash."""
    return str(folder.relative_to(house.folder()))


async def restore(
    house: House, folder: Path | str, *, dry_run: bool = False, xapi: Any = True, **changes: Any
) -> Task:
    named = folder if isinstance(folder, str) else backup_id(house, folder)
    spec = {**house.xapi_spec, **changes} if xapi else None
    return await house.services.start_metadata_restore(
        MetadataRestoreRequest(named, house.remote_spec("remote1"), spec, dry_run)
    )


async def test_the_log_of_a_pool_is_the_recorded_one(house: House) -> None:
    await house.run(request(house))
    folder = backups(house, "pool")[0]
    outcome = await house.outcome(await restore(house, folder))
    for record in outcome.log[:1]:  # weakness 18: upstream's metadata lacks the master
        record["properties"]["metadata"].pop("poolMaster")
    theirs = recorded("metadata-restore-pool.ndjson")
    for log in (outcome.log, theirs):
        pool = log[0]["properties"]["metadata"]["pool"]
        log[0]["properties"]["metadata"]["pool"] = {key: pool[key] for key in ("uuid",)}
    assert shape(outcome.log) == shape(theirs)
    assert outcome.log[-1]["result"] == theirs[-1]["result"] == ""
    assert house.pool.restored == [(folder / "data").read_bytes()]
    assert house.pool.dry_runs == 0
    tasks = [call.params[0] for call in house.pool.calls.log if call.method == "task.create"]
    assert tasks[-1] == "[XO] Import pool metadata"
    await clean(house)


async def test_the_log_of_a_configuration_is_the_recorded_one(house: House) -> None:
    shutil.copytree(RECORDED, house.folder())
    folder = backups(house, "xo")[0]
    outcome = await house.outcome(await restore(house, folder, xapi=False))
    theirs = recorded("metadata-restore-xo.ndjson")
    for log in (outcome.log, theirs):
        for record in log:
            record.pop("id")
            record.pop("timestamp")
    assert outcome.log == theirs
    assert [r["type"] for r in outcome.log] == ["start", "end"], "no subtask"


async def test_what_xen_orchestra_stored_is_restored_to_a_pool(house: House) -> None:
    shutil.copytree(RECORDED, house.folder())
    folder = backups(house, "pool")[0]
    outcome = await house.outcome(await restore(house, folder))
    # this host is of another version: it looks at all of it and says so
    assert outcome.error("metadataRestore")["code"] == "RESTORE_INCOMPATIBLE_VERSION"
    (transfer,) = house.pool.transfer_log
    assert transfer.sent == (folder / "data").stat().st_size


async def test_weakness_19_a_restore_can_be_tried_first(house: House) -> None:
    """Upstream never sends ``dry_run``: every try reboots the master."""
    await house.run(request(house))
    folder = backups(house, "pool")[0]
    outcome = await house.outcome(await restore(house, folder, dry_run=True))
    assert outcome.status == "success"
    assert outcome.log[0]["properties"]["dryRun"] is True
    assert outcome.log[-1]["result"] == {"accepted": True, "answer": ""}
    assert (house.pool.restored, house.pool.dry_runs) == ([], 1)
    await clean(house)


@pytest.mark.parametrize("dry_run", [False, True])
async def test_the_hosts_refusal_is_the_answer(house: House, dry_run: bool) -> None:
    await house.run(request(house))
    folder = backups(house, "pool")[0]
    house.pool.fail("/pool/xmldbdump", error=("RESTORE_TARGET_MISSING_DEVICE", "eth1"))
    outcome = await house.outcome(await restore(house, folder, dry_run=dry_run))
    result = outcome.log[-1]["result"]
    assert (outcome.log[-1]["status"], result["code"], result["params"]) == (
        "failure",
        "RESTORE_TARGET_MISSING_DEVICE",
        ["eth1"],
    )
    (folder / "data").write_bytes((folder / "data").read_bytes()[:-30])
    outcome = await house.outcome(await restore(house, folder, dry_run=dry_run))
    assert outcome.log[-1]["result"]["code"] == "INTERNAL_ERROR"
    assert (house.pool.restored, house.pool.dry_runs) == ([], 0)
    await clean(house)


async def test_a_connection_that_breaks_restores_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.xapi.transfer.EXPLAIN_SECONDS", 0.5)
    house.pool.database_filler = 8_000_000
    await house.run(request(house))
    folder = backups(house, "pool")[0]
    house.pool.fail("/pool/xmldbdump", cut="reset", after_bytes=1_000_000)
    outcome = await house.outcome(await restore(house, folder))
    assert outcome.status == "failure"
    async with house.faulty() as faults:
        faults.add("read.read_into", Fail(Corrupt("the tag of the file is wrong")), skip=1)
        outcome = await house.outcome(await restore(house, folder))
    assert outcome.error("metadataRestore")["message"] == "the tag of the file is wrong"
    assert house.pool.restored == []
    await clean(house)


async def test_weakness_5_a_restore_keeps_what_it_needs_open(house: House) -> None:
    """Upstream lets go of the remote and the pool when the answer begins; what is unused is closed
    at once here."""
    house.pool.database_filler = 8_000_000
    await house.run(request(house))
    folder = backups(house, "pool")[0]
    gate = house.pool.pause_at("/pool/xmldbdump", at_bytes=1_000_000)
    task = await restore(house, folder)
    await gate.reached()
    await trio.sleep(0.3)
    gate.release()
    assert (await house.outcome(task)).status == "success"
    assert house.pool.restored == [(folder / "data").read_bytes()]
    await clean(house)


async def test_dead_runs_are_swept_while_the_pool_still_knows_whose_they_are(house: House) -> None:
    await house.run(request(house))
    left, disk = make_vm(house.pool, marks(house, await dead_run(house)))
    await house.outcome(await restore(house, backups(house, "pool")[0], dry_run=True))
    assert exists(house.pool, left, disk) == [True, True], "a dry run changes nothing"
    outcome = await house.outcome(await restore(house, backups(house, "pool")[0]))
    assert (outcome.status, len(swept(outcome))) == ("success", 1)
    assert exists(house.pool, left, disk) == [False, False]


async def test_an_empty_database_is_never_sent(house: House) -> None:
    await house.run(request(house))
    folder = backups(house, "pool")[0]
    (folder / "data").write_bytes(b"")
    outcome = await house.outcome(await restore(house, folder))
    assert outcome.error("metadataRestore")["code"] == "ECORRUPT"
    (folder / "data").unlink()
    outcome = await house.outcome(await restore(house, folder))
    assert outcome.error("metadataRestore")["code"] == "ENOENT"
    assert house.pool.restored == []


async def test_a_configuration_comes_back_as_it_was(house: House) -> None:
    """With the secrets in it, which must be in no answer but this one."""
    secrets.remember("the-password-of-a-remote")
    text = '{"remotes":[{"url":"smb://u:the-password-of-a-remote@h"}],"ü":"\\u0000"}'
    outcome = await house.run(request(house, pools=[], xoMetadata=text))
    outcome = await house.outcome(await restore(house, backups(house, "xo")[-1], xapi=False))
    assert outcome.log[-1]["result"] == text
    assert "the-password" not in json.dumps(outcome.snapshot)
    kept = bytes(await house.services.tasks.get(outcome.task.id))
    assert b"the-password" not in kept
    content = base64.b64encode(bytes(range(256))).decode()
    given = {"encoding": "base64", "data": content}
    await house.run(request(house, pools=[], xoMetadata=given))
    outcome = await house.outcome(await restore(house, backups(house, "xo")[-1], xapi=False))
    assert outcome.log[-1]["result"] == given


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ("../../../secret", "ECORRUPT"),
        ("./.hidden", "ECORRUPT"),
        ("/etc/passwd", "ECORRUPT"),
        (["data"], "ECORRUPT"),
        ("./other.json", "ENOENT"),
        (None, "success"),
    ],
)
async def test_metadata_names_no_file_elsewhere(house: House, data: Any, code: str) -> None:
    await house.run(request(house, pools=[]))
    folder = backups(house, "xo")[0]
    (house.root / "secret").write_text("secret")
    metadata = json.loads((folder / "metadata.json").read_bytes())
    (folder / "metadata.json").write_text(json.dumps({**metadata, "data": data}))
    outcome = await house.outcome(await restore(house, folder, xapi=False))
    end = outcome.log[-1]
    assert (end["status"] if code == "success" else end["result"]["code"]) == code


async def test_a_configuration_that_is_no_text_is_not_made_one(house: House) -> None:
    await house.run(request(house, pools=[]))
    folder = backups(house, "xo")[0]
    (folder / "data.json").write_bytes(b'{"a":"\xff"}')
    outcome = await house.outcome(await restore(house, folder, xapi=False))
    assert outcome.error("metadataRestore")["code"] == "ECORRUPT"


async def test_what_is_wrong_is_said_before_there_is_a_task(house: House) -> None:
    await house.run(request(house))
    pool, config = backups(house, "pool")[0], backups(house, "xo")[0]
    wrong: list[tuple[Any, dict[str, Any], type[ProxyError], str]] = [
        ("xo-config-backups/../x", {}, Refused, "backupId"),
        (f"{backup_id(house, pool)}/data", {}, Refused, "backupId"),
        (pool, {"xapi": False}, Refused, "xapi"),
        (config, {"dry_run": True}, Refused, "dryRun"),
    ]
    for named, changes, kind, part in wrong:
        with pytest.raises(kind) as caught:
            await restore(house, named, **changes)
        assert caught.value.data["part"] == part
    with pytest.raises(NotFound):
        await restore(house, backup_id(house, pool)[:-16] + "20200101T000000Z")
    with pytest.raises(Unauthorized):
        await restore(house, pool, credentials={"username": "root", "password": "wrong"})
    (pool / "metadata.json").write_text("{")
    with pytest.raises(Corrupt):
        await restore(house, pool)
    assert house.pool.restored == []
