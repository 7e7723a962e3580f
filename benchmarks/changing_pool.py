"""The simulated pool as a program whose guests write when they are told to.

Arguments: bytes of a disk, number of VMs, their content (``random`` or ``text``), ``nbd`` or
nothing.  Prints what ``xo-proxy simulate``
prints; each line on standard input, a share such as ``0.25``, changes so much of every disk, and
is answered by a line.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, cast

import trio

from proxy.simulator import SimulatedPool, serve, standalone_info

if TYPE_CHECKING:
    from proxy.simulator.disks import Kind


async def main(size: int, vms: int, kind: Kind, *, nbd: bool) -> None:
    pool = SimulatedPool.small(vms=vms, disk_size=size, kind=kind)
    if nbd:
        pool.enable_nbd("insecure_nbd")
        for ref, record in pool.store.all("VDI"):
            if record["managed"]:
                pool.do("VDI.enable_cbt", ref)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, pool))
        print(json.dumps(standalone_info(pool)), flush=True)
        commands = trio.wrap_file(sys.stdin)
        async for line in commands:
            for name in range(1, vms + 1):
                for uuid in pool.disk_uuids(pool.vm(f"vm{name}")):
                    pool.mutate(uuid, float(line))
            print("changed", flush=True)


if __name__ == "__main__":
    disk_size, count, content, *more = sys.argv[1:]
    trio.run(partial(main, int(disk_size), int(count), cast("Kind", content), nbd="nbd" in more))
