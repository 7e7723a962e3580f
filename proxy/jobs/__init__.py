"""What a run does: settings, VM backups, restores; the daemon's shared services."""

from proxy.jobs.metadata_restore import MetadataRestoreRequest
from proxy.jobs.requests import BackupRequest, RestoreRequest
from proxy.jobs.services import Services, open_services
from proxy.jobs.sweep import SweepRequest
from proxy.jobs.verify_run import VerifyRequest, VerifyRun

__all__ = [
    "BackupRequest",
    "MetadataRestoreRequest",
    "RestoreRequest",
    "Services",
    "SweepRequest",
    "VerifyRequest",
    "VerifyRun",
    "open_services",
]
