"""Changed block tracking against the simulated pool, and answers that no pool should give."""

from __future__ import annotations

import pytest

from proxy.errors import Corrupt, Refused, XapiError
from proxy.simulator import SimulatedPool
from proxy.xapi import Xapi, XapiOptions, connect, vms
from proxy.xapi.cbt import changed_blocks, destroy_data, enable_cbt
from tests.xapi.conftest import FakeHost, clean

MiB = 1024 * 1024


@pytest.fixture
async def tracked(pool: SimulatedPool, xapi: Xapi) -> tuple[str, str]:
    """Two snapshots of a disk of 4 MiB whose second block changed in between."""
    live = pool.vms.disks(pool.vm("vm1"))[0]
    await enable_cbt(xapi, live)
    await enable_cbt(xapi, live)
    base = snapshot(pool)
    pool.write(pool.store.get("VDI", live)["uuid"], 3 * MiB, b"changed")
    new = snapshot(pool)
    pool.mark()
    return base, new


def snapshot(pool: SimulatedPool) -> str:
    """A disk of a snapshot whose VM is gone: as long as it has drives its data stay."""
    vm = pool.do("VM.snapshot", pool.vm("vm1"), "s")
    disk = str(pool.vms.disks(vm)[0])
    pool.do("VM.destroy", vm)
    return disk


async def test_what_changed(pool: SimulatedPool, xapi: Xapi, tracked: tuple[str, str]) -> None:
    base, new = tracked
    blocks = await changed_blocks(xapi, new, base)
    assert (list(blocks), blocks.count) == ([1], 2)
    await destroy_data(xapi, base)
    assert pool.store.get("VDI", base)["type"] == "cbt_metadata"
    assert await changed_blocks(xapi, new, base) == blocks
    await destroy_data(xapi, base)  # twice is fine
    await clean(pool)


async def test_a_disk_that_is_not_tracked(pool: SimulatedPool, xapi: Xapi) -> None:
    with pytest.raises(Refused) as caught:
        await changed_blocks(xapi, snapshot(pool), snapshot(pool))
    assert caught.value.code == "CBT_DISABLED"
    with pytest.raises(XapiError) as failed:
        await destroy_data(xapi, snapshot(pool))
    assert failed.value.code == "VDI_NO_CBT_METADATA"
    with pytest.raises(XapiError) as failed:
        await enable_cbt(xapi, snapshot(pool))
    assert failed.value.code == "OPERATION_NOT_ALLOWED"


async def test_a_host_that_cannot_say_whether_it_tracks(
    pool: SimulatedPool, xapi: Xapi, tracked: tuple[str, str]
) -> None:
    pool.fail("VDI.get_cbt_enabled", error=("MESSAGE_METHOD_UNKNOWN", "VDI.get_cbt_enabled"))
    with pytest.raises(Refused) as caught:
        await changed_blocks(xapi, *reversed(tracked))
    assert caught.value.code == "CBT_DISABLED"


async def test_a_base_that_is_none(
    pool: SimulatedPool, xapi: Xapi, tracked: tuple[str, str]
) -> None:
    with pytest.raises(XapiError) as caught:
        await changed_blocks(xapi, tracked[1], tracked[1])
    assert caught.value.code == "SR_BACKEND_FAILURE_460"
    await clean(pool)


async def test_data_in_use_are_let_go(
    pool: SimulatedPool, xapi: Xapi, tracked: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vms, "_IN_USE_DELAY", 0)
    pool.disks.attach_to_dom0(tracked[0])
    await destroy_data(xapi, tracked[0])
    await clean(pool)
    always = pool.fail("VDI.data_destroy", error=("VDI_IN_USE", tracked[1]), times=None)
    with pytest.raises(XapiError) as caught:
        await destroy_data(xapi, tracked[1])
    assert caught.value.code == "VDI_IN_USE"
    assert always.hits == 11
    pool.faults.clear()
    await destroy_data(xapi, "OpaqueRef:gone")


@pytest.mark.parametrize("answer", ["<value>?</value>", "<value><i4>7</i4></value>"])
async def test_an_answer_that_is_no_bitmap(
    host: FakeHost, options: XapiOptions, answer: str
) -> None:
    async def listed(*_: str) -> str:
        ref = host.new_task()
        host.tasks[ref].update(status="success", result=answer)
        return ref

    host.results = {
        "VDI.get_cbt_enabled": True,
        "VDI.get_virtual_size": 4 * MiB,
        "Async.VDI.list_changed_blocks": listed,
    }
    async with connect(options) as xapi:
        with pytest.raises(Corrupt):
            await changed_blocks(xapi, "new", "base")
    assert ("Async.VDI.list_changed_blocks", ["base", "new"]) in host.calls
