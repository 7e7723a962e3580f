"""The store against azurite, and against what Microsoft's own client writes and reads there."""

from __future__ import annotations

import base64
import secrets
import ssl
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
import trio
from azure.storage.blob import ContainerClient
from trio.to_thread import run_sync as in_thread

from proxy.errors import Busy, Conflict, Corrupt, NotFound, Refused, Unauthorized, Unreachable
from proxy.remotes import open_remote, opened_remote
from proxy.remotes.objects.azure import LIMITS, AzureStore
from proxy.remotes.objects.azure_client import AzureClient, Place
from proxy.remotes.objects.azure_opening import open_azure
from proxy.remotes.objects.parts import BUDGET, Sizes
from proxy.remotes.objects.store import Condition
from proxy.remotes.probe import test_remote as check_remote
from proxy.remotes.url import AzureUrl, parse_url
from proxy.runtime.http_pool import HttpPool
from tests import certificates
from tests.azurite import ACCOUNT, KEY
from tests.remotes.conftest import OPTIONS
from tests.remotes.objects.fake_azure import Answer, Script, refusal, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.azurite import Azurite

# what a URL, a header, XML or a shell would read as something else
NAMES = ["plain", "a b", "é/ü", "50%25", "q?a=b&c#d", "x+y", "<&>'\"", "a;b,c:d@e", "tilde~(1)!*"]


def parsed(url: str) -> AzureUrl:
    found = parse_url(url)
    assert isinstance(found, AzureUrl)
    return found


@pytest.fixture
def container() -> str:
    return f"c{secrets.token_hex(8)}"


@pytest.fixture
async def store(azurite: Azurite, container: str) -> AsyncIterator[AzureStore]:
    built = AzureStore(AzureClient.of(parsed(azurite.url(f"/{container}"))), checks_data=True)
    await built.make_container()
    try:
        yield built
    finally:
        await built.aclose()


@pytest.fixture
def theirs(azurite: Azurite, container: str, store: AzureStore) -> Iterator[ContainerClient]:
    """Microsoft's client on the same container."""
    address = f"http://{azurite.address}/{ACCOUNT}"
    version = "2025-11-05"  # the newest that azurite knows
    client = ContainerClient(address, container, credential=KEY, api_version=version)
    with client:
        yield client


@pytest.mark.parametrize("name", NAMES)
async def test_names_are_what_microsofts_client_sees(
    store: AzureStore, theirs: ContainerClient, name: str
) -> None:
    await store.put(f"d/{name}", b"ours")
    blob = theirs.get_blob_client(f"d/{name}")
    assert await in_thread(lambda: blob.download_blob().readall()) == b"ours"
    await in_thread(lambda: blob.upload_blob(b"theirs", overwrite=True))
    assert await store.get(f"d/{name}", limit=10) == b"theirs"
    await store.copy(f"d/{name}", f"e/{name}")
    page = await store.list("", deep=True)
    assert [each.key for each in page.objects] == [f"d/{name}", f"e/{name}"]
    assert await store.delete_many([f"d/{name}", f"e/{name}"]) == [None, None]
    assert await in_thread(lambda: [*theirs.list_blob_names()]) == []


async def test_what_is_written_is_what_microsofts_client_reads(
    store: AzureStore, theirs: ContainerClient
) -> None:
    data = secrets.token_bytes(600_000)
    etag = await store.put("one", memoryview(data))
    upload = await store.upload("parts")
    async with trio.open_nursery() as nursery:
        for number, start in ((2, 300_000), (1, 0)):
            nursery.start_soon(upload.send, number, memoryview(data)[start : start + 300_000])
    await upload.complete()
    for name in ("one", "parts"):
        blob = theirs.get_blob_client(name)
        assert (await in_thread(blob.download_blob)).readall() == data
        properties = await in_thread(blob.get_blob_properties)
        assert properties.content_settings.content_type == "application/octet-stream"
        status = await store.head(name)
        assert (status.size, status.etag) == (len(data), properties.etag)
        assert status.mtime == properties.last_modified.timestamp()
    assert etag == (await store.head("one")).etag


async def test_ranges_end_where_the_blob_ends(store: AzureStore) -> None:
    data = bytes(range(256)) * 8
    etag = await store.put("f", data)
    buffer = memoryview(bytearray(1000))
    assert await store.get_into("f", 1500, buffer, etag=etag) == 548
    assert buffer[:548] == data[1500:]
    assert await store.get_into("f", 100, buffer) == 1000
    assert buffer == data[100:1100]
    assert await store.get_into("f", 2048, buffer) == 0
    assert await store.get_into("f", 9999, buffer) == 0
    assert await store.get_into("f", 0, buffer[:0]) == 0
    await store.put("empty", b"")
    assert await store.get_into("empty", 0, buffer) == 0
    assert await store.get("empty", limit=0) == b""
    await store.put("f", data)
    with pytest.raises(Conflict) as caught:
        await store.get_into("f", 0, buffer, etag=etag)
    assert caught.value.code == "ESTALE"
    with pytest.raises(Corrupt, match="2047"):
        await store.get("f", limit=2047)


async def test_weakness_13_conditions_hold(store: AzureStore) -> None:
    """Upstream's exclusive writes always replace on Azure."""
    old = await store.put("f", b"1", condition=Condition(absent=True))
    new = await store.put("f", b"2", condition=Condition(etag=old))
    for condition in (Condition(absent=True), Condition(etag=old)):
        with pytest.raises(Conflict) as caught:
            await store.put("f", b"3", condition=condition)
        assert caught.value.code == "EEXIST"
        upload = await store.upload("f")
        await upload.send(1, b"3")
        with pytest.raises(Conflict):
            await upload.complete(condition=condition)
    with pytest.raises(Conflict):
        await store.delete("f", condition=Condition(etag=old))
    assert await store.get("f", limit=1) == b"2"
    await store.delete("f", condition=Condition(etag=new))
    await store.delete("f", condition=Condition(etag=new))  # it is gone
    await store.delete("f")
    with pytest.raises(NotFound):
        await store.head("f")


async def test_listings_go_on_behind_a_page(
    store: AzureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.remotes.objects.azure._PAGE", 3)
    keys = sorted(f"{directory}/{number}" for directory in "abc" for number in range(3))
    for key in keys:
        await store.put(key, b"x")
    found: list[str] = []
    token = None
    while True:
        page = await store.list("", deep=True, token=token)
        assert len(page.objects) <= 3
        found += [each.key for each in page.objects]
        token = page.next
        if token is None:
            break
    assert found == keys
    monkeypatch.setattr("proxy.remotes.objects.azure._PAGE", 5000)
    page = await store.list("", deep=False)
    assert ([*page.prefixes], [*page.objects]) == (["a/", "b/", "c/"], [])
    page = await store.list("b/", deep=False)
    assert [each.key for each in page.objects] == ["b/0", "b/1", "b/2"]
    assert store.requests()["LIST"] == 5


async def test_a_full_batch_is_one_request(store: AzureStore, theirs: ContainerClient) -> None:
    keys = [f"d {number}/é" for number in range(255)]
    for key in (keys[0], keys[254]):
        await store.put(key, b"x")
    assert await store.delete_many(keys) == [None] * 255
    assert store.requests()["BATCH"] == 1
    assert await in_thread(lambda: [*theirs.list_blob_names()]) == []


async def test_an_upload_that_is_given_up_is_no_blob(
    store: AzureStore, theirs: ContainerClient
) -> None:
    """Its blocks wait for a week, invisible, and hinder nobody, of whatever client they are."""
    blob = theirs.get_blob_client("f")
    await in_thread(lambda: blob.stage_block("u" * 36 + "0" * 12, b"old"))
    upload = await store.upload("f")
    await upload.send(1, b"given up")
    await upload.abort()
    with pytest.raises(NotFound):
        await store.head("f")
    assert (await store.list("", deep=True)).objects == ()
    again = await store.upload("f")
    await again.send(1, b"whole")
    await again.complete()
    assert await store.get("f", limit=10) == b"whole"
    # its blocks are gone with that: what was given up can never be completed
    assert (await in_thread(lambda: blob.get_block_list("uncommitted")))[1] == []


async def test_one_of_two_uploads_of_a_name_is_told(store: AzureStore) -> None:
    first, second = await store.upload("f"), await store.upload("f")
    await first.send(1, b"first")
    await second.send(1, b"second")
    await second.complete()
    with pytest.raises((Conflict, Refused)):
        await first.complete()
    assert await store.get("f", limit=10) == b"second"


async def test_ranges_are_copied_through_us_where_the_service_cannot(store: AzureStore) -> None:
    """azurite has no Put Block From URL."""
    data = secrets.token_bytes(5 * 1024 * 1024)
    await store.put("source", data)
    upload = await store.upload("target")
    await upload.copy(2, "source", 1, len(data) - 1)
    await upload.send(1, b"head")
    await upload.complete()
    assert await store.get("target", limit=len(data) * 2) == b"head" + data[1:]
    upload = await store.upload("other")
    with pytest.raises(Refused, match="not in it"):
        await upload.copy(1, "source", len(data) - 1, 2)


async def test_copies_replace_and_miss(store: AzureStore) -> None:
    await store.put("a", b"a")
    await store.put("b", b"b")
    await store.copy("a", "b")
    assert await store.get("b", limit=1) == b"a"
    with pytest.raises(NotFound) as caught:
        await store.copy("none", "b")
    assert caught.value.code == "ENOENT"
    assert await store.get("b", limit=1) == b"a"


async def test_bytes_that_are_damaged_on_the_way_are_refused(
    store: AzureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TLS each write carries its MD5."""

    async def other(_data: object) -> str:
        await trio.lowlevel.checkpoint()
        return base64.b64encode(bytes(16)).decode()

    monkeypatch.setattr("proxy.remotes.objects.azure._md5", other)
    with pytest.raises((Unreachable, Refused)):
        await store.put("f", b"x")
    with pytest.raises(NotFound):
        await store.head("f")


async def test_the_account_in_the_name_of_the_host(store: AzureStore, azurite: Azurite) -> None:
    """As the service itself is addressed; the emulator understands both."""
    host = f"{ACCOUNT}.blob.localhost"
    address, _, port = azurite.address.partition(":")
    pool = HttpPool(address, int(port), context=None)
    pool.host_header = f"{host}:{port}"
    container = store.client.place.container
    place = Place(f"http://{pool.host_header}", "", container, "")
    other = AzureStore(AzureClient(place, store.client.account, pool))
    await other.put("d/a b", b"x")
    await other.copy("d/a b", "d/c")
    assert await store.get("d/c", limit=1) == b"x"
    assert await other.delete_many(["d/a b", "d/c"]) == [None, None]
    assert (await store.list("", deep=True)).objects == ()
    await other.aclose()


async def test_weakness_09_two_proxies_do_not_work_on_one_vm(
    azurite: Azurite, container: str
) -> None:
    """Upstream has no locks on object stores."""
    record = {"url": azurite.url(f"/{container}/d")}
    async with (
        opened_remote(record, options=OPTIONS) as one,
        opened_remote(record, options=OPTIONS) as other,
    ):
        async with one.lock("xo-vm-backups/vm", owner="run-1") as lock:
            with pytest.raises(Busy, match="run-1"):
                async with other.lock("xo-vm-backups/vm", owner="run-2"):
                    pytest.fail("held twice")
            await lock.check()
        async with other.lock("xo-vm-backups/vm", owner="run-2"):
            pass


async def test_weakness_10_what_is_missing_is_told_at_once(
    azurite: Azurite, container: str
) -> None:
    """Upstream asks six times, then says `RestError`, `Expected a stream`, `Not implemented`."""
    url = parsed(azurite.url(f"/{container}"))
    waits = {"seconds": 10.0, "open_seconds": 10.0}
    remote = await open_azure(url, {}, **waits)
    before = sum(remote.requests().values())
    with pytest.raises(NotFound) as caught:
        async with remote.open_read("d/none"):
            pass
    assert caught.value.code == "ENOENT"
    assert sum(remote.requests().values()) == before + 1
    await remote.write_file("d/f", b"0123456789")
    async with remote.open_read("d/f") as file:
        assert await file.read_at(3, 4) == b"3456"
    with pytest.raises(Conflict) as full:
        await remote.rmdir("d")
    assert full.value.code == "ENOTEMPTY"
    await remote.unlink("d/f")
    await remote.rmdir("d")
    await remote.aclose()


def test_weakness_12_a_stream_of_unknown_length_is_not_cut() -> None:
    """Upstream's blocks of 4 MiB end at 195 GiB."""
    sizes = Sizes(LIMITS, BUDGET)
    reach = sum(sizes.of(number) for number in range(1, LIMITS.most_parts + 1))
    assert reach > 2 * 1024**4
    assert sizes.largest <= min(BUDGET, LIMITS.largest_part)


async def test_weakness_15_a_test_of_the_remote_leaves_nothing(
    azurite: Azurite, container: str
) -> None:
    record = {"url": azurite.url(f"/{container}/d")}
    found = await check_remote(opened_remote(record, options=OPTIONS))
    assert found["success"], found
    assert min(found["writeRate"], found["readRate"]) > 0
    async with opened_remote(record, options=OPTIONS) as remote:
        assert await remote.list("") == []
    wrong = {"url": record["url"].replace(quote(KEY, safe=""), "YQ%3D%3D")}
    found = await check_remote(opened_remote(wrong, options=OPTIONS))
    assert not found["success"]
    assert "check the key" in found["error"]


async def test_the_container_of_a_directory_is_made(azurite: Azurite, container: str) -> None:
    url = azurite.url(f"/{container}/a/b")
    for _ in range(2):
        async with opened_remote({"url": url}, options=OPTIONS) as remote:
            await remote.write_file("f", b"x")
            assert KEY not in remote.url
    client = AzureClient.of(parsed(azurite.url(f"/{container}")))
    store = AzureStore(client)
    assert [each.key for each in (await store.list("", deep=True)).objects] == ["a/b/f"]
    await store.aclose()


async def test_a_container_that_is_gone_is_not_a_missing_file(azurite: Azurite) -> None:
    store = AzureStore(AzureClient.of(parsed(azurite.url("/nobody-made-it"))))
    for call in (store.get("f", limit=1), store.list("", deep=True), store.delete("f")):
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.code == "ENOBUCKET"
    outcomes = await store.delete_many(["a", "b"])
    assert [isinstance(each, NotFound) and each.code for each in outcomes] == ["ENOBUCKET"] * 2
    await store.aclose()


async def test_a_wrong_key_says_so_and_shows_none(azurite: Azurite, container: str) -> None:
    wrong = base64.b64encode(b"an0ther-key").decode()
    url = azurite.url(f"/{container}").replace(quote(KEY, safe=""), quote(wrong, safe=""))
    with pytest.raises(Unauthorized) as caught:
        await open_remote({"url": url}, options=OPTIONS)
    assert caught.value.data["part"] == "password"
    assert f"container '{container}'" in caught.value.message
    assert wrong not in f"{caught.value.message} {caught.value.data}"


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("azure://acc:a2V5@acc.blob.core.windows.net/cont", ("https", "", "cont", "")),
        (
            "azure://acc:a2V5@acc.blob.core.windows.net/cont//a/./b%20c/",
            ("https", "", "cont", "a/b%20c"),
        ),
        ("azurite://acc:a2V5@localhost:10000/cont/d", ("https", "/acc", "cont", "d")),
        ("azurite+http://acc:a2V5@localhost:10000/cont/d", ("http", "/acc", "cont", "d")),
    ],
)
def test_the_emulator_has_the_account_in_its_paths(url: str, place: tuple[str, ...]) -> None:
    found = Place.of(parsed(url))
    protocol = found.origin.partition(":")[0]
    assert (protocol, found.base, found.container, found.prefix) == place


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("azure://acc:a2V5@host", "path"),
        ("azure://acc:a2V5@host/Upper/x", "path"),
        ("azure://acc:a2V5@host/$root", "path"),
        ("azure://acc:a2V5@host/ab", "path"),
        ("azure://acc:no-base64!@host/cont", "password"),
        ("azure://:a2V5@host/cont", "username"),
        ("azure://acc:a2V5@host:port/cont", "host"),
        ("azure://acc:a2V5@:80/cont", "host"),
    ],
)
async def test_a_url_that_names_no_container_is_refused(url: str, part: str) -> None:
    with pytest.raises(Refused) as caught:
        await open_remote({"url": url}, options=OPTIONS)
    assert caught.value.code == "EINVAL"
    assert caught.value.data["part"] == part


# The answers to the reads of encryption.json and metadata.json.
NOT_ENCRYPTED = [refusal(404, "BlobNotFound")] * 2


@pytest.mark.parametrize("option", ["", "?allowUnauthorized=true"])
async def test_weakness_10_allow_unauthorized_is_honoured(option: str, tmp_path: Path) -> None:
    """Upstream stores the option for Azure and ignores it."""
    identity = certificates.make("azure")
    certificates.write(identity, tmp_path, authority=identity)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server-cert.pem", tmp_path / "server-key.pem")
    script = Script(Answer(201), Answer(200), *NOT_ENCRYPTED)
    async with serving(script, context) as port:
        url = f"azurite://acc:a2V5@127.0.0.1:{port}/cont{option}"
        if option:
            async with opened_remote({"url": url}, options=OPTIONS) as remote:
                assert not remote.is_immutable
            assert [request.method for request in script.log] == ["PUT", "HEAD", "GET", "GET"]
        else:
            with pytest.raises(Unreachable) as caught:
                await open_remote({"url": url}, options=OPTIONS)
            assert caught.value.code == "DEPTH_ZERO_SELF_SIGNED_CERT"
            assert script.log == []


async def test_a_policy_of_the_container_makes_the_remote_immutable() -> None:
    locked = Answer(200, headers={"x-ms-has-immutability-policy": "true"})
    async with serving(Script(Answer(201), locked, *NOT_ENCRYPTED)) as port:
        url = f"azurite+http://acc:a2V5@127.0.0.1:{port}/cont"
        async with opened_remote({"url": url}, options=OPTIONS) as remote:
            assert remote.is_immutable
