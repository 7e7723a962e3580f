"""What a remote holds: VM backups, their metadata, listing, retention, deletion, cleaning."""

from proxy.repository.clean import clean_vm
from proxy.repository.deletion import delete_backups
from proxy.repository.full_writer import FullBackupWriter, open_full_backup
from proxy.repository.listing import list_all, list_vm_backups, list_vms
from proxy.repository.locks import lock_vm
from proxy.repository.metadata import Backup, BackupRecord, format_listing, read_backup
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
    "format_listing",
    "is_valid_xva",
    "list_all",
    "list_vm_backups",
    "list_vms",
    "lock_vm",
    "old_entries",
    "open_full_backup",
    "period_tags",
    "read_backup",
    "refuse_broken_xva",
    "total_backup_size",
    "vm_directory",
]
