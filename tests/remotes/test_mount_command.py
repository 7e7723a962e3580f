"""What `mount` is asked and how its answers are read; the texts are those of real helpers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ProxyError, Refused, Unreachable
from proxy.remotes.mount_command import (
    MountRequest,
    explain,
    nfs_request,
    probe_error,
    smb_request,
    unmount,
)
from proxy.remotes.url import NfsUrl, SmbUrl, parse_url

SECRET = "hunter2Is0nlyOurs"


def request_for(url: str, options: Any = None) -> MountRequest:
    parsed = parse_url(url)
    if isinstance(parsed, NfsUrl):
        return nfs_request(parsed, options)
    assert isinstance(parsed, SmbUrl)
    return smb_request(parsed, options)


@pytest.mark.parametrize(
    ("url", "options", "command"),
    [
        # as recorded from upstream, its empty `-o ''` and `port=2050,` aside
        (
            "nfs://h:2050:/p/q",
            "vers=3,nolock",
            ["mount", "-o", "port=2050,vers=3,nolock", "-t", "nfs", "h:/p/q", "/m"],
        ),
        (
            r"smb://u:p@ss@DOM\\1.2.3.4\share" + "\0",
            None,
            ["mount", "-o", "domain=DOM", "-t", "cifs", r"//1.2.3.4\share/", "/m"],
        ),
        (
            r"smb://u:p@ss@DOM\\1.2.3.4\share" + "\0" + r"\dir\sub",
            "vers=3.0,sec=ntlmssp",
            [
                *("mount", "-o", "domain=DOM,vers=3.0,sec=ntlmssp", "-t", "cifs"),
                *(r"//1.2.3.4\share/\dir\sub", "/m"),
            ],
        ),
        ("nfs://h:2050:/p", "", ["mount", "-o", "port=2050", "-t", "nfs", "h:/p", "/m"]),
        ("nfs://h:/p", " vers=3 ,, ro,", ["mount", "-o", "vers=3,ro", "-t", "nfs", "h:/p", "/m"]),
    ],
)
def test_arguments_are_upstreams(url: str, options: Any, command: list[str]) -> None:
    assert request_for(url, options).mount("/m") == command


@pytest.mark.parametrize("options", [None, "", " , ,"])
def test_weakness_19_no_option_without_options(options: Any) -> None:
    command = request_for("nfs://h:/p/q", options).mount("/m")
    assert command == ["mount", "-t", "nfs", "h:/p/q", "/m"]


def test_weakness_18_an_ipv6_host_keeps_its_brackets() -> None:
    command = request_for("nfs://[fe80::1%eth0]:2049:/a").mount("/m")
    assert command == ["mount", "-o", "port=2049", "-t", "nfs", "[fe80::1%eth0]:/a", "/m"]


@pytest.mark.parametrize(
    ("url", "options", "part"),
    [
        (r"smb://u:p@D,uid=0\\h\s", None, "domain"),
        (r"smb://u:p@D\\h\s", "password=x", "options"),
        (r"smb://u:p@D\\h\s", "vers=3.0, PASS =x", "options"),
        (r"smb://u:p" + "\n" + r"w@D\\h\s", None, "password"),
        (r"smb://u:p@D\\h\s" + "\n" + "x", None, "host"),
        ("nfs://-oro:/a", None, "host"),
        ("nfs://h\nx:/a", None, "host"),
        ("nfs://h:/a\x7f", None, "path"),
        ("nfs://h:/a", "bind", "options"),
        ("nfs://h:/a", "ro,remount", "options"),
        ("nfs://h:/a", "a\nb", "options"),
        ("nfs://h:/a", "x" * 5000, "options"),
        ("nfs://h:/a", ["ro"], "options"),
    ],
)
def test_weakness_18_what_would_become_another_option_is_refused(
    url: str, options: Any, part: str
) -> None:
    with pytest.raises(Refused) as caught:
        request_for(url, options)
    assert (caught.value.code, caught.value.data) == ("EINVAL", {"part": part})


def test_the_password_is_in_the_environment_alone() -> None:
    request = request_for(rf"smb://u:{SECRET}@D\\h\s")
    environment = request.environment({"PATH": "/bin", "LANG": "de", "LC_ALL": "de", "TOKEN": "x"})
    assert environment == {"PATH": "/bin", "LANG": "C", "USER": "u", "PASSWD": SECRET}
    assert SECRET not in " ".join(request.mount("/m", sudo=True)) + repr(request)
    assert request_for("nfs://h:/a").environment({"PATH": "/bin"}) == {"PATH": "/bin", "LANG": "C"}


def test_sudo_asks_nobody_and_keeps_what_the_helper_reads() -> None:
    command = request_for(r"smb://u:p@D\\h\s").mount("/m", sudo=True)
    assert command[:3] == ["sudo", "-n", "--preserve-env=LANG,USER,PASSWD"]
    assert command[3:] == request_for(r"smb://u:p@D\\h\s").mount("/m")
    assert unmount("/m", sudo=True) == ["sudo", "-n", "umount", "/m"]
    assert unmount("/m", lazy=True) == ["umount", "-l", "/m"]


@pytest.mark.parametrize(
    "unsafe", [None, 5, "", ".", "..", "../x", "a/b", ".hidden", "a\0", "a" * 101]
)
def test_weakness_16_without_a_usable_id_the_name_is_always_the_same(unsafe: Any) -> None:
    first, second = (next(request_for("nfs://h:/a", "ro").names(unsafe)) for _ in range(2))
    assert first == second
    assert first.isalnum()
    assert first != next(request_for("nfs://h:/a", "rw").names(unsafe))
    assert first != next(request_for("nfs://h:/b", "ro").names(unsafe))


def test_an_id_is_the_name_as_upstreams() -> None:
    names = list(request_for("nfs://h:/a").names("0a1b-2c"))
    assert names[0] == "0a1b-2c"
    assert len(set(names)) == len(names)
    assert all(name.startswith("0a1b-2c.") for name in names[1:])


def test_a_name_tells_nothing_of_the_password() -> None:
    one, other = (request_for(rf"smb://u:{word}@D\\h\s") for word in ("one-pass", "other-pass"))
    assert list(one.names(None)) == list(other.names(None))
    assert one.key != other.key


NFS = request_for("nfs://h:/p")
CIFS = request_for(rf"smb://u:{SECRET}@D\\h\s")


@pytest.mark.parametrize(
    ("request_", "text", "code"),
    [
        (NFS, "mount.nfs: access denied by server while mounting h:/p", "EACCES"),
        (NFS, "mount.nfs: No route to host for h:/p on /m", "EHOSTUNREACH"),
        (NFS, "mount.nfs: Connection refused", "ECONNREFUSED"),
        (NFS, "mount.nfs: Connection timed out", "ETIMEDOUT"),
        (NFS, "mount.nfs: Network is unreachable", "ENETUNREACH"),
        (NFS, "mount.nfs: Stale file handle", "ESTALE"),
        (NFS, "mount.nfs: Failed to resolve server h: Name or service not known", "ENOTFOUND"),
        (
            NFS,
            "mount.nfs: mounting h:/p failed, reason given by server: No such file or directory",
            "ENOENT",
        ),
        (
            NFS,
            "mount.nfs: requested NFS version or transport protocol is not supported",
            "EPROTONOSUPPORT",
        ),
        (NFS, "mount.nfs: an incorrect mount option was specified", "EINVAL"),
        (NFS, "mount: /m: must be superuser to use mount.", "EPERM"),
        (NFS, "mount: /m: unknown filesystem type 'nfs'.", "ENODEV"),
        (NFS, "sudo: a password is required", "EPERM"),
        (
            CIFS,
            "mount error(13): Permission denied\nRefer to the mount.cifs(8) manual page",
            "EACCES",
        ),
        (CIFS, "mount error(2): No such file or directory", "ENOENT"),
        (CIFS, "mount error(6): No such device or address", "ENOENT"),
        (
            CIFS,
            "mount error(111): could not connect to 1.2.3.4Unable to find suitable address.",
            "ECONNREFUSED",
        ),
        (CIFS, "mount error(113): could not connect to 1.2.3.4", "EHOSTUNREACH"),
        (CIFS, "mount error(112): Host is down", "EHOSTUNREACH"),
        (CIFS, "mount error(115): Operation now in progress", "ETIMEDOUT"),
        (CIFS, "mount error(19): No such device", "ENODEV"),
        (CIFS, "mount error: cifs filesystem not supported by the system", "ENODEV"),
        (CIFS, "mount error: could not resolve address for h: Unknown error", "ENOTFOUND"),
        (CIFS, "", "EIO"),
    ],
)
def test_answers_have_codes_that_xen_orchestra_knows(
    request_: MountRequest, text: str, code: str
) -> None:
    error = explain(text, 32, request_)
    assert error.code == code
    assert error.message.startswith(f"{code}: ")
    assert text.splitlines()[0][:40].rstrip(".") in error.message if text else "code 32"
    reaches = code not in (
        "ETIMEDOUT",
        "ECONNREFUSED",
        "EHOSTUNREACH",
        "ENETUNREACH",
        "ESTALE",
        "ENOTFOUND",
        "EIO",
    )
    assert isinstance(error, Unreachable) is not reaches


@pytest.mark.parametrize(("request_", "package"), [(NFS, "nfs-common"), (CIFS, "cifs-utils")])
def test_a_missing_helper_is_named_with_its_package(request_: MountRequest, package: str) -> None:
    text = (
        "mount: /m: bad option; for several filesystems (e.g. nfs, cifs) you might need a "
        f"/sbin/mount.{request_.type} helper program."
    )
    for error in (
        explain(text, 32, request_),
        explain("mount: /m: bad option", 32, request_, has_helper=False),
    ):
        assert f"install the package {package}" in error.message
        assert error.code == "EMOUNTHELPER"


@pytest.mark.parametrize("password", [SECRET, "abc"])
def test_an_answer_that_quotes_the_password_is_scrubbed(password: str) -> None:
    """Also one that is too short to be remembered."""
    request = request_for(rf"smb://u:{password}@D\\h\s")
    error = explain(f"mount error(22): bad value {password},x: {password}", 32, request)
    assert password not in f"{error!r} {error.message} {error.data}"


def test_what_the_probe_met_says_what_to_do() -> None:
    assert "no_root_squash" in probe_error(13, "create", NFS).message
    assert "'ro'" in probe_error(30, "create", NFS).message
    assert probe_error(116, "statvfs", NFS).code == "ESTALE"


@given(st.text(max_size=300), st.integers(0, 255))
def test_any_answer_is_an_error_of_bounded_size(text: str, code: int) -> None:
    error = explain(text, code, CIFS)
    assert isinstance(error, ProxyError)
    assert len(error.message) < 1000


@given(st.text(max_size=40))
def test_options_stay_one_argument_without_control_characters(options: str) -> None:
    try:
        command = nfs_request(NfsUrl(host="h", path="/p"), options).mount("/m")
    except Refused:
        return
    assert command[-4:] == ["-t", "nfs", "h:/p", "/m"]
    assert len(command) in (5, 7)
    given_ = command[2] if len(command) == 7 else ""
    assert given_.split(",") == [part for part in map(str.strip, options.split(",")) if part] or [
        ""
    ]
