"""`pantala deploy` with folders that edges serve from a bucket: the real API in front of a real S3 server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from commands import Cli

from pantala.buckets.store import BucketStore
from pantala.client.api import ApiClient, connect
from pantala.deploys.statics import push_folders, read_folders
from pantala.errors import PantalaError
from pantala.kit.secret import Secret
from pantala.testing.forks import Forks
from pantala.testing.platform import SETTINGS, running, serve_http
from pantala.testing.s3 import S3, s3
from pantala.wire.feed import BucketSettings
from pantala.wire.machine import Static
from pantala.wire.statics import FileContent, PushStaticsRequest

pytestmark = pytest.mark.anyio

WRITERS = {"assets": ["acme"], "theirs": ["others"]}
TOML = """app = "web"
primary_region = "iad"
[[statics]]
guest_path = "public"
url_prefix = "/static"
index_document = "index.html"
[[statics]]
guest_path = "/site"
url_prefix = "/mine"
tigris_bucket = "filled-by-hand"
[http_service]
internal_port = 8080
"""
DEPLOY = ("deploy", "--image", "registry.pantala.test/web:v1", "--no-ha", "--no-smoke-checks")


class Project:
    """The app `web` with the folder `public`, in the store's bucket `assets`."""

    def __init__(self, cli: Cli, store: S3, client: ApiClient) -> None:
        self.cli = cli
        self.client = client
        self.store = store
        self.public = cli.folder / "public"

    def write(self, **files: str) -> None:
        """`index_html` is `index.html`, `a__b` a dash."""
        for name, content in files.items():
            path = self.public / name.replace("__", "-").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    async def deploy(self, *flags: str) -> str:
        """What it said."""
        ended = await self.cli.run(*DEPLOY, *flags)
        assert ended.code == 0, ended.err
        return ended.err

    async def push(self, **files: str) -> str:
        """The push of a deploy that came no further."""
        self.write(**files)
        item = Static(guest_path="public", url_prefix="/static")
        folders = await read_folders(self.cli.folder, [item])
        (made,) = (await push_folders(self.client, "web", [item], folders, lambda _: None)).new
        return made.id

    def told(self) -> str:
        """Where the machines are told that the files are."""
        (folder,) = {
            item.guest_path
            for machine in self.cli.agent.machines.values()
            if machine.state.value != "destroyed"
            for item in machine.config.statics or []
            if item.url_prefix == "/static" and item.tigris_bucket == "assets" and item.index_document == "index.html"
        }
        return folder

    def served(self, folder: str) -> dict[str, str]:
        prefix = folder.strip("/") + "/"
        objects = self.store.objects("assets").items()
        return {key.removeprefix(prefix): text.decode() for key, text in objects if key.startswith(prefix)}

    def pushes(self) -> set[str]:
        return {key.split("/")[2].removesuffix(".json") for key in self.store.objects("assets")}

    async def releases(self) -> list[str]:
        return [one["status"] for one in json.loads(await self.cli.ok("releases", "--json"))]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncGenerator[S3]:
    async with s3(tmp_path) as server:
        await server.bucket("assets")
        yield server


@asynccontextmanager
async def project(tmp_path: Path, store: S3, forks: Forks, settings: BucketSettings | None) -> AsyncGenerator[Project]:
    folder = tmp_path / "web"
    folder.mkdir()
    control = SETTINGS.__replace__(writers=settings.writers if settings else {})
    objects = BucketStore(settings) if settings else None
    async with (
        running(tmp_path, settings=control, objects=objects) as platform,
        serve_http(platform) as url,
        connect(url, Secret(platform.token)) as client,
    ):
        await platform.create_app("web")
        made = Project(Cli(platform, url, folder, forks), store, client)
        made.cli.write("fly.toml", TOML)
        made.write(index_html="one", app__3f2a9c1b_js="1", logo_svg="<svg/>")
        yield made


@pytest.fixture
async def web(tmp_path: Path, store: S3, forks: Forks) -> AsyncGenerator[Project]:
    async with project(tmp_path, store, forks, store.settings(writers=WRITERS)) as made:
        yield made


async def test_each_version_has_its_files_and_only_what_changed_is_sent(web: Project) -> None:
    said = await web.deploy()
    assert "Files of public for /static: 3, 3 to send" in said
    first = web.told()
    assert first.startswith("/fly-statics/web/")
    assert web.served(first) == {"index.html": "one", "app-3f2a9c1b.js": "1", "logo.svg": "<svg/>"}

    (web.public / "app-3f2a9c1b.js").unlink()
    web.write(index_html="two", app__9d8e7f6a_js="2")
    assert "Files of public for /static: 3, 2 to send" in await web.deploy()
    second = web.told()
    assert second != first
    assert web.served(second) == {
        "index.html": "two",
        "app-9d8e7f6a.js": "2",
        "logo.svg": "<svg/>",
        "app-3f2a9c1b.js": "1",  # for pages of the first version that are still open
    }
    assert web.served(first)["index.html"] == "one", "machines may be put back to it"

    assert "all there already" in await web.deploy()
    assert web.told() == second
    (machine,) = (one for one in web.cli.agent.machines.values() if one.state.value == "started")
    others = [item for item in machine.config.statics or [] if item.url_prefix == "/mine"]
    assert [(item.guest_path, item.tigris_bucket) for item in others] == [("/site", "filled-by-hand")]


async def test_files_of_a_version_that_fails_go_and_those_that_serve_stay(web: Project) -> None:
    await web.deploy()
    before = web.told()
    web.cli.agent.exit_at_start = 3
    web.write(index_html="two")
    assert "exited at start" in await web.cli.refused(*DEPLOY)
    assert web.told() == before
    assert web.pushes() == {before.rpartition("/")[2]}
    assert web.served(before)["index.html"] == "one"


async def test_old_pushes_go_but_not_what_a_machine_names(web: Project) -> None:
    await web.deploy()
    oldest = web.told()
    pushed = [await web.push(index_html=str(number)) for number in range(2, 6)]
    assert (await web.client.clean_statics("web")).removed == [pushed[0]]
    assert web.pushes() == {oldest.rpartition("/")[2], *pushed[1:]}
    web.write(index_html="6")
    await web.deploy()
    assert len(web.pushes()) == 3
    assert web.served(oldest) == {}
    assert web.served(web.told())["index.html"] == "6"


async def test_nothing_changes_when_the_files_do_not_arrive(web: Project, store: S3) -> None:
    await web.deploy()
    before = web.told()
    web.write(index_html="two")
    await store.stop()
    message = await web.cli.refused(*DEPLOY)
    assert "the store of this platform cannot be reached" in message
    assert web.told() == before
    assert await web.releases() == ["complete"]
    await web.client.delete_app("web")


async def test_an_app_takes_its_files_with_it(web: Project, store: S3) -> None:
    await store.put("assets", "fly-statics/webs/other.txt", b"of another app")
    await web.push()
    await web.client.delete_app("web")
    assert set(store.objects("assets")) == {"fly-statics/webs/other.txt"}


async def test_what_is_wrong_with_a_folder_is_said_before_anything_is_built(web: Project) -> None:
    (web.public / "link").symlink_to("/etc")
    message = await web.cli.refused("deploy")
    assert "statics[0].guest_path" in message
    assert "link is a symbolic link" in message
    assert web.cli.platform.builder.contexts == []


async def test_a_dry_run_sends_nothing(web: Project) -> None:
    out = await web.cli.ok(*DEPLOY, "--dry-run")
    assert "3 file(s)" in out
    assert web.store.objects("assets") == {}


async def test_buckets_are_the_operators_to_open(tmp_path: Path, store: S3, forks: Forks) -> None:
    async def refused(settings: BucketSettings | None, bucket: str | None = None) -> str:
        folder = tmp_path / f"case-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        async with project(folder, store, forks, settings) as made:
            content = FileContent(size=1, sha256="0" * 64)
            request = PushStaticsRequest(url_prefix="/static", files={"a": content}, bucket=bucket)
            with pytest.raises(PantalaError) as raised:
                await made.client.begin_statics("web", request)
            return raised.value.message

    assert "has named no store for files (--buckets)" in await refused(None)
    assert "opened no bucket to deploys of the organization acme" in await refused(store.settings())
    opened = store.settings(writers=WRITERS)
    assert "theirs is not open to deploys of the organization acme" in await refused(opened, "theirs")
    two = store.settings(writers={"assets": ["acme"], "more": ["acme"]})
    assert "tigris_bucket: is needed, one of assets, more" in await refused(two)
    assert "the platform's store has no bucket more" in await refused(two, "more")
    secrets = tmp_path / "wrong.json"
    secrets.write_text(json.dumps({"access_key_id": "operator", "secret_access_key": "not-this-one"}))
    message = await refused(store.settings(writers=WRITERS, credentials_file=str(secrets)))
    assert "the store refused listing fly-statics/web/ of the bucket assets" in message
    assert "not-this-one" not in message


async def test_the_api_takes_what_was_announced_and_nothing_else(web: Project) -> None:
    http, auth = web.cli.platform.http, web.cli.platform.auth
    content = {"size": 3, "sha256": hashlib.sha256(b"one").hexdigest()}

    async def begin(**body: object) -> tuple[int, dict[str, str]]:
        answer = await http.post("/v1/apps/web/statics", json={"url_prefix": "/s", **body}, headers=auth)
        return answer.status_code, answer.json()

    for path in ("../a", "/a", "a//b", "a/./b", "", "a\nb", "x" * 1000):
        code, answer = await begin(files={path: content})
        assert (code, answer["error"].startswith("files: ")) == (400, True), path
    assert (await begin(files={"a": content | {"size": 1 << 40}}))[0] == 400
    code, push = await begin(files={"a/b.txt": content, "c.txt": content})
    assert (code, push["uploads"]) == (200, ["a/b.txt", "c.txt"])
    where = f"/v1/apps/web/statics/{push['id']}"

    async def put(path: str, body: bytes, headers: dict[str, str] = auth, bucket: str = "assets") -> int:
        params = {"bucket": bucket, "path": path}
        return (await http.put(f"{where}/files", params=params, content=body, headers=headers)).status_code

    assert await put("a/b.txt", b"two") == 400
    assert await put("a/b.txt", b"one more") == 400
    assert await put("d.txt", b"one") == 400
    assert await put("a/b.txt", b"one", bucket="theirs") == 403
    stranger = await web.cli.platform.admin("eve@example.com", "others")
    assert await put("a/b.txt", b"one", stranger) == 404
    assert await put("a/b.txt", b"one") == 200
    unfinished = await http.post(f"{where}/finish", params={"bucket": "assets"}, headers=auth)
    assert (unfinished.status_code, "such as c.txt" in unfinished.text) == (409, True)
    assert await put("c.txt", b"one") == 200
    finished = await http.post(f"{where}/finish", params={"bucket": "assets"}, headers=auth)
    assert finished.json() == {"unchanged": 0, "kept": 0}
    assert await put("c.txt", b"one") == 404, "a finished push never changes"
    assert web.served(push["guest_path"]) == {"a/b.txt": "one", "c.txt": "one"}
    assert (await http.delete(where, params={"bucket": "assets"}, headers=auth)).status_code == 200
    assert web.store.objects("assets") == {}
