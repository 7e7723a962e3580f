"""The settings of a run: XO's levels, in XO's order, with types."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec

from proxy.config import parse_duration
from proxy.errors import Refused
from proxy.jobs.rate_windows import RateWindow, rate_now
from proxy.repository import old_entries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_RANGE = msgspec.Meta(ge=0, le=2**53)  # to JSON, what is larger may be infinite
_Count = Annotated[int, _RANGE] | Annotated[float, _RANGE]


class Settings(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a VM's backup is told.  Times are in milliseconds, as XO sends them."""

    bypass_vdi_chains_check: bool = False
    cbt_destroy_snapshot_data: bool = False
    """Keep of an exported snapshot only the map of what changed since."""
    checkpoint_snapshot: bool = False
    concurrency: _Count = 2
    """VMs at once; 0 is no limit."""
    copy_retention: _Count = 0
    """Replicas kept on an SR, the new one included."""
    delete_first: bool = False
    disk_per_vm_concurrency: _Count = 0
    """Disks of one VM at once; 0 is no limit."""
    distribute_backups: bool = False
    distribute_replications: bool = False
    export_retention: _Count = 0
    """Backups kept on a remote, the new one included."""
    full_interval: _Count = 0
    """Longest chain of a key backup and its deltas; 0 is no limit."""
    get_remote_timeout: _Count = 300_000
    """Longest wait for a remote to open, and for the lock of a VM's directory on it."""
    health_check_sr: str | None = None
    """Where the VM of a health check is made; none is made without."""
    health_check_timeout: str | _Count = "10m"
    """For its guest to come up: milliseconds, or as ``'90s'``."""
    health_check_vms_with_tags: list[str] = []
    """Only VMs with one of these tags are checked; empty is every VM."""
    long_term_retention: dict[str, Any] = {}
    max_export_rate: _Count = 0
    """Bytes per second over all VMs of the run; 0 is no limit."""
    max_export_rate_windows: tuple[RateWindow, ...] = ()
    """Times at which another rate counts (:mod:`proxy.jobs.rate_windows`)."""
    max_merged_deltas_per_run: _Count | None = None
    """Old incremental backups that one run removes at most, oldest first."""
    merge_backups_synchronously: bool = False
    """Known for Xen Orchestra's sake: merges are always part of the run here."""
    n_retries_vm_backup_failures: Annotated[int, msgspec.Meta(ge=0)] = 0
    nbd_concurrency: _Count = 1
    """NBD connections for each disk."""
    offline_backup: bool = False
    offline_snapshot: bool = False
    prefer_nbd: bool | None = None
    """``None``: as ``xapiOptions.preferNbd`` says."""
    skip_delete_old_entries: bool = False
    snapshot_retention: _Count = 0
    timeout: _Count = 0
    """For the whole run; 0 is no limit."""
    timezone: str | None = None
    unconditional_snapshot: bool = False
    vm_timeout: _Count = 0
    """For all attempts at one VM; 0 is no limit."""
    warm_migration: bool = msgspec.field(default=False, name="_warmMigration")
    """The replica goes into production: it gets no tag and keeps its HA."""

    def export_rate(self) -> Callable[[], float]:
        """What says how many bytes per second the run may move now; 0 is no limit."""
        return rate_now(self.max_export_rate, self.max_export_rate_windows, self.timezone)

    @property
    def health_check_seconds(self) -> float:
        """Raises ``Refused`` for a timeout that is no duration to wait for."""
        try:
            seconds = float(parse_duration(self.health_check_timeout))
        except ValueError as error:
            raise Refused(f"healthCheckTimeout: {error}", code="EINVAL") from error
        if not 0 < seconds < math.inf:
            raise Refused("healthCheckTimeout must be neither zero nor endless", code="EINVAL")
        return seconds


REPORT_KEYS = frozenset(
    {"reportWhen", "backupReportTpl", "hideSuccessfulItems", "reportRecipients", "useBasicAuth"}
)
"""Read by XO when it writes its report, not by a run."""

WITHOUT_EFFECT = {
    "useNbd": "it was the former name of preferNbd, which counts",
    "validateVhdStreams": "streams are always checked",
}
"""Keys that Xen Orchestra knows and nobody reads: told once, with the reason."""

KNOWN = frozenset(field.encode_name for field in msgspec.structs.fields(Settings))


class SettingLevels:
    """The levels of one job; later ones win.

    config defaults → ``job.settings['']`` → schedule → VM → target.  A ``null`` is no value:
    the level below counts.
    """

    def __init__(self, job_settings: Mapping[str, Any], schedule_id: str, defaults: Sequence[Any]):
        self._job = job_settings
        self._base = [*defaults, job_settings.get(""), job_settings.get(schedule_id)]
        self.run = self._read(self._base, "the job")

    def vm(self, vm_uuid: str, tags: Sequence[str] = ()) -> Settings:
        """For one VM; two tags of the VM force their setting."""
        return self._read([*self._base, self._job.get(vm_uuid), _forced(tags)], vm_uuid)

    def target(self, vm_uuid: str, target_id: str) -> Settings:
        """For one VM on one remote or SR."""
        levels = [*self._base, self._job.get(vm_uuid), self._job.get(target_id)]
        return self._read(levels, target_id)

    def health_check_srs(self, ids: Iterable[str]) -> set[str]:
        """Every SR that health checks of these VMs, remotes and SRs may use."""
        found = {self.run.health_check_sr}
        for each in ids:
            # a wrong setting of one VM fails that VM, when it is its turn
            with contextlib.suppress(Refused):
                found.add(self._read([*self._base, self._job.get(each)], each).health_check_sr)
        return {sr for sr in found if sr is not None}

    def refuse_wrong(self, places: Iterable[str]) -> None:
        """Raise ``Refused`` for what is wrong and could only fail later.

        Looked at are the run's own levels and those of ``places``: ids of targets before the
        run, of a VM before its backup, so that a wrong setting of one VM fails only that.
        """
        self._check(self.run, "the job")
        for where in places:
            if where in self._job:
                self._check(self._read([*self._base, self._job[where]], where), where)

    @staticmethod
    def _check(settings: Settings, where: str) -> None:
        try:
            old_entries(0, [], settings.long_term_retention or None, settings.timezone)
            settings.export_rate()
            _ = settings.health_check_seconds
        except Refused as error:
            raise _invalid(where, error.message) from error

    def snapshot_retention(self, schedule_id: str, vm_uuid: str) -> int:
        """For the snapshots that ``schedule_id`` made, which may be another schedule's."""
        levels = [*self._base[:-1], self._job.get(schedule_id), self._job.get(vm_uuid)]
        return int(self._read(levels, schedule_id).snapshot_retention)

    def without_effect(self) -> list[str]:
        """A sentence for each key that means nothing to any run, to be told once."""
        found: set[str] = set()
        for level in (*self._base, *self._job.values()):
            found.update(set(_level(level, "the job")) - KNOWN - REPORT_KEYS)
        return [
            f"the setting '{key}' has no effect: {WITHOUT_EFFECT[key]}"
            if key in WITHOUT_EFFECT
            else f"the setting '{key}' is not known and has no effect"
            for key in sorted(found)
        ]

    @staticmethod
    def _read(levels: Sequence[Any], where: str) -> Settings:
        merged: dict[str, Any] = {}
        for level in levels:
            given = _level(level, where)
            merged.update({key: value for key, value in given.items() if value is not None})
        try:
            return msgspec.convert({k: v for k, v in merged.items() if k in KNOWN}, Settings)
        except msgspec.ValidationError as error:
            raise _invalid(where, str(error)) from error


def _level(level: object, where: str) -> dict[str, Any]:
    if level is None:
        return {}
    if not isinstance(level, dict):
        raise _invalid(where, "must be object")
    return cast("dict[str, Any]", level)


def _invalid(where: str, message: str) -> Refused:
    # Not InvalidParams: on that number XO would repeat the run without its log.
    return Refused(
        f"the settings of {where} are wrong: {message}", code="EINVAL", data={"settings": where}
    )


def _forced(tags: Sequence[str]) -> dict[str, Any]:
    forced: dict[str, Any] = {}
    if "xo-memory-backup" in tags:
        forced["checkpointSnapshot"] = True
    if "xo-offline-backup" in tags:
        forced["offlineSnapshot"] = True
    return forced


def refuse_contradictions(settings: Settings) -> None:
    """Raise ``Refused`` for settings that exclude one another (upstream's message)."""
    if settings.offline_backup and settings.snapshot_retention != 0:
        raise Refused(
            "offlineBackup is not compatible with snapshotRetention",
            code="EINVAL",
            data={"snapshotRetention": settings.snapshot_retention},
        )
