"""Where backups of pools' databases and of Xen Orchestra's configuration are on a remote.

``xo-config-backups/<schedule>/<TS>/{metadata.json, data.json or data}`` and
``xo-pool-metadata-backups/<schedule>/<pool>/<TS>/{metadata.json, data}``.  A backup is its
whole directory and counts once it has its ``metadata.json``.
"""

from __future__ import annotations

from typing import Final

from proxy.errors import Refused
from proxy.repository.paths import DATE_NAME, is_vm_name

CONFIG_ROOT: Final = "/xo-config-backups"
POOL_ROOT: Final = "/xo-pool-metadata-backups"
METADATA_NAME: Final = "metadata.json"
JSON_DATA: Final = "data.json"
BINARY_DATA: Final = "data"

_DEPTHS: Final = {CONFIG_ROOT[1:]: 3, POOL_ROOT[1:]: 4}


def is_folder_name(name: str) -> bool:
    """Whether a name can stand for a schedule or a pool: the rule of VM directories."""
    return is_vm_name(name)


def config_directory(schedule_id: str) -> str:
    """Of one schedule's backups of the configuration; ``Refused`` for an id that is no name."""
    return f"{CONFIG_ROOT}/{_folder(schedule_id, 'schedule')}"


def pool_directory(schedule_id: str, pool_uuid: str) -> str:
    """Of one schedule's backups of one pool; ``Refused`` for an id that is no name."""
    return f"{POOL_ROOT}/{_folder(schedule_id, 'schedule')}/{_folder(pool_uuid, 'pool')}"


def _folder(name: str, what: str) -> str:
    if not is_folder_name(name):
        raise Refused(f"{name[:100]!r} cannot be the id of a {what}", code="EINVAL")
    return name


def metadata_backup_path(backup_id: str) -> str:
    """The directory that a client's id names, with a leading slash.

    Listings give ids with that slash, Xen Orchestra sends them back without.  Anything else but
    the exact shape, so also every ``..``, is ``Refused`` (``EINVAL``).
    """
    parts = backup_id.removeprefix("/").split("/")
    if (
        len(parts) != _DEPTHS.get(parts[0])
        or not all(is_folder_name(part) for part in parts[1:-1])
        or DATE_NAME.fullmatch(parts[-1]) is None
    ):
        raise Refused(
            f"The id ({backup_id[:300]}) not correspond to a metadata folder",
            code="EINVAL",
            data={"part": "backupId"},
        )
    return "/" + "/".join(parts)


def is_pool_backup(path: str) -> bool:
    """Whether a normalised path is of a pool, and not of a configuration."""
    return path.startswith(f"{POOL_ROOT}/")


def data_name(metadata_data: object) -> str | None:
    """The file that the ``data`` field of a configuration's metadata names, beside it.

    Without the field it is ``data.json``; ``None`` for what is no plain name: the metadata may
    come from anybody.
    """
    if metadata_data is None:
        return JSON_DATA
    if not isinstance(metadata_data, str):
        return None
    name = metadata_data.removeprefix("./")
    return name if is_folder_name(name) and name != METADATA_NAME else None
