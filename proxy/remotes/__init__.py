"""Storage of backups: one interface, several kinds, wrappers around them."""

from proxy.remotes.factory import RemoteOptions, open_remote, opened_remote
from proxy.remotes.interface import (
    Batch,
    Entry,
    FileEditor,
    FileReader,
    FileStat,
    FileWriter,
    Lock,
    OpenUpload,
    Remote,
    RemoteInfo,
)

__all__ = [
    "Batch",
    "Entry",
    "FileEditor",
    "FileReader",
    "FileStat",
    "FileWriter",
    "Lock",
    "OpenUpload",
    "Remote",
    "RemoteInfo",
    "RemoteOptions",
    "open_remote",
    "opened_remote",
]
