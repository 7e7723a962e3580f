"""A simulated pool: its objects, and the handles by which tests look in and interfere."""

from __future__ import annotations

import hashlib
import random
import zlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import trio

from proxy.simulator.calls import Calls
from proxy.simulator.devices import Devices
from proxy.simulator.disks import DiskContent, ImageFile, Kind
from proxy.simulator.faults import Fault, Faults, Gate, Gates, Stage
from proxy.simulator.guests import STATE as SCRIPT_STATE
from proxy.simulator.leftovers import leftovers
from proxy.simulator.nbd import NbdHosts
from proxy.simulator.sessions import Sessions
from proxy.simulator.store import Store
from proxy.simulator.tasks import Tasks, now
from proxy.simulator.vdi_operations import Disks
from proxy.simulator.vm_operations import VmOperations

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
    from pathlib import Path

    from proxy.simulator.guests import GuestScript
    from proxy.simulator.transfers import Transfer

MiB = 1024 * 1024
PASSWORD = "simulated"  # noqa: S105 - guards nothing but a simulation
_STARTED_DOMAINS = 6


class SimulatedPool:
    """The state of a pool.  :func:`proxy.simulator.serve` puts it on the network.

    Everything follows from ``seed`` except the times.  Belongs to one Trio run.
    """

    def __init__(self, *, seed: int = 0, user: str = "root", password: str = PASSWORD) -> None:
        self.seed = seed
        self.store = Store(seed)
        self.sessions = Sessions(self.store, user, password)
        self.tasks = Tasks(self.store, lambda: self.master)
        self.disks = Disks(self)
        self.vms = VmOperations(self)
        self.devices = Devices(self)
        self.calls = Calls(self)
        self.nbd = NbdHosts(self)
        self.faults = Faults()
        self.gates = Gates()
        self.transfers: set[Transfer] = set()
        self.transfer_log: list[Transfer] = []
        """Every transfer that was accepted, in order."""
        self.connections = 0
        """Open connections."""
        self.url = ""
        """Where the pool listens, once it does."""
        self.latencies: dict[str, float] = {}
        """Seconds that a call needs before its effect, by canonical name."""
        self.boot_seconds = 0.0
        """From the start of a VM until its tools answer; negative: never."""
        self.guest_script: GuestScript | None = None
        """The test that guests run at their boot if it is planned for them."""
        self.dom0_lag = 0.0
        """Seconds that dom0 keeps a disk attached after a transfer."""
        self.is_old = False
        """An old server: VM.snapshot takes no list of disks to leave out."""
        self.coalesces = True
        """Whether hidden parents are merged as soon as they can be."""
        self.reads_on = False
        """Imports do not end with their archive but with the connection, or the length."""
        self.vtpm_contents: dict[str, str] = {}
        self.is_upgrading = False
        """A rolling upgrade is under way: the database is sent without its rows."""
        self.database_filler = 0
        """About how many bytes the sent database is to have beyond those of the pool."""
        self.restored: list[bytes] = []
        """Databases that were restored over this one; each reboots the master."""
        self.dry_runs = 0
        """How many databases were looked at and found good."""
        self._domains = _STARTED_DOMAINS
        self._mutations = 0
        self._nursery: trio.Nursery | None = None
        self._baseline: set[str] = set()
        self._make_hardware()
        self.mark()

    # Making

    def _make_hardware(self) -> None:
        store = self.store
        self.master = store.create(
            "host",
            name_label="sim-host-1",
            hostname="sim-host-1",
            address="127.0.0.1",
            metrics=store.create("host_metrics", memory_total=2**36, memory_free=2**35),
            software_version={
                "product_version": "8.3.0",
                "product_brand": "XCP-ng",
                "build_number": "sim",
                "xapi": "1.20",
            },
        )
        self.slave = store.create(
            "host",
            name_label="sim-host-2",
            hostname="sim-host-2",
            address="127.0.0.2",
            metrics=store.create("host_metrics", memory_total=2**36, memory_free=2**35),
            software_version=store.get("host", self.master)["software_version"],
        )
        self.srs = [self._make_sr("Local storage"), self._make_sr("Storage 2")]
        self.default_sr = self.srs[0]
        self.network = store.create("network", name_label="Pool-wide network 0")
        for number, host in enumerate((self.master, self.slave)):
            store.create(
                "PIF",
                network=self.network,
                host=host,
                MAC=store.new_mac(),
                IP=f"127.0.0.{number + 1}",
            )
        self.dom0 = store.create(
            "VM",
            name_label="Control domain on host: sim-host-1",
            is_control_domain=True,
            power_state="Running",
            resident_on=self.master,
            domid=0,
        )
        store.update("host", self.master, control_domain=self.dom0)
        self.ref = store.create(
            "pool",
            name_label="Simulated pool",
            master=self.master,
            default_SR=self.default_sr,
            suspend_image_SR=self.default_sr,
            restrictions={"restrict_vtpm": "false"},
        )

    def _make_sr(self, name: str) -> str:
        sr = self.store.create("SR", name_label=name, physical_size=2**42, shared=True)
        for host in (self.master, self.slave):
            self.store.create("PBD", SR=sr, host=host)
        return sr

    @classmethod
    def small(  # noqa: PLR0913 - the knobs of a test, all named
        cls,
        *,
        vms: int = 1,
        disks_per_vm: int = 1,
        disk_size: int = 4 * MiB,
        seed: int = 0,
        running: bool = True,
        kind: Kind = "random",
        fill: float = 1.0,
        user: str = "root",
        password: str = PASSWORD,
    ) -> SimulatedPool:
        """A pool of two hosts and two SRs with ``vms`` equal VMs, named ``vm1``, ``vm2``…"""
        pool = cls(seed=seed, user=user, password=password)
        pool.add_generated(
            range(1, vms + 1),
            disks=disks_per_vm,
            size=disk_size,
            running=running,
            kind=kind,
            fill=fill,
        )
        return pool

    def add_generated(
        self,
        numbers: range,
        *,
        disks: int,
        size: int,
        running: bool = True,
        kind: Kind = "random",
        fill: float = 1.0,
    ) -> None:
        """VMs ``vm<number>`` with generated disks, each different."""
        for number in numbers:
            seeds = [self.seed * 10_000 + number * 100 + disk for disk in range(disks)]
            contents = [DiskContent(size, kind=kind, seed=each, fill=fill) for each in seeds]
            self.add_vm(f"vm{number}", contents, running=running)

    def add_vm(self, name: str, contents: list[DiskContent], *, running: bool = True) -> str:
        """A VM with these disks, an empty CD drive and one network; returns its reference."""
        store = self.store
        vm = store.create(
            "VM",
            name_label=name,
            name_description="simulated VM",
            memory_static_max=1024 * MiB,
            memory_dynamic_max=1024 * MiB,
            memory_dynamic_min=1024 * MiB,
            memory_static_min=512 * MiB,
            memory_overhead=11 * MiB,
            HVM_boot_policy="BIOS order",
            HVM_boot_params={"order": "cdn", "firmware": "bios"},
            platform={"acpi": "1", "apic": "true", "pae": "true", "viridian": "false"},
            other_config={
                "base_template_name": "Other install media",
                "mac_seed": store.new_uuid(),
            },
            metrics=store.create("VM_metrics"),
            guest_metrics=store.create("VM_guest_metrics"),
        )
        for number, content in enumerate(contents):
            vdi = self.disks.create(content, SR=self.default_sr, name_label=f"{name}_{number}")
            store.create(
                "VBD",
                VM=vm,
                VDI=vdi,
                device=f"xvd{chr(ord('a') + number)}",
                userdevice=str(number),
                bootable=number == 0,
            )
        store.create("VBD", VM=vm, type="CD", mode="RO", empty=True, userdevice="15")
        store.create("VIF", VM=vm, network=self.network, device="0", MAC=store.new_mac())
        if running:
            self.vms.start(vm)
            if self._nursery is None:
                self._booted(vm)
        else:
            self.vms.refresh(vm)
        self.mark()
        return vm

    def add_file_vm(self, name: str, image: Path, *, running: bool = True) -> str:
        """A VM whose disk is a file (its size rounded up to 512 bytes)."""
        file = ImageFile(image)
        size = file.size + -file.size % 512
        return self.add_vm(name, [DiskContent(size, file=file)], running=running)

    def set_address(self, host: str, address: str) -> None:
        """Where a host listens, for calls and data."""
        self.store.update("host", host, address=address)
        for pif in self.store.get("host", host)["PIFs"]:
            self.store.update("PIF", pif, IP=address)

    def enable_nbd(self, purpose: Literal["nbd", "insecure_nbd"] = "nbd") -> None:
        """Let the pool's network serve disks over NBD: with TLS, or ``insecure_nbd``."""
        self.store.update("network", self.network, purpose=[purpose])

    # Running

    @asynccontextmanager
    async def running(self) -> AsyncIterator[SimulatedPool]:
        """Give the pool a nursery for its tasks; ends them on leaving.  ``serve`` does it."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield self
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()

    def spawn(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run in the pool's nursery; the pool must be running."""
        assert self._nursery is not None, "the pool is not running"
        self._nursery.start_soon(function, *args)

    def boot(self, vm: str) -> None:
        """The guest comes up: its tools answer after ``boot_seconds``."""
        if self._nursery is not None and self.boot_seconds >= 0:
            self.spawn(self._boot, vm)

    async def _boot(self, vm: str) -> None:
        domain = self.store.get("VM", vm)["domid"]
        await trio.sleep(self.boot_seconds)
        if self._is_up(vm, domain):
            self._booted(vm)
            if self.guest_script is not None:
                await self._run_script(vm, domain, self.guest_script)

    def _is_up(self, vm: str, domain: int) -> bool:
        """Whether it is still the same boot of the VM."""
        record = self.store.find("VM", vm)
        return record is not None and record["domid"] == domain

    def _booted(self, vm: str) -> None:
        metrics = self.store.create(
            "VM_guest_metrics",
            PV_drivers_detected=True,
            PV_drivers_version={"major": "7", "minor": "30", "micro": "0", "build": "1"},
            networks={"0/ip": "127.0.0.1", "0/ipv4/0": "127.0.0.1"},
            last_updated=now(),
            live=True,
        )
        self.store.update("VM", vm, guest_metrics=metrics)

    async def _run_script(self, vm: str, domain: int, script: GuestScript) -> None:
        if self.store.get("VM", vm)["xenstore_data"].get(SCRIPT_STATE) != "planned":
            return
        for seconds, values in script.steps():
            await trio.sleep(seconds)
            if not self._is_up(vm, domain):
                return
            data = self.store.get("VM", vm)["xenstore_data"]
            self.store.update("VM", vm, xenstore_data={**data, **values})

    def next_domid(self) -> int:
        self._domains += 1
        return self._domains

    @staticmethod
    def now() -> str:
        return now()

    # For tests: interfering

    def do(self, method: str, *params: Any) -> Any:
        """Perform a call's effect at once, past sessions, faults, gates and the log."""
        return self.calls.perform(method, list(params))

    def fail(self, at: str, **how: Any) -> Fault:
        """Program a fault: ``pool.fail("VM.snapshot", error=("SR_FULL",))``."""
        return self.faults.add(Fault(at, **how))

    def pause_at(
        self, point: str, *, stage: Stage = "before", at_bytes: int | None = None, nth: int = 1
    ) -> Gate:
        """Set up a gate; with ``at_bytes`` at that byte of a transfer's body."""
        if at_bytes is not None:
            return self.gates.add(point, "bytes", at_bytes, nth)
        return self.gates.add(point, stage, 0, nth)

    # For tests: looking

    def vm(self, name: str) -> str:
        """The reference of the VM (no snapshot) with this name; raises ``LookupError``."""
        for ref, record in self.store.all("VM"):
            if record["name_label"] == name and not record["is_a_snapshot"]:
                return ref
        raise LookupError(f"no VM {name}")

    def vm_uuid(self, name: str) -> str:
        return str(self.store.get("VM", self.vm(name))["uuid"])

    def snapshots(self) -> list[str]:
        """References of all snapshot VMs."""
        return [ref for ref, record in self.store.all("VM") if record["is_a_snapshot"]]

    def disk_uuids(self, vm: str) -> list[str]:
        """UUIDs of the disks of a VM, by device number."""
        return [str(self.store.get("VDI", ref)["uuid"]) for ref in self.vms.disks(vm)]

    def disk_bytes(self, vdi_uuid: str) -> Iterator[bytes]:
        """The content of a disk, at most 1 MiB at a time."""
        return self.disks.contents[self.store.by_uuid("VDI", vdi_uuid)].chunks()

    def digest(self, vdi_uuid: str) -> str:
        """SHA-256 of a disk's content."""
        sha = hashlib.sha256()
        for chunk in self.disk_bytes(vdi_uuid):
            sha.update(chunk)
        return sha.hexdigest()

    def write(self, vdi_uuid: str, offset: int, data: bytes) -> None:
        """What the guest would write."""
        ref = self.store.by_uuid("VDI", vdi_uuid)
        self.disks.contents[ref].write(offset, data)
        self.disks.written(ref)

    def mutate(
        self,
        vdi_uuid: str,
        blocks: float | Iterable[int] = 0.1,
        *,
        seed: int | None = None,
    ) -> list[int]:
        """What a busy guest does: new content in some 2 MiB blocks, without memory.

        ``blocks`` are block numbers, or (a float) the share of all blocks: at least one,
        picked by ``seed``.  The same seed writes the same content to the same disk; without
        one each call writes something new.  Returns the blocks, ascending.
        """
        ref = self.store.by_uuid("VDI", vdi_uuid)
        content = self.disks.contents[ref]
        if seed is None:
            self._mutations += 1
            seed = 2**31 + self._mutations
        if isinstance(blocks, float | int):
            picker = random.Random(f"{vdi_uuid} {seed}")  # noqa: S311 - reproducible content
            count = min(content.blocks, max(1, round(blocks * content.blocks)))
            chosen = sorted(picker.sample(range(content.blocks), count))
        else:
            chosen = sorted(set(blocks))
        content.mutate(chosen, 1 << 63 | (zlib.crc32(vdi_uuid.encode()) & 0x7FFFFFFF) << 32 | seed)
        self.disks.written(ref)
        return chosen

    def grow(self, vdi_uuid: str, size: int) -> None:
        """Make a disk larger, also under a running VM; what is new are zeros."""
        ref = self.store.by_uuid("VDI", vdi_uuid)
        self.disks.resize(ref, size, online=True)

    def mark(self) -> None:
        """What exists now is no leftover."""
        self._baseline = {
            ref for kind in ("VM", "VDI", "VBD", "task") for ref, _ in self.store.all(kind)
        }

    def leftovers(self, *, connections: bool = False) -> dict[str, list[str]]:
        """What a run left on the pool since :meth:`mark`: empty when it is clean.

        Keys: ``snapshots``, ``vms`` (other new VMs), ``importing`` (VMs and disks, new or not,
        that say in their name or their ``other_config`` that an import is under way), ``vdis``
        (new and on no VM), ``cbt_metadata`` (new disks that are only a list of changes),
        ``unfinished`` (disks whose import broke off), ``dom0_vbds``, ``blocked_operations``,
        ``current_operations``, ``tasks`` (any that was not destroyed), ``transfers``; with
        ``connections`` also ``sessions`` and ``connections``, which a daemon keeps for a while
        on purpose.
        """
        found = leftovers(self, self._baseline)
        if connections:
            found["sessions"] = ["session" for _ in self.sessions.open]
            found["connections"] = ["connection"] * self.connections
        return {key: value for key, value in found.items() if value}
