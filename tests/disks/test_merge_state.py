from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.disks.merge_state import (
    MergeState,
    Step,
    disk_of_state,
    is_disk_name,
    read_states,
    remove_state,
    state_path,
    write_state,
)
from proxy.errors import Corrupt, NotFound
from proxy.remotes.local import LocalRemote

if TYPE_CHECKING:
    from pathlib import Path

PARENT = UUID("6f2c1b1e-6d0f-4a5e-9d9f-3f5d1f3a0001")
CHILD = UUID("6f2c1b1e-6d0f-4a5e-9d9f-3f5d1f3a0002")
PATH = "vdis/job/vdi/.p.vhd.merge.json"
# As Xen Orchestra writes it.
RECORDED = (
    b'{"child":{"uuid":"6f2c1b1e-6d0f-4a5e-9d9f-3f5d1f3a0002"},'
    b'"parent":{"uuid":"6f2c1b1e-6d0f-4a5e-9d9f-3f5d1f3a0001"},'
    b'"chain":["p.vhd","c.vhd"],"currentBlock":1,"mergedDataSize":0,'
    b'"step":"mergeBlocks","diskSize":0}'
)
STATE = MergeState(chain=("p.vhd", "c.vhd"), next_block=1, child_uuid=CHILD, parent_uuid=PARENT)


def test_it_is_byte_for_byte_what_xen_orchestra_writes() -> None:
    assert STATE.encode() == RECORDED
    assert MergeState.parse(RECORDED, PATH) == STATE


def test_states_of_former_years_are_read() -> None:
    """The step `cleanupVhds` stops every later merge of Xen Orchestra's."""
    old = {
        "child": {"header": 4294966000},
        "parent": {"header": 4294966001},
        "currentBlock": 7,
        "mergedDataSize": 4194304,
        "step": "cleanupVhds",
        "vhdSize": 1234,
    }
    assert MergeState.parse(json.dumps(old).encode(), PATH) == MergeState(
        chain=None, step=Step.CLEANUP, next_block=7, merged_size=4194304, final_size=1234
    )


@pytest.mark.parametrize("current", [None, -1, "x", True])
def test_a_block_that_is_no_count_is_the_first(current: Any) -> None:
    state = json.loads(RECORDED) | {"currentBlock": current}
    assert MergeState.parse(json.dumps(state).encode(), PATH).next_block == 0


@pytest.mark.parametrize(
    "change",
    [
        {"step": "cleanUp"},
        {"step": None},
        {"chain": ["p.vhd"]},
        {"chain": "p.vhd"},
        {"chain": ["p.vhd", "../other/c.vhd"]},
        {"chain": ["p.vhd", "data/c.vhd"]},
        {"chain": ["p.vhd", ".1.c.vhd"]},
        {"chain": ["p.vhd", 3]},
        {"chain": ["p.vhd", "p.vhd"]},
        {"chain": ["q.vhd", "c.vhd"]},
        {"chain": ["p.vhd", "c.txt"]},
    ],
)
def test_what_is_not_understood_is_no_state(change: dict[str, Any]) -> None:
    state = json.loads(RECORDED) | change
    with pytest.raises(Corrupt):
        MergeState.parse(json.dumps(state).encode(), PATH)


@given(st.binary())
def test_bytes_are_a_state_or_corrupt(data: bytes) -> None:
    with contextlib.suppress(Corrupt):
        MergeState.parse(data, PATH)


def test_names() -> None:
    assert state_path("a/b/p.alias.vhd") == "a/b/.p.alias.vhd.merge.json"
    assert disk_of_state(".p.alias.vhd.merge.json") == "p.alias.vhd"
    for name in (".merge.json", "p.vhd.merge.json", ".p.merge.json", ".p.vhd.merge.json.tmp"):
        assert disk_of_state(name) is None
    assert not is_disk_name(".1795485541901.20260101T000000Z.vhd")


async def test_it_is_kept_beside_the_disk(tmp_path: Path) -> None:
    remote = await LocalRemote.open(str(tmp_path), url="file:///x")
    folder, disk = "vdis/job/vdi", "vdis/job/vdi/p.vhd"
    await write_state(remote, disk, STATE)
    assert (tmp_path / PATH).read_bytes() == RECORDED
    names = ["c.vhd", ".p.vhd.merge.json", "p.vhd", ".c.vhd.merge.json", "data", ".x.merge.json"]
    states = await read_states(remote, folder, names)
    assert list(states) == [f"{folder}/c.vhd", disk], "the listing says which are read"
    assert isinstance(states[f"{folder}/c.vhd"], NotFound), "gone since the listing"
    assert states[disk] == STATE
    (tmp_path / PATH).write_bytes(b"")
    [(path, error)] = (await read_states(remote, folder, [".p.vhd.merge.json"])).items()
    assert path == disk
    assert isinstance(error, Corrupt)
    await remove_state(remote, disk)
    assert not (tmp_path / PATH).exists()
    assert await read_states(remote, folder, ["p.vhd"]) == {}
    await remote.aclose()
