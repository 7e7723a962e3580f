"""Every key of the configuration: its type, unit, default and meaning.

Names are camelCase in files and snake_case here.  ``Config()`` holds the same values as the
vendor file, without listeners; a test keeps the two equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from proxy.config.values import Bytes, Seconds

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A table of the file.  Immutable: a reload makes a new one."""


class ApiConfig(Section, frozen=True):
    keep_alive_interval: Seconds = Seconds(10)
    """Between two spaces in a silent NDJSON answer; 0 sends none."""
    max_body_size: Bytes = Bytes(256 * 1024 * 1024)
    """A larger request is refused with 413."""
    header_timeout: Seconds = Seconds(30)
    """From the first byte of a request (or of the TLS handshake) to the end of its headers."""
    body_timeout: Seconds = Seconds(60)
    """Silence allowed while the request's body arrives."""
    idle_timeout: Seconds = Seconds(120)
    """How long a connection without a request is kept."""
    send_timeout: Seconds = Seconds(60)
    """How long a client may leave an answer unread before it is cut off."""
    max_event_timeout: Seconds = Seconds(55)
    """Longest wait of ``event.from``: XO gives a call up after 60 s."""
    token_grace: Seconds = Seconds(300)
    """How long the previous token is still accepted after a change."""
    max_connections: AtLeastOne = 2048
    metrics: bool = True
    """Answer ``GET /metrics`` to whoever has the token."""


class VmConfig(Section, frozen=True):
    default_settings: dict[str, Any] = {}


class MetadataConfig(Section, frozen=True):
    default_settings: dict[str, Any] = {}


class BackupsConfig(Section, frozen=True):
    dir_mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)] = 0o700
    """Mode of the directories made on remotes."""
    snapshot_name_label_tpl: str = "[XO Backup {job.name}] {vm.name_label}"
    vhd_directory_compression: Literal["brotli", "gzip", "none"] = "brotli"
    default_settings: dict[str, Any] = {}
    """Settings below those of the job, for every kind of job."""
    vm: VmConfig = VmConfig()
    metadata: MetadataConfig = MetadataConfig()


class ListenConfig(Section, frozen=True):
    """One listener.  With ``cert`` and ``key`` it speaks TLS, otherwise plain HTTP."""

    hostname: str | None = None
    """Address to bind; unset binds every address, ``localhost`` both loopbacks."""
    port: Port | None = None
    """Unset: 443 with a certificate, else 80.  0: any free port."""
    socket: Path | None = None
    """A Unix socket instead of an address."""
    fd: Count | None = None
    """A listening socket inherited from the parent process."""
    systemd_socket: Count | None = None
    """Index of a socket passed by systemd's socket activation."""
    cert: Path | None = None
    key: Path | None = None
    auto_cert: bool = False
    """Make a self-signed certificate when ``cert`` and ``key`` are missing or unusable."""

    @property
    def tls(self) -> bool:
        return self.cert is not None and self.key is not None

    @property
    def effective_port(self) -> int:
        if self.port is not None:
            return self.port
        return 443 if self.tls else 80


class HttpConfig(Section, frozen=True):
    listen: dict[str, ListenConfig] = {}


class LogsConfig(Section, frozen=True):
    level: Literal["debug", "info", "warn", "error", "fatal"] = "info"
    filter: str | tuple[str, ...] = ""
    """Name patterns (``proxy.xapi.*``) that are logged at every level."""
    format: Literal["human", "json"] = "human"

    @property
    def patterns(self) -> list[str]:
        given = self.filter.replace(",", " ").split() if isinstance(self.filter, str) else None
        return given if given is not None else list(self.filter)


class RemoteOptions(Section, frozen=True):
    mounts_dir: Path = Path("/run/xo-proxy/mounts")
    timeout: Seconds = Seconds(600)
    """Longest silence of one operation on a remote; 0: none."""
    mount_timeout: Seconds = Seconds(45)
    """Longest ``mount``.  XO gives a call up after 60 s."""
    use_sudo: bool = False
    """Mount with ``sudo``, for a daemon that does not run as root."""
    max_parallel_operations: AtLeastOne = 16


class RemotesConfig(Section, frozen=True):
    disable_file_remotes: bool = True
    """Refuse ``file://`` remotes, which would name the appliance's own disk."""


class XapiOptions(Section, frozen=True):
    max_uncoalesced_vdis: Count = 1
    """A longer chain on the SR makes the VM's backup be skipped."""
    prefer_nbd: bool = False
    call_timeout: Seconds = Seconds(3600)
    """Longest answer to one XAPI call."""
    http_inactivity_timeout: Seconds = Seconds(300)
    """Silence allowed on a connection to a host."""


class TasksConfig(Section, frozen=True):
    """How much of the past the journal keeps."""

    max_finished: AtLeastOne = 10_000
    """Finished root tasks kept; the oldest go first."""
    max_age: Seconds = Seconds(93 * 86400)
    """Finished tasks older than this are dropped."""
    keep_deleted: AtLeastOne = 10_000
    """Deletions remembered for clients that follow events."""


class Config(Section, frozen=True):
    authentication_token: str = ""
    authentication_token_file: Path | None = None
    """A file whose trimmed content is the token; read again on every reload."""
    datadir: Path = Path("/var/lib/xo-proxy/data")
    """Where the task journal lives."""
    resource_cache_delay: Seconds = Seconds(300)
    """How long an unused remote or XAPI connection is kept open."""
    stop_grace: Seconds = Seconds(60)
    """After SIGTERM, how long running jobs may go on before they are cancelled."""
    undo_grace: Seconds = Seconds(120)
    """After that, how long cancelled jobs may clean up after themselves."""
    user: str | None = None
    """Become this user once the listeners are open."""
    group: str | None = None
    api: ApiConfig = ApiConfig()
    backups: BackupsConfig = BackupsConfig()
    http: HttpConfig = HttpConfig()
    logs: LogsConfig = LogsConfig()
    remote_options: RemoteOptions = RemoteOptions()
    remotes: RemotesConfig = RemotesConfig()
    xapi_options: XapiOptions = XapiOptions()
    tasks: TasksConfig = TasksConfig()


IGNORED: dict[str, str] = {
    "backups.disableMergeWorker": "merges are always part of the run that made them necessary",
    "backups.disableWorkers": "every run is a task of this process",
    "backups.maxMergedDeltasPerRun": "write it in [backups.defaultSettings]",
    "backups.mergeBlockConcurrency": "how many blocks are on their way is fixed",
    "backups.useGetDiskLegacy": "disks are read without a mount",
    "backups.writeBlockConcurrency": "how many blocks are on their way is fixed",
    "http.listen.*.acmeCa": "certificates from ACME are not supported, use cert and key",
    "http.listen.*.acmeDomain": "certificates from ACME are not supported, use cert and key",
    "http.listen.*.acmeEmail": "certificates from ACME are not supported, use cert and key",
    "http.proxy": "this daemon is no forward proxy",
    "reverseProxies": "this daemon is no reverse proxy",
    "remoteOptions.highWaterMark": "buffers are sized by the block",
    "remoteOptions.withLimit": "the limit is always on",
    "remoteOptions.withRetry": "retries are always on",
    "remoteOptions.withTimeout": "the timeout is always on",
    "xapiOptions.nbdOptions": "only the job's settings preferNbd and nbdConcurrency count",
    "xapiOptions.vdiDestroyRetryWhenInUse": "a disk in use is tried again for 50 s",
    "xapiOptions.watchEvents": "no copy of the pool is kept",
}
"""Keys of Xen Orchestra's own proxy that mean nothing here, and why; ``*`` is any name."""
