"""Images from a real registry become directories once; what a registry sends is believed by its digest alone."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import anyio
import pytest

from pantala.domain.runtime import UnpackedImage
from pantala.errors import InvalidRequest, NotFound, TransientError
from pantala.images.platforms import host_architecture
from pantala.images.reference import parse
from pantala.images.registry import Descriptor, RegistryClient
from pantala.images.store import FileImageStore
from pantala.testing.poll import until
from pantala.testing.registry import NAME, OCI, OCI_INDEX, Registry, layer, running_registry
from pantala.wire.machine import ImageRef

pytestmark = [pytest.mark.anyio, pytest.mark.root]

DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
OTHER = "arm64" if host_architecture() == "amd64" else "amd64"


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncGenerator[Registry]:
    async with running_registry(tmp_path) as made:
        yield made


@pytest.fixture
def store(tmp_path: Path, registry: Registry) -> FileImageStore:
    return FileImageStore(tmp_path / "store", registry.client)


def image(text: str) -> ImageRef:
    return parse(text)


def folders(store_root: Path, name: str) -> set[str]:
    return {path.name for path in (store_root / name).iterdir()}


async def test_an_image_is_unpacked_once_however_many_ask(
    registry: Registry, store: FileImageStore, tmp_path: Path
) -> None:
    digest = await registry.push(f"{NAME}/app:1", [layer(base="base"), layer(app="one")])
    found: list[UnpackedImage] = []

    async def ask() -> None:
        found.append(await store.ensure(image(f"{NAME}/app:1"), pull_token=""))

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(ask)
    assert len(found) == 8
    assert all(one == found[0] for one in found)
    assert found[0].digest == digest
    assert [path.joinpath(name).read_text() for path, name in zip(found[0].layers, ("base", "app"), strict=True)] == [
        "base",
        "one",
    ]
    config = found[0].config
    assert (config.cmd, config.env, config.exposed_ports, config.cwd) == (("/app",), {"A": "b"}, (8080,), "/")
    assert folders(tmp_path / "store", "tmp") == set()
    assert await store.find(digest) == found[0]


async def test_layers_are_shared_and_kept_while_an_image_has_them(
    registry: Registry, store: FileImageStore, tmp_path: Path
) -> None:
    base = layer(base="base")
    await registry.push(f"{NAME}/app:1", [base, layer(app="one")])
    await registry.push(f"{NAME}/app:2", [base, layer(app="two")])
    first = await store.ensure(image(f"{NAME}/app:1"), pull_token="")
    second = await store.ensure(image(f"{NAME}/app:2"), pull_token="")
    assert first.layers[0] == second.layers[0]
    assert len(folders(tmp_path / "store", "layers")) == 3
    assert await store.prune({second.digest}) == [first.digest]
    assert await store.find(first.digest) is None
    assert folders(tmp_path / "store", "layers") == {path.name for path in second.layers}
    assert (second.layers[0] / "base").read_text() == "base"
    assert folders(tmp_path / "store", "tmp") == set()


async def test_what_is_there_needs_no_registry(registry: Registry, store: FileImageStore, tmp_path: Path) -> None:
    digest = await registry.push(f"{NAME}/app:1", [layer(app="one")])
    await store.ensure(image(f"{NAME}/app:1"), pull_token="")
    nowhere = FileImageStore(tmp_path / "store", RegistryClient(endpoints={NAME: "http://127.0.0.1:1"}))
    assert (await nowhere.ensure(image(f"{NAME}/app@{digest}"), pull_token="")).digest == digest
    with pytest.raises(TransientError, match=f"{NAME} does not answer"):
        await nowhere.ensure(image(f"{NAME}/app:2"), pull_token="")


async def test_a_tampered_blob_is_refused_and_leaves_nothing(
    registry: Registry, store: FileImageStore, tmp_path: Path
) -> None:
    good = layer(app="good")
    digest = f"sha256:{hashlib.sha256(good).hexdigest()}"
    await registry.push(f"{NAME}/app:1", [good])
    registry.blob_file(digest).write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(InvalidRequest, match=f"what the registry sent for {digest} is not that blob"):
        await store.ensure(image(f"{NAME}/app:1"), pull_token="")
    assert folders(tmp_path / "store", "layers") == folders(tmp_path / "store", "tmp") == set()


async def test_a_layer_that_must_not_be_unpacked_names_the_image(
    registry: Registry, store: FileImageStore, tmp_path: Path
) -> None:
    await registry.push(f"{NAME}/app:1", [layer(**{"../escape": "x"})])
    with pytest.raises(
        InvalidRequest, match=rf"config.image: {NAME}/app:1: its layer sha256:\w+: the path '../escape'"
    ):
        await store.ensure(image(f"{NAME}/app:1"), pull_token="")
    assert folders(tmp_path / "store", "layers") == folders(tmp_path / "store", "tmp") == set()


async def test_a_pull_that_is_cancelled_leaves_nothing_and_the_next_one_works(
    registry: Registry, store: FileImageStore, tmp_path: Path
) -> None:
    digest = await registry.push(f"{NAME}/app:1", [layer(app="x" * 50_000_000)])

    async def begun() -> bool:
        return any(name.endswith(".tree") for name in folders(tmp_path / "store", "tmp"))

    async with anyio.create_task_group() as tasks:

        async def pull() -> None:
            await store.ensure(image(f"{NAME}/app:1"), pull_token="")

        tasks.start_soon(pull)
        await until(begun, bool, within_s=30, every_s=0.01)
        tasks.cancel_scope.cancel()
    assert folders(tmp_path / "store", "layers") == folders(tmp_path / "store", "tmp") == set()
    assert await store.find(digest) is None
    assert (await store.ensure(image(f"{NAME}/app:1"), pull_token="")).digest == digest


async def test_leftovers_of_a_crash_are_swept(registry: Registry, tmp_path: Path) -> None:
    left = tmp_path / "store" / "tmp" / "left.tree"
    left.mkdir(parents=True)
    (left / "file").write_text("x")
    FileImageStore(tmp_path / "store", registry.client)
    assert folders(tmp_path / "store", "tmp") == set()


async def test_an_image_that_is_not_there(registry: Registry, store: FileImageStore) -> None:
    await registry.push(f"{NAME}/app:1", [layer(app="one")])
    for text in (f"{NAME}/app:none", f"{NAME}/none:1"):
        with pytest.raises(NotFound, match=text):
            await store.ensure(image(text), pull_token="")


async def test_another_architecture_names_both(registry: Registry, store: FileImageStore) -> None:
    other = await registry.push(f"{NAME}/app:other", [layer(app="x")], architecture=OTHER)
    both = f"linux/{OTHER}, this host needs linux/{host_architecture()}"
    with pytest.raises(InvalidRequest, match=both):
        await store.ensure(image(f"{NAME}/app:other"), pull_token="")
    await registry.push_index(f"{NAME}/app:index", [(OTHER, other)])
    with pytest.raises(InvalidRequest, match=both):
        await store.ensure(image(f"{NAME}/app:index"), pull_token="")


async def test_an_index_leads_to_this_hosts_manifest_and_keeps_its_digest(
    registry: Registry, store: FileImageStore
) -> None:
    other = await registry.push(f"{NAME}/app:other", [layer(app="other")], architecture=OTHER)
    mine = await registry.push(f"{NAME}/app:mine", [layer(app="mine")])
    digest = await registry.push_index(f"{NAME}/app:index", [(OTHER, other), (host_architecture(), mine)])
    found = await store.ensure(image(f"{NAME}/app:index"), pull_token="")
    assert found.digest == digest
    assert (found.layers[0] / "app").read_text() == "mine"
    assert (await registry.client.resolve(f"{NAME}/app:index")).digest == digest


async def test_dockers_own_manifests(registry: Registry, store: FileImageStore) -> None:
    await registry.push(f"{NAME}/app:docker", [layer(app="docker")], media_type=DOCKER)
    found = await store.ensure(image(f"{NAME}/app:docker"), pull_token="")
    assert (found.layers[0] / "app").read_text() == "docker"


# -- registries that lie or ask ----------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    """A registry that answers what the test says: path to (code, headers, body)."""

    pages: dict[str, tuple[int, dict[str, str], bytes]]
    needs_token: str
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        host = self.headers["host"]
        if self.path.startswith("/realm?"):
            query = parse_qs(urlsplit(self.path).query)
            assert query == {"service": ["test"], "scope": ["repository:app:pull"]}
            code, headers, body = 200, {}, json.dumps({"token": self.needs_token}).encode()
        elif self.needs_token and self.headers.get("authorization") != f"Bearer {self.needs_token}":
            challenge = f'Bearer realm="http://{host}/realm",service="test",scope="repository:app:pull"'
            code, headers, body = 401, {"WWW-Authenticate": challenge}, b""
        else:
            code, headers, body = self.pages.get(self.path, (404, {}, b""))
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def answering(pages: dict[str, bytes], *, needs_token: str = "") -> Generator[tuple[str, type[Answers]]]:
    class Here(Answers):
        pass

    Here.asked = []
    Here.pages = {path: (200, {"Content-Type": OCI}, body) for path, body in pages.items()}
    Here.needs_token = needs_token
    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", Here
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def manifest(layer_digest: str, size: int = 1) -> bytes:
    config = {"mediaType": "x", "digest": f"sha256:{'0' * 64}", "size": 2}
    layers = [{"mediaType": "x", "digest": layer_digest, "size": size}]
    return json.dumps({"mediaType": OCI, "config": config, "layers": layers}).encode()


async def test_an_anonymous_token_is_fetched_once_when_the_registry_asks(tmp_path: Path) -> None:
    blob = b"content"
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    pages = {"/v2/app/manifests/1": manifest(digest), f"/v2/app/blobs/{digest}": blob}
    with answering(pages, needs_token="anonymous") as (url, server):
        client = RegistryClient(endpoints={NAME: url})
        try:
            found = await client.manifest(image(f"{NAME}/app:1"))
            assert [one.digest for one in found.layers] == [digest]
            descriptor = Descriptor(media_type="x", digest=digest, size=len(blob))
            await client.blob(image(f"{NAME}/app:1"), descriptor, tmp_path / "blob")
            assert (tmp_path / "blob").read_bytes() == blob
            with pytest.raises(NotFound, match="may not read it"):
                await client.manifest(image(f"{NAME}/app:1"), token="wrong")
        finally:
            await client.aclose()
    realm = "/realm?service=test&scope=repository%3Aapp%3Apull"
    assert [path.replace(":", "%3A") for path in server.asked if path.startswith("/realm")] == [realm, realm]


@pytest.mark.parametrize(
    "body",
    [
        manifest("sha256:../../../../../../../../../../etc"),
        manifest("latest"),
        manifest(f"sha256:{'A' * 64}"),
        json.dumps({"mediaType": OCI_INDEX, "manifests": [{"digest": "latest", "platform": {}}]}).encode(),
        json.dumps({"mediaType": OCI_INDEX, "manifests": {"digest": "x"}}).encode(),
        b"[]",
        b"{}",
        b"not json",
    ],
)
async def test_a_manifest_that_names_no_digests_is_refused(body: bytes, tmp_path: Path) -> None:
    """A digest names a folder of the store: one that leads elsewhere would make the host's files a layer."""
    with answering({"/v2/app/manifests/1": body}) as (url, _):
        client = RegistryClient(endpoints={NAME: url})
        try:
            with pytest.raises(InvalidRequest, match=f"config.image: {NAME}/app:1"):
                await FileImageStore(tmp_path / "store", client).ensure(image(f"{NAME}/app:1"), pull_token="")
        finally:
            await client.aclose()


async def test_a_manifest_of_another_digest_is_refused() -> None:
    wanted = f"sha256:{'1' * 64}"
    with answering({f"/v2/app/manifests/{wanted}": manifest(wanted)}) as (url, _):
        client = RegistryClient(endpoints={NAME: url})
        try:
            with pytest.raises(InvalidRequest, match="sent another manifest"):
                await client.manifest(image(f"{NAME}/app@{wanted}"))
        finally:
            await client.aclose()
