from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt, NotFound
from proxy.repository.metadata import decode_backup, encode_full, format_listing, read_backup
from tests.repository.conftest import RECORDED, VM, place_recorded, recorded

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.remotes.interface import Remote

FULL = RECORDED / "full" / "remote" / "xo-vm-backups" / VM / "20261124T015901Z.json"
PATH = f"/xo-vm-backups/{VM}/20261124T015901Z.json"


def test_what_we_write_is_byte_for_byte_what_upstream_wrote() -> None:
    raw = FULL.read_bytes()
    fields = json.loads(raw)
    given = {key: fields[key] for key in ("tags", "vmSnapshot", "vm", "timestamp")}
    given |= {key: fields[key] for key in ("scheduleId", "jobId")}
    assert encode_full(given, xva="20261124T015901Z.xva", size=8429568) == raw


def test_a_missing_snapshot_is_left_out_and_more_fields_come_last() -> None:
    raw = encode_full(
        {"jobId": "j", "scheduleId": "s", "timestamp": 1, "vm": {}, "vmSnapshot": None, "new": 2},
        xva="a.xva",
        size=3,
    )
    assert raw == (
        b'{"jobId":"j","mode":"full","scheduleId":"s","timestamp":1,"version":"2.0.0","vm":{},'
        b'"xva":"./a.xva","size":3,"tags":[],"new":2}'
    )


@pytest.mark.parametrize("name", ["full", "delta"])
def test_entries_are_as_recorded(name: str) -> None:
    answer = recorded(f"{name}/listing.json")["remote1"][VM]
    for entry in answer:
        raw = (RECORDED / name / "remote" / entry["id"][1:]).read_bytes()
        ours = format_listing(decode_backup(raw, entry["id"]), "remote1")
        assert msgspec.json.encode(ours) == json.dumps(entry, separators=(",", ":")).encode()


def test_memory_is_counted_apart() -> None:
    raw = json.dumps(
        {
            "mode": "delta",
            "vm": {},
            "vmSnapshot": {"suspend_VDI": "OpaqueRef:m"},
            "isVhdDifferencing": {"OpaqueRef:m": False, "OpaqueRef:a": True, "OpaqueRef:b": False},
        }
    ).encode()
    entry = format_listing(decode_backup(raw, PATH), "r")
    assert (entry["differencingVhds"], entry["dynamicVhds"], entry["withMemory"]) == (1, 1, True)


def test_a_disk_without_vdi_record_does_not_fail_the_list() -> None:
    """Upstream: such an entry makes the listing of the whole remote fail."""
    raw = b'{"mode":"delta","vm":{},"vhds":{"OpaqueRef:gone":"vdis/j/d/x.vhd"},"vdis":{}}'
    entry = format_listing(decode_backup(raw, PATH), "r")
    assert entry["disks"] == [{"id": f"/xo-vm-backups/{VM}/vdis/j/d/x.vhd"}]


def test_disks_as_an_array() -> None:
    raw = b'{"mode":"delta","vm":{},"vhds":["vdis/j/d/x.vhd"]}'
    assert len(format_listing(decode_backup(raw, PATH), "r")["disks"]) == 1


def test_odd_fields_are_forgotten_and_the_rest_is_kept() -> None:
    raw = json.dumps(
        {
            "mode": "full",
            "jobId": 5,
            "size": "many",
            "timestamp": None,
            "tags": {"a": 1},
            "vm": {"uuid": VM, "name_label": 7, "tags": ["x"]},
            "vmSnapshot": {"suspend_VDI": 0},
            "xva": "./a.xva",
        }
    ).encode()
    backup = decode_backup(raw, PATH)
    assert (backup.mode, backup.xva, backup.vm.uuid, backup.vm.tags) == (
        "full",
        "./a.xva",
        VM,
        ["x"],
    )
    assert (backup.job_id, backup.size, backup.vm.name_label, backup.tags) == (None, None, None, [])
    assert backup.timestamp == 1795485541000, "the time of the name"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"{}", b'{"vm":1}', b"\xff", b"[" * 100_000, b'{"vm":{}'[:-1]],
)
def test_unusable_metadata_is_corrupt(raw: bytes) -> None:
    with pytest.raises(Corrupt) as caught:
        decode_backup(raw, PATH)
    assert caught.value.data["path"] == PATH


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)
FIELDS = st.sampled_from(
    ["mode", "jobId", "timestamp", "size", "tags", "vm", "vmSnapshot", "vhds", "vdis", "xva"]
)


@given(st.dictionaries(FIELDS, JSON))
def test_any_json_is_listed_or_corrupt(value: dict[str, Any]) -> None:
    try:
        backup = decode_backup(json.dumps(value).encode(), PATH)
    except Corrupt:
        assert not isinstance(value.get("vm"), dict)
        return
    json.dumps(format_listing(backup, "r"))


@given(st.binary())
def test_any_bytes_are_listed_or_corrupt(raw: bytes) -> None:
    with pytest.raises(Corrupt):
        decode_backup(raw, PATH)


async def test_the_whole_metadata_is_read(remote: Remote, root: Path) -> None:
    place_recorded("full", root)
    record = await read_backup(remote, PATH)
    assert record.raw == FULL.read_bytes()
    assert record.metadata == json.loads(record.raw)
    assert record.backup.size == 8429568
    with pytest.raises(NotFound):
        await read_backup(remote, PATH.replace("15901", "15902"))


async def test_numeric_booleans_of_old_hosts_become_booleans(remote: Remote) -> None:
    old = {
        "mode": "delta",
        "vm": {"is_a_template": 0, "ha_always_run": 1, "memory": 1, "is_a_snapshot": 2},
        "vmSnapshot": {"is_a_template": 1, "is_a_snapshot": 1},
        "vbds": {"OpaqueRef:1": {"bootable": 1, "device": 1}},
        "vdis": {"OpaqueRef:2": {"managed": 1, "missing": 0, "size": 1}},
        "vifs": {},
    }
    await remote.write_file(PATH, json.dumps(old).encode())
    metadata = (await read_backup(remote, PATH)).metadata
    assert metadata["vm"] == {
        "is_a_template": False,
        "ha_always_run": True,
        "memory": 1,
        "is_a_snapshot": False,
    }
    assert metadata["vmSnapshot"] == {"is_a_template": True, "is_a_snapshot": 1}
    assert metadata["vbds"]["OpaqueRef:1"] == {"bootable": True, "device": 1}
    assert metadata["vdis"]["OpaqueRef:2"] == {"managed": True, "missing": False, "size": 1}
