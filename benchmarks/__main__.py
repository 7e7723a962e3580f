"""All measurements, one after the other."""

from __future__ import annotations

from benchmarks import (
    calls,
    encrypted,
    full_backup,
    incremental,
    listing,
    many_vms,
    nbd,
    objects,
    restore,
    smb,
    waiters,
)
from benchmarks.lab import options, show

if __name__ == "__main__":
    chosen = options(__doc__)
    show(
        *full_backup.measure(chosen),
        *restore.measure(chosen),
        *incremental.measure(chosen),
        *encrypted.measure(chosen),
        *nbd.measure(chosen),
        *objects.measure(chosen),
        *smb.measure(chosen),
        *many_vms.measure(chosen),
        *calls.measure(chosen),
        *waiters.measure(chosen),
        *listing.measure(chosen),
    )
