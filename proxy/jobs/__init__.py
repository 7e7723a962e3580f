"""What a run does: settings, VM backups, restores; the daemon's shared services."""

from proxy.jobs.requests import BackupRequest, RestoreRequest
from proxy.jobs.services import Services, open_services

__all__ = ["BackupRequest", "RestoreRequest", "Services", "open_services"]
