"""What writers that died left in an object store: listed, and given up."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING

import pytest

from proxy.errors import ProxyError, Refused, Unauthorized, Unreachable
from proxy.remotes import OpenUpload, opened_remote
from proxy.remotes.objects import s3_upload
from proxy.remotes.objects.s3_client import S3Client
from proxy.remotes.objects.s3_endpoint import S3Endpoint
from proxy.remotes.url import S3Url, parse_url
from proxy.remotes.wrapper import abort_upload_of, innermost, open_uploads_of, requests_of
from tests.remotes.conftest import KEY, OPTIONS
from tests.remotes.objects.conftest import opened_s3
from tests.remotes.objects.fake_s3 import MIB, Answer, FakeS3, serving

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.remotes import Remote
    from tests.azurite import Azurite

pytestmark = pytest.mark.usefixtures("quick")

END = "<IsTruncated>false</IsTruncated>"


def begun(fake: FakeS3, key: str, *, ago: float = 0) -> str:
    """An upload of a writer that is gone."""
    name = secrets.token_hex(8)
    fake.uploads[name] = (key, {1: b"x" * MIB})
    fake.begun[name] = time.time() - ago
    return name


async def test_every_page_below_a_directory_is_told() -> None:
    async with opened_s3(page=2) as (remote, fake):
        names = [f"dir/xo-vm-backups/vm/é {number}&+.xva" for number in range(5)]
        ids = {begun(fake, name, ago=1000): name for name in names}
        twice = begun(fake, names[0], ago=5)
        begun(fake, "dir/xo-vm-backups/vm2/x.xva")
        begun(fake, "other/xo-vm-backups/vm/x.xva")
        found = await open_uploads_of(remote, "xo-vm-backups/vm")
        assert {(each.upload_id, f"dir/{each.path}") for each in found} == {
            *ids.items(),
            (twice, names[0]),
        }
        ages = {each.upload_id: time.time() - each.initiated for each in found}
        assert 0 < ages.pop(twice) < 60
        assert all(990 < age < 1060 for age in ages.values())
        assert fake.verbs() == ["list-uploads"] * 3


async def test_what_is_given_up_is_gone_and_nothing_else() -> None:
    async with opened_s3() as (remote, fake):
        gone, stays = begun(fake, "dir/a"), begun(fake, "dir/a")
        uploads = {each.upload_id: each for each in await open_uploads_of(remote, "")}
        await abort_upload_of(remote, uploads[gone])
        assert list(fake.uploads) == [stays]
        await abort_upload_of(remote, uploads[gone])  # somebody else was faster
        assert [each.upload_id for each in await open_uploads_of(remote, "")] == [stays]


async def test_through_all_wrappers_and_encryption() -> None:
    async with serving(FakeS3()) as fake:
        spec = {"url": fake.url("dir"), "encryptionKey": KEY}
        async with opened_remote(spec, options=OPTIONS) as remote:
            begun(fake, "dir/a/b")
            (upload,) = await open_uploads_of(remote, "a")
            assert upload.path == "a/b"
            await abort_upload_of(remote, upload)
            assert fake.uploads == {}


async def test_what_this_process_writes_is_never_told() -> None:
    """Not through another remote on the same bucket either."""
    before = set(s3_upload._under_way)  # of tests that let a server die
    async with serving(FakeS3()) as fake:
        spec = {"url": fake.url("dir")}
        async with (
            opened_remote(spec, options=OPTIONS) as ours,
            opened_remote({**spec, "immutable": True}, options=OPTIONS) as other,
        ):
            async with ours.create("big") as file:
                for _ in range(12):
                    await file.write(bytes(MIB))
                while not fake.uploads:
                    await file.write(bytes(MIB))
                assert await open_uploads_of(other, "") == ()
                await file.commit()
            assert fake.uploads == {}
            with contextlib.suppress(Unreachable):
                async with ours.create("big2") as file:
                    fake.fail("abort", times=100, status=500)
                    while not fake.uploads:
                        await file.write(bytes(MIB))
                    raise Unreachable("the source is gone")
            # given up in vain: from now on it is one that somebody left behind
            fake.faults.clear()
            (left,) = await open_uploads_of(other, "")
            assert left.path == "big2"
            await abort_upload_of(other, left)
            assert fake.uploads == {}
    assert set(s3_upload._under_way) <= before


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        ("<IsTruncated>true</IsTruncated>", "it goes on, but does not say where"),
        ("", "it does not say whether it is"),
        (END + "<Upload><Key>dir/a</Key></Upload>", "has no id"),
        (
            END + "<Upload><Key>else</Key><UploadId>i</UploadId></Upload>",
            "names that were not asked for",
        ),
        (END + "<Upload><Key>dir/a</Key><UploadId>i</UploadId></Upload>", "isoformat"),
        (
            "<IsTruncated>true</IsTruncated><NextKeyMarker>dir/a</NextKeyMarker>",
            "goes in circles",
        ),
    ],
)
async def test_a_listing_that_is_not_whole_is_none(inside: str, text: str) -> None:
    body = f"<ListMultipartUploadsResult>{inside}</ListMultipartUploadsResult>".encode()
    async with opened_s3() as (remote, fake):
        fake.fail("list-uploads", times=100, answer=lambda _: Answer(200, body))
        with pytest.raises(Unreachable, match=text):
            await open_uploads_of(remote, "")


@pytest.mark.parametrize(
    ("status", "code", "kind", "expected"),
    [
        (403, "AccessDenied", Unauthorized, "EACCES"),
        (501, "NotImplemented", Refused, "ENOTSUP"),
    ],
)
async def test_a_store_that_does_not_tell_says_so(
    status: int, code: str, kind: type[ProxyError], expected: str
) -> None:
    async with opened_s3() as (remote, fake):
        fake.fail("list-uploads", status=status, code=code)
        with pytest.raises(kind) as caught:
            await open_uploads_of(remote, "")
        assert caught.value.code == expected


async def test_a_lost_answer_is_asked_again() -> None:
    async with opened_s3() as (remote, fake):
        begun(fake, "dir/a")
        fake.fail("list-uploads", reset=True)
        (upload,) = await open_uploads_of(remote, "")
        fake.fail("abort", after=True, reset=True)
        await abort_upload_of(remote, upload)
        assert fake.uploads == {}


async def test_the_uploads_of_a_killed_daemon_on_moto(moto: str) -> None:
    """Begun by a client that knows nothing of the remote, as another process is."""
    folder = secrets.token_hex(8)
    parsed = parse_url(f"s3+http://key:secretkey@{moto}/bucket/{folder}")
    assert isinstance(parsed, S3Url)
    client = S3Client(S3Endpoint.of(parsed), access_key="key", secret_key="secretkey")
    keys = [f"{folder}/a/é +&.xva", f"{folder}/b.xva"]
    for key in keys:
        await client.call("POST", "POST", key, doing="writing", query=[("uploads", "")])
    client.close()
    async with opened_remote({"url": parsed.format()}, options=OPTIONS) as remote:
        found = {each.path: each for each in await open_uploads_of(remote, "")}
        assert sorted(found) == ["a/é +&.xva", "b.xva"]
        assert all(each.upload_id and each.initiated > 0 for each in found.values())
        assert [each.path for each in await open_uploads_of(remote, "a")] == ["a/é +&.xva"]
        await abort_upload_of(remote, found["b.xva"])
        assert [each.path for each in await open_uploads_of(remote, "")] == ["a/é +&.xva"]
        await abort_upload_of(remote, found["a/é +&.xva"])
        assert await open_uploads_of(remote, "") == ()


async def test_azure_forgets_by_itself(azurite: Azurite) -> None:
    url = azurite.url(f"/cont/{secrets.token_hex(8)}")
    async with opened_remote({"url": url}, options=OPTIONS) as remote:
        sent = sum(requests_of(remote).values())
        assert await open_uploads_of(remote, "") == ()
        await abort_upload_of(remote, OpenUpload("f", "id", 0.0))
        assert sum(requests_of(innermost(remote)).values()) == sent


async def test_a_directory_has_none(local: Remote, root: Path) -> None:
    await local.write_file("f", b"data")
    assert await open_uploads_of(local, "") == ()
    await abort_upload_of(local, OpenUpload("f", "id", 0.0))
    assert (root / "f").read_bytes() == b"data"
