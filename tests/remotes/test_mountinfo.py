"""The kernel's table of mounts: lines as real kernels write them."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.remotes import mountinfo
from proxy.remotes.mountinfo import parse, serves
from tests.remotes.test_mount_command import request_for

if TYPE_CHECKING:
    from pathlib import Path

    from tests.remotes.server import Server

NFS = (
    "312 25 0:52 / /run/xo-proxy/mounts/abc rw,relatime shared:170 - nfs4 10.0.0.2:/export/a "
    "rw,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,hard,proto=tcp,timeo=600,retrans=2,"
    "sec=sys,clientaddr=10.0.0.9,local_lock=none,addr=10.0.0.2\n"
)
CIFS = (
    "313 25 0:53 / /run/xo-proxy/mounts/with\\040space rw,relatime - cifs //nas/share/dir "
    "rw,vers=3.1.1,cache=strict,username=u,domain=DOM,uid=0,noforceuid,gid=0,addr=10.0.0.3,"
    "file_mode=0755,dir_mode=0755,soft,nounix,serverino,mapposix\n"
)


def test_fields_with_optional_ones_and_escapes() -> None:
    nfs, cifs = parse(NFS + "nonsense\n1 2 3\n" + CIFS)
    assert (nfs.id, nfs.type, nfs.source) == (312, "nfs4", "10.0.0.2:/export/a")
    assert "vers=4.2" in nfs.options
    assert "relatime" in nfs.options
    assert cifs.directory == "/run/xo-proxy/mounts/with space"


@pytest.mark.parametrize(
    ("url", "options", "same"),
    [
        ("nfs://10.0.0.2:/export/a", None, True),
        ("nfs://10.0.0.2:/export/a/", "vers=4,hard,noatime", True),
        ("nfs://10.0.0.2:/export/a", "nfsvers=4.2", True),
        ("nfs://10.0.0.2:/export/b", None, False),
        ("nfs://10.0.0.3:/export/a", None, False),
        ("nfs://10.0.0.2:/export/a", "vers=3", False),
        ("nfs://10.0.0.2:/export/a", "soft", False),
        ("nfs://10.0.0.2:/export/a", "ro", False),
        ("nfs://10.0.0.2:/export/a", "timeo=50", False),
    ],
)
def test_weakness_17_another_source_or_option_is_another_mount(
    url: str, options: str | None, *, same: bool
) -> None:
    (mounted,) = parse(NFS)
    assert serves(mounted, request_for(url, options)) is same


@pytest.mark.parametrize(
    ("url", "same"),
    [
        (r"smb://u:p@DOM\\nas\share" + "\0" + r"\dir", True),
        (r"smb://u:p@OTHER\\nas\share" + "\0" + r"\dir", False),
        (r"smb://u:p@DOM\\nas\share" + "\0" + r"\other", False),
    ],
)
def test_backslashes_of_a_share_are_slashes_of_the_kernel(url: str, *, same: bool) -> None:
    (mounted,) = parse(CIFS)
    assert serves(mounted, request_for(url)) is same


def test_the_last_of_several_mounts_is_seen(server: Server, tmp_path: Path) -> None:
    place = tmp_path / "a place"
    place.mkdir()
    assert mountinfo.mounted_at(str(place)) is None
    for source in ("first", "second one"):
        subprocess.run(["/usr/bin/mount", "-t", "tmpfs", source, str(place)], check=True)
    seen = mountinfo.mounted_at(str(place))
    assert seen is not None
    assert (seen.source, seen.type) == ("second one", "tmpfs")
    descriptor = os.open(place, os.O_RDONLY)
    try:
        assert mountinfo.mount_id_of(descriptor) == seen.id
        subprocess.run(["umount", "-l", str(place)], check=True)
        below = mountinfo.mounted_at(str(place))
        assert below is not None
        assert below.id != mountinfo.mount_id_of(descriptor)
    finally:
        os.close(descriptor)


@given(st.text())
def test_any_text_is_parsed(text: str) -> None:
    for mounted in parse(text):
        assert mounted.directory is not None
