"""``scripts/torture``: rounds of runs, most of them killed."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.rounds import Torture


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="torture",
        description="Kill the daemon at random moments and check what is promised of that.",
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed
    folder = Path(tempfile.mkdtemp(prefix=f"xo-proxy-torture-{seed}-", dir=given.folder))
    print(f"seed {seed}, {given.rounds} rounds in {folder}", flush=True)
    began = time.monotonic()
    torture = Torture(folder, seed)
    number = 0
    try:
        for number in range(1, given.rounds + 1):
            torture.round()
            print(f"{number}: {torture.doing}", flush=True)
        torture.last()
    except Exception as error:  # noqa: BLE001  told with all that is needed to look at it
        print(f"round {number} failed ({torture.doing}): {type(error).__name__}: {error}")
        print(f"what is left is in {folder}; the same choices, but not the same instants:")
        print(f"  scripts/torture --seed {seed} --rounds {number}", flush=True)
        return 1
    finally:
        torture.close()
    shutil.rmtree(folder)
    counts = torture.counts
    print(
        f"survived {given.rounds} rounds in {time.monotonic() - began:.0f} s:"
        f" {counts.read} disks read back, {counts.merges} merges, swept {dict(counts.swept)}"
    )
    for (kind, ending), times in sorted(counts.rounds.items()):
        print(f"  {kind}, {ending}: {times}")
    return 0


sys.exit(main())
