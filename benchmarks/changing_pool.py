"""The simulated pool as a program whose guests write when they are told to.

Arguments: bytes of a disk, number of VMs, ``nbd`` or nothing.  Prints what ``xo-proxy simulate``
prints; each line on standard input, a share such as ``0.25``, changes so much of every disk, and
is answered by a line.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import trio

from proxy.simulator import SimulatedPool, serve, standalone_info


async def main(size: int, vms: int, *, nbd: bool) -> None:
    pool = SimulatedPool.small(vms=vms, disk_size=size)
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
    trio.run(partial(main, int(sys.argv[1]), int(sys.argv[2]), nbd="nbd" in sys.argv[3:]))
