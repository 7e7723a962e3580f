"""What a remote holds: VM backups, their metadata, listing, retention, deletion, cleaning."""

from proxy.repository.clean import clean_vm
from proxy.repository.deletion import delete_backups
from proxy.repository.full_writer import FullBackupWriter, open_full_backup
from proxy.repository.listing import list_all, list_vm_backups, list_vms
from proxy.repository.locks import lock_vm
from proxy.repository.metadata import Backup, BackupRecord, format_listing, read_backup
from proxy.repository.metadata_backup_writer import lock_metadata, open_metadata_backup
from proxy.repository.metadata_backups import (
    list_config_backups,
    list_pool_backups,
    read_metadata_backup,
)
from proxy.repository.metadata_pruning import delete_metadata_backup, prune_metadata
from proxy.repository.paths import backup_path, date_name, vm_directory
from proxy.repository.retention import old_entries, period_tags
from proxy.repository.totals import total_backup_size
from proxy.repository.xva_check import is_valid_xva, refuse_broken_xva

__all__ = [
    "Backup",
    "BackupRecord",
    "FullBackupWriter",
    "backup_path",
    "clean_vm",
    "date_name",
    "delete_backups",
    "delete_metadata_backup",
    "format_listing",
    "is_valid_xva",
    "list_all",
    "list_config_backups",
    "list_pool_backups",
    "list_vm_backups",
    "list_vms",
    "lock_metadata",
    "lock_vm",
    "old_entries",
    "open_full_backup",
    "open_metadata_backup",
    "period_tags",
    "prune_metadata",
    "read_backup",
    "read_metadata_backup",
    "refuse_broken_xva",
    "total_backup_size",
    "vm_directory",
]
