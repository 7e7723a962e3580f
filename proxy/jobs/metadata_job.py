"""A job that backs up pools' databases and Xen Orchestra's configuration, understood.

Everything that a call may get wrong is told before anything is touched; nothing that a job
asks for is left out in silence.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec

from proxy.errors import Refused
from proxy.jobs.patterns import ids_of
from proxy.jobs.requests import settings_level, wrong_job
from proxy.jobs.settings import REPORT_KEYS
from proxy.repository.metadata_backup_paths import (
    BINARY_DATA,
    JSON_DATA,
    config_directory,
    pool_directory,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.jobs.requests import BackupRequest

_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class MetadataSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a run is told.  Times are in milliseconds, as Xen Orchestra sends them."""

    concurrency: _NotNegative = 10
    """Pools, and the configuration, at once; 0 is no limit."""
    get_remote_timeout: _NotNegative = 300_000
    """Longest wait for a remote to open, and for the lock of a directory on it."""
    max_export_rate: _NotNegative = 0
    """Bytes per second over all pools of the run; 0 is no limit."""
    retention_pool_metadata: _Count = 0
    """Backups kept of each pool, the new one included; 0: this schedule makes none."""
    retention_xo_metadata: _Count = 0
    timeout: _NotNegative = 0
    """For the whole run; 0 is no limit."""


_FIELDS = frozenset(field.encode_name for field in msgspec.structs.fields(MetadataSettings))
_XEN_ORCHESTRAS = REPORT_KEYS | {"timezone"}
"""Xen Orchestra reads these itself: for its reports and for the hours of its schedules."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """Xen Orchestra's configuration as it is to be stored."""

    name: str
    """Of the data file: ``data.json`` for text, ``data`` for bytes."""
    content: bytes


@dataclass(frozen=True, slots=True)
class MetadataJob:
    """``pools`` and ``configuration`` are empty when the schedule keeps none of them."""

    id: str
    schedule_id: str
    pools: list[str]
    configuration: Configuration | None
    remote_ids: list[str]
    settings: MetadataSettings
    request: BackupRequest

    def described(self) -> dict[str, Any]:
        """The fields that the metadata of every backup of this run has; what has no name, none."""
        fields = {
            "jobId": self.id,
            "jobName": self.request.job.get("name"),
            "scheduleId": self.schedule_id,
            "scheduleName": self.request.schedule.get("name"),
        }
        return {key: value for key, value in fields.items() if value is not None}


def understand_metadata(
    request: BackupRequest, common_defaults: Mapping[str, Any], defaults: Mapping[str, Any]
) -> MetadataJob:
    """Raises ``Refused`` for what cannot be run; ``data.part`` names what is wrong.

    ``common_defaults`` are the configuration's settings for every kind of job, of which those
    that mean nothing here are left; ``defaults`` those for this kind.
    """
    job = request.job
    schedule_id = str(request.schedule.get("id", ""))
    remote_ids = _ids(job, "remotes")
    pools = _ids(job, "pools")
    configuration = _configuration(job.get("xoMetadata"))
    for part in ("vms", "srs", "sourceRemote"):
        if job.get(part):
            raise wrong_job(part, f"a metadata job has no use for {part}")
    if not remote_ids:
        raise wrong_job("remotes", "metadata backup job cannot run without remotes")
    if not pools and configuration is None:
        raise wrong_job("pools", "no metadata mode found")
    config_directory(schedule_id)
    for pool in pools:
        pool_directory(schedule_id, pool)
    levels = _levels(job, schedule_id, [*remote_ids, *pools])
    settings = _settings(common_defaults, {"the configuration": defaults, **levels})
    if settings.retention_pool_metadata == 0:
        pools = []
    if settings.retention_xo_metadata == 0:
        configuration = None
    if not pools and configuration is None:
        raise wrong_job("settings", "no retentions corresponding to the metadata modes found")
    return MetadataJob(
        id=str(job.get("id", "")),
        schedule_id=schedule_id,
        pools=pools,
        configuration=configuration,
        remote_ids=remote_ids,
        settings=settings,
        request=request,
    )


def _ids(job: Mapping[str, Any], part: str) -> list[str]:
    try:
        return ids_of(job.get(part))
    except Refused as error:
        raise wrong_job(part, error.message) from error


def _configuration(given: object) -> Configuration | None:
    """Text is sent as it is, bytes (an encrypted export) as ``{encoding: 'base64', data}``."""
    if given is None or given is False:
        return None
    if isinstance(given, str):
        if not given:
            raise wrong_job("xoMetadata", "the exported configuration is empty")
        return Configuration(JSON_DATA, given.encode())
    if isinstance(given, dict):
        fields = cast("dict[str, object]", given)
        data = fields.get("data")
        if fields.get("encoding") == "base64" and isinstance(data, str):
            return Configuration(BINARY_DATA, _decoded(data))
    raise wrong_job(
        "xoMetadata", "xoMetadata must be the exported configuration: JSON text, or data in base64"
    )


def _decoded(data: str) -> bytes:
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise wrong_job("xoMetadata", "the exported configuration is no base64") from error
    if not content:
        raise wrong_job("xoMetadata", "the exported configuration is empty")
    return content


def _levels(job: Mapping[str, Any], schedule_id: str, others: list[str]) -> dict[str, Any]:
    """The job's settings for this run, by where they stand.

    Those of other schedules are other runs'; those of a remote or a pool would change nothing.
    """
    given = job.get("settings")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise wrong_job("settings", "the settings are wrong: must be object")
    settings = cast("dict[str, Any]", given)
    for other in others:
        keys = _asked(settings_level(settings.get(other), other))
        if keys:
            raise wrong_job(
                "settings",
                f"the settings {', '.join(keys)} of {other} have no effect on a metadata backup:"
                " give them to the job or to its schedule",
                settings=other,
                keys=keys,
            )
    return {"the job": settings.get(""), schedule_id: settings.get(schedule_id)}


def _settings(common: Mapping[str, Any], levels: Mapping[str, Any]) -> MetadataSettings:
    merged = {key: value for key, value in common.items() if key in _FIELDS}
    settings = _converted(merged, "the configuration")
    for where, level in levels.items():
        given = settings_level(level, where)
        keys = [key for key in _asked(given) if key not in _FIELDS | _XEN_ORCHESTRAS]
        if keys:
            raise wrong_job(
                "settings",
                f"the settings {', '.join(keys)} of {where} have no effect on a metadata backup:"
                " remove them",
                settings=where,
                keys=keys,
            )
        merged.update({k: v for k, v in given.items() if k in _FIELDS and v is not None})
        settings = _converted(merged, where)
    return settings


def _converted(merged: Mapping[str, Any], where: str) -> MetadataSettings:
    try:
        return msgspec.convert({k: v for k, v in merged.items() if v is not None}, MetadataSettings)
    except msgspec.ValidationError as error:
        message = f"the settings of {where} are wrong: {error}"
        raise wrong_job("settings", message, settings=where) from error


def _asked(level: Mapping[str, Any]) -> list[str]:
    """Keys with a value that asks for something: Xen Orchestra also sends empty ones."""
    return sorted(key for key, value in level.items() if value)
