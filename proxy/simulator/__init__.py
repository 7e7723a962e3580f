"""A simulated XCP-ng pool: XAPI over HTTP(S), VM export and import, faults on demand.

For ``demo``, ``simulate`` and tests; the daemon never imports it.

    pool = SimulatedPool.small(vms=2)
    async with trio.open_nursery() as nursery:
        url = await nursery.start(partial(serve, pool))
        gate = pool.pause_at("VM.snapshot")              # stand still before the snapshot
        pool.fail("/export", cut="reset", after_bytes=1 << 20)
        …
        assert not pool.leftovers()
"""

from proxy.simulator.calls import CallRecord, Peer
from proxy.simulator.disks import DiskContent, ImageFile
from proxy.simulator.faults import Fault, Gate
from proxy.simulator.guests import GuestScript
from proxy.simulator.pool import SimulatedPool
from proxy.simulator.server import serve, serve_connection
from proxy.simulator.standalone import SimulatorOptions, run_standalone, standalone_info
from proxy.simulator.transfers import Transfer

__all__ = [
    "CallRecord",
    "DiskContent",
    "Fault",
    "Gate",
    "GuestScript",
    "ImageFile",
    "Peer",
    "SimulatedPool",
    "SimulatorOptions",
    "Transfer",
    "run_standalone",
    "serve",
    "serve_connection",
    "standalone_info",
]
