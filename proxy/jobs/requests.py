"""What a call asks for, checked as far as it can be without touching anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from proxy.errors import NotFound, Refused
from proxy.jobs.patterns import ids_of
from proxy.jobs.settings import SettingLevels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """``backup.run`` as received; ``remotes`` and ``xapis`` hold credentials."""

    job: Mapping[str, Any]
    schedule: Mapping[str, Any]
    remotes: Mapping[str, Mapping[str, Any]]
    xapis: Mapping[str, Mapping[str, Any]]
    record_to_xapi: Mapping[str, str]
    job_data: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def job_id(self) -> str | None:
        found = self.job.get("id")
        return None if found is None else str(found)

    def xapi_of(self, uuid: str) -> Mapping[str, Any]:
        """The pool that the call says for a VM, an SR or a pool; raises ``NotFound``."""
        spec = self.xapis.get(self.record_to_xapi.get(uuid, ""))
        if spec is None:
            raise NotFound(f"no XAPI associated to {uuid}", data={"id": uuid})
        return spec

    def properties(self) -> dict[str, Any]:
        """Of the root task: every key of ``jobData``, completed from the job itself."""
        mode = {"mode": self.job["mode"]} if "mode" in self.job else {}
        return {
            "jobId": self.job_id,
            "jobName": self.job.get("name"),
            **mode,
            "scheduleId": self.schedule.get("id"),
            **self.job_data,
        }


def wrong_job(part: str, message: str, **data: Any) -> Refused:
    """The refusal of a job; ``part`` of it is what is wrong."""
    # Not InvalidParams: on that number Xen Orchestra would repeat a call without its log.
    return Refused(message, code="EINVAL", data={"part": f"job.{part}", **data})


def settings_level(level: object, where: str) -> dict[str, Any]:
    """One level of a job's settings, as it came; raises ``Refused`` unless it is an object."""
    if level is None:
        return {}
    if not isinstance(level, dict):
        raise wrong_job("settings", f"the settings of {where} are wrong: must be object")
    return cast("dict[str, Any]", level)


@dataclass(frozen=True, slots=True)
class VmJob:
    """A job that backs up VMs, understood."""

    id: str
    name: str
    mode: str
    compression: str
    """``none``, ``native`` (gzip) or ``zstd``."""
    schedule_id: str
    schedule_name: str
    vms: list[str]
    remote_ids: list[str]
    sr_ids: list[str]
    settings: SettingLevels
    request: BackupRequest


_COMPRESSIONS = {"": "none", "native": "native", "zstd": "zstd"}


def understand(request: BackupRequest, defaults: Sequence[Any]) -> VmJob:
    """Raises ``Refused`` for what this daemon cannot run, before anything is touched.

    Nothing that is asked for is left out in silence.
    """
    job = request.job
    kind = job.get("type")
    if kind != "backup":
        raise Refused(f"No runner for the backup type {kind or 'undefined'}", code="ENOTSUP")
    mode = str(job.get("mode"))
    if mode not in ("full", "delta"):
        raise Refused(f"Job mode {mode} not implemented", code="ENOTSUP")
    schedule_id = str(request.schedule.get("id", ""))
    levels = SettingLevels(job.get("settings") or {}, schedule_id, defaults)
    remote_ids = ids_of(job.get("remotes"))
    sr_ids = ids_of(job.get("srs"))
    both = sorted(set(remote_ids) & set(sr_ids))
    if both:
        # settings, the log and retries tell targets apart by their ids
        raise Refused(
            f"the job names both a remote and an SR by the id {both[0]}",
            code="EINVAL",
            data={"id": both[0]},
        )
    levels.refuse_wrong([*remote_ids, *sr_ids])
    compression = job.get("compression") or ""
    return VmJob(
        id=str(job.get("id", "")),
        name=str(job.get("name", "")),
        mode=mode,
        compression=_COMPRESSIONS.get(str(compression), "zstd"),
        schedule_id=schedule_id,
        schedule_name=str(request.schedule.get("name") or ""),
        vms=ids_of(job.get("vms")),
        remote_ids=remote_ids,
        sr_ids=sr_ids,
        settings=levels,
        request=request,
    )


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """``backup.importVmBackup`` as received."""

    backup_id: str
    remote: Mapping[str, Any]
    sr_uuid: str
    xapi: Mapping[str, Any]
    new_mac_addresses: bool = False
    additional_vm_tag: str | None = None
    map_vdis_srs: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    """SR uuid by the uuid of a disk in the backup; ``None`` leaves the disk out."""
    use_differential_restore: bool = False
    ignored: tuple[str, ...] = ()
    """Settings that mean nothing to a restore: told in the log."""
