"""What dead runs left on pools and remotes: removed at the next contact, or by ``backup.sweep``.

No credential is ever stored, so nobody can go there when the daemon starts.  Touched are only
things that are *unfinished* and certainly ours: see :mod:`proxy.jobs.sweep.pool_sweep` and
:mod:`proxy.jobs.sweep.remote_sweep`.
"""

from proxy.jobs.sweep.findings import Fate, Report
from proxy.jobs.sweep.pool_sweep import sweep_pool
from proxy.jobs.sweep.remote_sweep import sweep_remote
from proxy.jobs.sweep.sweep_run import SweepRequest, run_sweep
from proxy.jobs.sweep.sweeper import Sweeper

__all__ = [
    "Fate",
    "Report",
    "SweepRequest",
    "Sweeper",
    "run_sweep",
    "sweep_pool",
    "sweep_remote",
]
