"""A job that copies backups from one remote to others, understood.

Everything that a call may get wrong is told before anything is touched; nothing that a job
asks for is left out in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from proxy.errors import Refused
from proxy.jobs.mirror.matching import Predicate, fields_of, predicate
from proxy.jobs.mirror.planning import Retention
from proxy.jobs.patterns import ids_of
from proxy.jobs.rate_windows import RateWindow, rate_now
from proxy.jobs.requests import settings_level, wrong_job
from proxy.jobs.settings import REPORT_KEYS, Settings
from proxy.repository import old_entries

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from proxy.jobs.requests import BackupRequest

_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class MirrorSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a run is told.  Times are in milliseconds, as Xen Orchestra sends them."""

    concurrency: _NotNegative = 2
    """VMs at once; 0 is no limit."""
    delete_first: bool = False
    disk_per_vm_concurrency: _NotNegative = 10
    """Disks of one backup at once; 0 is no limit."""
    distribute_backups: bool = False
    export_retention: _Count = 0
    """Backups of this schedule kept on a remote, the new ones included."""
    get_remote_timeout: _NotNegative = 300_000
    """Longest wait for a remote to open, and for the lock of a VM's directory on it."""
    health_check_sr: str | None = None
    """Where the VM of a health check is made; none is made without."""
    health_check_timeout: str | _NotNegative = "10m"
    health_check_vms_with_tags: list[str] = []
    long_term_retention: dict[str, dict[str, Any]] = {}
    max_export_rate: _NotNegative = 0
    """Bytes per second read from the source over all VMs of the run; 0 is no limit."""
    max_export_rate_windows: tuple[RateWindow, ...] = ()
    """Times at which another rate counts (:mod:`proxy.jobs.rate_windows`)."""
    max_merged_deltas_per_run: _NotNegative | None = None
    """Old incremental backups of a VM that one run removes at most, oldest first."""
    n_retries_vm_backup_failures: _Count = 0
    skip_delete_old_entries: bool = False
    timeout: _NotNegative = 0
    """For the whole run; 0 is no limit."""
    timezone: str | None = None
    vm_timeout: _NotNegative = 0
    """For all attempts at one VM; 0 is no limit."""

    def export_rate(self) -> Callable[[], float]:
        """What says how many bytes per second the run may read now; 0 is no limit."""
        return rate_now(self.max_export_rate, self.max_export_rate_windows, self.timezone)

    def writing(self) -> Settings:
        """For what writes backups of VMs, which is not to remove any."""
        return Settings(
            delete_first=False,
            export_retention=self.export_retention,
            get_remote_timeout=self.get_remote_timeout,
            health_check_sr=self.health_check_sr,
            health_check_timeout=self.health_check_timeout,
            health_check_vms_with_tags=self.health_check_vms_with_tags,
            long_term_retention=self.long_term_retention,
            skip_delete_old_entries=True,
            timezone=self.timezone,
        )


_FIELDS: Final = frozenset(field.encode_name for field in msgspec.structs.fields(MirrorSettings))
_SATISFIED: Final = REPORT_KEYS | {
    "mergeBackupsSynchronously",
    "validateVhdStreams",
}
"""Xen Orchestra's own, and what is always done here."""

WITHOUT_EFFECT: Final = frozenset(
    {
        "bypassVdiChainsCheck",
        "cbtDestroySnapshotData",
        "checkpointSnapshot",
        "copyRetention",
        "distributeReplications",
        "fullInterval",
        "nbdConcurrency",
        "offlineBackup",
        "offlineSnapshot",
        "preferNbd",
        "snapshotRetention",
        "unconditionalSnapshot",
        "useNbd",
    }
)
"""About how a VM is read from its pool, which a mirror does not touch: told in the log."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which backups are mirrored, by their metadata."""

    matches: Predicate
    fields: frozenset[tuple[str, ...]]
    """All that :attr:`matches` looks at."""


@dataclass(frozen=True, slots=True)
class MirrorJob:
    """``mode`` and ``source_id`` are as given: the run tells what is wrong with them."""

    id: str
    mode: str
    schedule_id: str
    source_id: str
    remote_ids: list[str]
    """Never the source itself."""
    filter: Filter | None
    run: MirrorSettings
    request: BackupRequest
    without_effect: list[str]
    _levels: Mapping[str, Any]
    _base: Mapping[str, Any]

    def vm(self, vm_uuid: str) -> MirrorSettings:
        """The settings for one VM.  ``Refused`` when those of its own level are wrong."""
        level = {vm_uuid: self._levels.get(vm_uuid)}
        _refuse_unknown(level)
        return _read(self._base, level)

    def target(self, vm_uuid: str, remote_id: str) -> MirrorSettings | None:
        """The settings for one VM on one remote; ``None``: it keeps nothing of this VM."""
        levels = {each: self._levels.get(each) for each in (vm_uuid, remote_id)}
        settings = _read(self._base, levels)
        keeps = settings.export_retention > 0 or settings.long_term_retention
        return settings if keeps or settings.skip_delete_old_entries else None

    def health_check_srs(self) -> set[str]:
        """Every SR that health checks may use, but for those that only a VM's settings name."""
        levels = [{}, *({each: self._levels.get(each)} for each in self.remote_ids)]
        found = {_read(self._base, level).health_check_sr for level in levels}
        return {sr for sr in found if sr is not None}

    def retention(self, settings: MirrorSettings) -> Retention:
        return Retention(
            schedule_id=self.schedule_id,
            mode=self.mode,
            count=settings.export_retention,
            long_term=settings.long_term_retention,
            timezone=settings.timezone,
            keeps_all=settings.skip_delete_old_entries,
        )


def understand_mirror(request: BackupRequest, defaults: Sequence[Any]) -> MirrorJob:
    """Raises ``Refused`` for what cannot be run; ``data.part`` names what is wrong.

    ``defaults`` are the configuration's settings, which are for backups of VMs too: those that
    mean nothing here are left.
    """
    job = request.job
    schedule_id = str(request.schedule.get("id", ""))
    source_id = job.get("sourceRemote")
    if not isinstance(source_id, str) or not source_id:
        raise wrong_job("sourceRemote", "a mirror job needs sourceRemote, the id of a remote")
    try:
        remote_ids = [each for each in ids_of(job.get("remotes")) if each != source_id]
    except Refused as error:
        raise wrong_job("remotes", error.message) from error
    if not remote_ids:
        raise wrong_job("remotes", "a mirror job needs remotes to copy to, others than its source")
    for part in ("vms", "srs", "pools", "xoMetadata"):
        if job.get(part):
            raise wrong_job(
                part, f"a mirror job has no use for {part}: its filter says what it takes"
            )
    levels = settings_level(job.get("settings"), "the job")
    given = {"the job": levels.get(""), schedule_id: levels.get(schedule_id)}
    base: dict[str, Any] = {}
    for each in defaults:
        base.update(_told(settings_level(each, "the configuration")))
    run = _read(base, {"the configuration": {}, **given})
    for level in given.values():
        base.update(_told(settings_level(level, "the job")))
    of_remotes = {each: levels.get(each) for each in remote_ids}
    _refuse_unknown({**given, **of_remotes})
    _refusewrong_job(run, "the job")
    for where, level in of_remotes.items():
        _refusewrong_job(_read(base, {where: level}), where)
    if not run.skip_delete_old_entries and not any(
        settings_level(level, where).get(key)
        for where, level in {"the configuration": base, **levels}.items()
        for key in ("exportRetention", "longTermRetention")
    ):
        raise wrong_job(
            "settings",
            "a mirror that keeps nothing copies nothing: give its schedule an exportRetention",
            settings=schedule_id,
            keys=["exportRetention"],
        )
    return MirrorJob(
        id=str(job.get("id", "")),
        mode=str(job.get("mode")),
        schedule_id=schedule_id,
        source_id=source_id,
        remote_ids=remote_ids,
        filter=_filter(job.get("filter")),
        run=run,
        request=request,
        without_effect=_without_effect([*given.values(), *of_remotes.values()]),
        _levels=levels,
        _base=base,
    )


def _refusewrong_job(settings: MirrorSettings, where: str) -> None:
    """A wrong period or time zone is told before the run meets it half-way."""
    try:
        old_entries(0, [], settings.long_term_retention or None, settings.timezone)
        settings.export_rate()
        _ = settings.writing().health_check_seconds
    except Refused as error:
        raise wrong_job(
            "settings", f"the settings of {where} are wrong: {error.message}", settings=where
        ) from error


def _refuse_unknown(levels: Mapping[str, Any]) -> None:
    for where, level in levels.items():
        keys = [
            key
            for key, value in settings_level(level, where).items()
            if value and key not in _FIELDS | _SATISFIED | WITHOUT_EFFECT
        ]
        if keys:
            raise wrong_job(
                "settings",
                f"the settings {', '.join(sorted(keys))} of {where} mean nothing to a mirror:"
                " remove them",
                settings=where,
                keys=sorted(keys),
            )


def _without_effect(levels: Sequence[Any]) -> list[str]:
    found: set[str] = set()
    for level in levels:
        found.update(
            k for k, v in settings_level(level, "the job").items() if v and k in WITHOUT_EFFECT
        )
    return sorted(found)


def _filter(pattern: object) -> Filter | None:
    """Xen Orchestra's ``null`` is a filter that was taken away."""
    if pattern is None:
        return None
    try:
        return Filter(predicate(pattern), fields_of(pattern))
    except Refused as error:
        raise wrong_job("filter", error.message) from error


def _read(base: Mapping[str, Any], levels: Mapping[str, Any]) -> MirrorSettings:
    merged = dict(base)
    where = "the configuration"
    for name, level in levels.items():
        merged.update(_told(settings_level(level, name)))
        where = name
    try:
        return msgspec.convert(merged, MirrorSettings)
    except msgspec.ValidationError as error:
        raise wrong_job(
            "settings", f"the settings of {where} are wrong: {error}", settings=where
        ) from error


def _told(level: Mapping[str, Any]) -> dict[str, Any]:
    """``null`` is no value: the level below counts."""
    return {key: value for key, value in level.items() if key in _FIELDS and value is not None}
