"""Taking the snapshot that a backup reads, and leaving none behind when that goes wrong."""

from __future__ import annotations

import base64
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

import httpx
import structlog
import trio

from proxy.errors import ProxyError, Refused, Unreachable, XapiError
from proxy.runtime.deadlines import deadline, undo_within
from proxy.runtime.trouble import tell_trouble
from proxy.xapi import ownership, vms
from proxy.xapi.together import together

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.xapi.client import Xapi
    from proxy.xapi.vms import Record

_log = structlog.get_logger(__name__)

TEMPORARY_NAME: Final = "xo-backup-temp-snapshot-name"
"""Both we and Xen Orchestra destroy any snapshot that still has this name at the next run."""
NO_BACKUP: Final = "[NOBAK]"
HOOK_TAG: Final = "xo:notify-on-snapshot"
HOOK_PORT: Final = 1727
UNDO_SECONDS: Final = 300.0
_LARGEST_CHAIN: Final = 256


async def take_snapshot(
    xapi: Xapi,
    vm_ref: str,
    name: str = TEMPORARY_NAME,
    *,
    checkpoint: bool = False,
    bypass_chain_check: bool = False,
    marks: Mapping[str, str] | None = None,
    marked: Mapping[str, str] | None = None,
) -> str:
    """Snapshot a VM (``checkpoint``: with its memory) and return the snapshot's reference.

    Disks whose name holds ``[NOBAK]`` are left out, except from a checkpoint.  A VM whose
    state allows no checkpoint gets a plain snapshot.  ``marks`` are put on the live VM while
    the snapshot is taken, from which the host copies them: it is marked from its first moment.
    ``marked`` are instead marks that the VM has anyway, and keeps.

    Raises ``Refused`` with the exact message ``unhealthy VDI chain`` (XO shows the VM as
    skipped), or ``XapiError``.  On failure or cancel no snapshot of ours remains and the USB
    devices are back, shielded and bounded.
    """
    vm = await xapi.record("VM", vm_ref)
    disks = await vms.disks(xapi, vm)
    if not bypass_chain_check:
        await check_chains(xapi, disks)
    ignored = [ref for _, ref, vdi in disks if NO_BACKUP in str(vdi.get("name_label"))]
    before = set(vm.get("snapshots") or [])
    notified = await _notify(xapi, vm, "/sync")
    try:
        async with AsyncExitStack() as undo:
            if marks:
                await undo.enter_async_context(ownership.marked(xapi, vm_ref, marks))
            if vm.get("power_state") == "Halted":
                await undo.enter_async_context(_without_usb(xapi, vm))
            snapshot = await _take(
                xapi,
                vm_ref,
                name,
                checkpoint=checkpoint,
                ignored=ignored,
                before=before,
                marks=marks or marked or {},
            )
    finally:
        # The guest froze its applications: it must hear the end also when we failed.
        if notified:
            with trio.CancelScope(shield=True):  # bounded by the hook's own deadline
                await _notify(xapi, vm, "/post-sync")
    try:
        await vms.not_a_template(xapi, snapshot)
    except BaseException:
        await _discard(xapi, snapshot)
        raise
    return snapshot


async def _take(
    xapi: Xapi,
    vm_ref: str,
    name: str,
    *,
    checkpoint: bool,
    ignored: list[str],
    before: set[str],
    marks: Mapping[str, str],
) -> str:
    async def discard(result: Any) -> None:
        await _discard(xapi, str(result))

    try:
        if checkpoint:
            try:
                return str(
                    await xapi.call_async("VM.checkpoint", vm_ref, name, on_late_success=discard)
                )
            except XapiError as error:
                if error.code != "VM_BAD_POWER_STATE":
                    raise
        if ignored:
            try:
                return str(
                    await xapi.call_async(
                        "VM.snapshot", vm_ref, name, ignored, on_late_success=discard
                    )
                )
            except XapiError as error:
                if not _one_argument_too_many(error):
                    raise
        snapshot = str(await xapi.call_async("VM.snapshot", vm_ref, name, on_late_success=discard))
    except BaseException as error:
        # A cancelled task may have come to its effect, one whose end is unknown too.  Without
        # marks a search is only worth its doubt when the call itself was lost.
        lost = isinstance(error, Unreachable) or (
            isinstance(error, XapiError) and error.code == "TASK_DESTROYED"
        )
        if marks or lost:
            await _discard_lost(xapi, vm_ref, name, before, marks)
        raise
    if ignored:
        await _drop_ignored(xapi, snapshot, ignored)
    return snapshot


def _one_argument_too_many(error: XapiError) -> bool:
    """Whether the host (before xapi 21.4) knows no list of ignored disks.

    Any other mismatch is an error of its own and must not drop an argument.
    """
    if error.code != "MESSAGE_PARAMETER_COUNT_MISMATCH" or len(error.params) != 3:
        return False
    method, expected, received = error.params
    if not method.removeprefix("Async.").startswith("VM.snapshot"):
        return False
    return expected.isdigit() and received.isdigit() and int(received) - int(expected) == 1


async def _drop_ignored(xapi: Xapi, snapshot: str, ignored: list[str]) -> None:
    """An old host snapshots everything: destroy the copies of the ignored disks.

    The live VM keeps its disks all the time; taking them off it for the snapshot would leave
    it without them after a crash.
    """
    try:
        for _, ref, vdi in await vms.disks(xapi, await xapi.record("VM", snapshot)):
            if vdi.get("snapshot_of") in ignored:
                await vms.destroy_vdi(xapi, ref)
    except BaseException:
        await _discard(xapi, snapshot)
        raise


async def _discard(xapi: Xapi, snapshot: str) -> None:
    try:
        with undo_within("snapshot: destroy", UNDO_SECONDS):
            await vms.destroy_vm(xapi, snapshot, bypass_blocked=True)
    except ProxyError as error:
        tell_trouble("could not destroy a snapshot", error, snapshot=snapshot)


async def _discard_lost(
    xapi: Xapi, vm_ref: str, name: str, before: set[str], marks: Mapping[str, str]
) -> None:
    """Destroy a snapshot that was made although its call was lost.

    It is new since the call, of this VM, and has the temporary name and the marks.  Under any
    other name, or when there are several, it may be somebody else's and stays.
    """
    if name != TEMPORARY_NAME:
        return
    try:
        with undo_within("snapshot: search for a lost one", UNDO_SECONDS):
            vm = await vms.record_or_none(xapi, "VM", vm_ref)
            now: list[str] = [] if vm is None else vm.get("snapshots") or []
            lost = [ref for ref in now if ref not in before and await _is(xapi, ref, name, marks)]
            if len(lost) == 1:
                await vms.destroy_vm(xapi, lost[0], bypass_blocked=True)
            elif lost:
                _log.warning("several unfinished snapshots: kept for the next run", vm=vm_ref)
    except ProxyError as error:
        tell_trouble("could not search for an unfinished snapshot", error, vm=vm_ref)


async def _is(xapi: Xapi, ref: str, name: str, marks: Mapping[str, str]) -> bool:
    record = await vms.record_or_none(xapi, "VM", ref)
    if record is None or record.get("name_label") != name:
        return False
    config: dict[str, str] = record.get("other_config") or {}
    return all(config.get(key) == value for key, value in marks.items())


@asynccontextmanager
async def _without_usb(xapi: Xapi, vm: Record) -> AsyncIterator[None]:
    """Take the USB devices off a halted VM (a host refuses its snapshot) and put them back."""
    devices: list[tuple[str, Record]] = []
    refs: list[str] = vm.get("VUSBs") or []
    for ref in refs:
        record = await vms.record_or_none(xapi, "VUSB", ref)
        if record is not None:
            devices.append((ref, record))
    try:
        for ref, _ in devices:
            await xapi.call("VUSB.destroy", ref)
        yield
    finally:
        for ref, device in devices:
            try:
                with undo_within("snapshot: USB device back", UNDO_SECONDS):
                    if await vms.record_or_none(xapi, "VUSB", ref) is None:
                        await xapi.call(
                            "VUSB.create",
                            device["VM"],
                            device["USB_group"],
                            device.get("other_config") or {},
                        )
            except ProxyError as error:
                tell_trouble(
                    "could not give a USB device back to its VM",
                    error,
                    vm=device["VM"],
                    usb_group=device["USB_group"],
                )


async def check_chains(xapi: Xapi, disks: list[tuple[Record, str, Record]]) -> None:
    """Refuse to lengthen chains that the SR has not coalesced.

    Along the parents of each disk (``sm_config.vhd-parent``), an unmanaged VDI whose only
    child is unmanaged too waits to be coalesced; more than ``max_uncoalesced_vdis`` of them
    raise ``Refused``.  A VDI that cannot be read ends the walk without an error.
    """

    async def of_sr(sr: str) -> dict[str, Record]:
        return await xapi.records_where("VDI", f'field "SR" = "{sr}"')

    srs = sorted({str(vdi["SR"]) for _, _, vdi in disks})
    for found in await together(of_sr, srs):
        by_uuid = {str(vdi["uuid"]): vdi for vdi in found.values()}
        children: dict[str, list[Record]] = {}
        for vdi in found.values():
            children.setdefault(_parent(vdi), []).append(vdi)
        for _, ref, _ in disks:
            if ref in found:
                _check_chain(found[ref], by_uuid, children, xapi.options.max_uncoalesced_vdis)


def _check_chain(
    vdi: Record, by_uuid: Mapping[str, Record], children: Mapping[str, list[Record]], tolerance: int
) -> None:
    current: Record | None = vdi
    for _ in range(_LARGEST_CHAIN):
        if current is None:
            return
        if not current["managed"]:
            below = children.get(str(current["uuid"]), [])
            if len(below) == 1 and not below[0]["managed"]:
                tolerance -= 1
                if tolerance < 0:
                    raise Refused(
                        "unhealthy VDI chain",
                        code="UNHEALTHY_VDI_CHAIN",
                        data={"vdi": vdi["uuid"]},
                    )
        current = by_uuid.get(_parent(current))


def _parent(vdi: Record) -> str:
    config: dict[str, str] = vdi.get("sm_config") or {}
    return config.get("vhd-parent", "")


async def _notify(xapi: Xapi, vm: Record, path: str) -> bool:
    """Call the hook in the guest, if its VM is tagged and running; never raises an error.

    Returns whether the guest was asked and answered.
    """
    if vm.get("power_state") != "Running":
        return False
    tags: list[str] = vm.get("tags") or []
    wanted = [tag for tag in tags if tag == HOOK_TAG or tag.startswith(f"{HOOK_TAG}=")]
    if not wanted:
        return False
    try:
        url = await _hook_url(xapi, vm, wanted[-1], path)
        with deadline(f"snapshot hook: {path}", xapi.options.hook_timeout):
            await _get(url, xapi.options.hook_secret)
    except (ProxyError, httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        _log.warning("snapshot hook failed", vm=vm.get("uuid"), path=path, error=str(error))
        return False
    return True


async def _hook_url(xapi: Xapi, vm: Record, tag: str, path: str) -> str:
    given = tag.partition("=")[2]
    if given:
        return urlunsplit(urlsplit(given)._replace(path=path))
    metrics = await xapi.record("VM_guest_metrics", str(vm.get("guest_metrics")))
    networks: Mapping[str, str] = metrics.get("networks") or {}
    known = [networks[key] for key in sorted(networks) if networks[key]]
    # IPv4 first, as the tools of old guests listen there only.
    ordered = [ip for ip in known if ":" not in ip] + [f"[{ip}]" for ip in known if ":" in ip]
    if not ordered:
        raise ValueError("the guest reports no address")
    return f"https://{ordered[0]}:{HOOK_PORT}{path}"


async def _get(url: str, secret: str | None) -> None:
    headers: dict[str, str] = {}
    if secret is not None:
        # The form that the guest's agent for XO's hook checks: the secret in base64.
        headers["Authorization"] = f"Bearer {base64.b64encode(secret.encode()).decode()}"
    # A guest has a self-signed certificate; its answer is not used beyond its status.
    async with (
        httpx.AsyncClient(verify=False, timeout=httpx.Timeout(None), trust_env=False) as client,  # noqa: S501
        client.stream("GET", url, headers=headers) as response,
    ):
        response.raise_for_status()
