"""What replicas carry, so that we and Xen Orchestra know them.

Names, tags, keys and the reason why a replica cannot be started are Xen Orchestra's.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCKED: Final = "Start operation for this vm is blocked, clone it if you want to use it."
BLOCKED_OPERATIONS: Final[Mapping[str, str]] = {"start": BLOCKED, "start_on": BLOCKED}
FULL_TAG: Final = "Disaster Recovery"
INCREMENTAL_TAG: Final = "Continuous Replication"
HA_TAG: Final = "HA disabled"


def timestamp_of(date: str) -> int | None:
    """Milliseconds of a date in either of the two forms that are in use, with and without
    colons; ``None`` for anything else."""
    if not date.endswith("Z"):
        return None
    try:
        moment = datetime.strptime(date.replace(":", ""), "%Y%m%dT%H%M%S%z")
    except ValueError:
        return None
    return int(moment.timestamp() * 1000)
