"""A deploy's files at the edge: pushed through the API into a real S3 server, served by a real proxy, no machine
running."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from mesh_rig import HOST
from proxy_rig import Rig, app_rows, machine_row, row, running, service_row

from pantala.buckets.store import BucketStore
from pantala.client.api import ApiClient, connect
from pantala.deploys.statics import push_folders, read_folders
from pantala.kit.secret import Secret
from pantala.testing import platform as control
from pantala.testing.ports import free_port
from pantala.testing.s3 import s3
from pantala.wire.feed import AppRow, BucketSettings, FeedRow
from pantala.wire.machine import Static

pytestmark = pytest.mark.anyio
IP = "127.0.5.9"
MAPPING = Static(guest_path="public", url_prefix="/static", index_document="index.html")


@asynccontextmanager
async def server(folder: Path, store: BucketSettings) -> AsyncGenerator[ApiClient]:
    settings = control.SETTINGS.__replace__(writers=store.writers)
    async with (
        control.running(folder, settings=settings, objects=BucketStore(store)) as platform,
        control.serve_http(platform) as url,
        connect(url, Secret(platform.token)) as client,
    ):
        await platform.create_app("web")
        yield client


async def push(client: ApiClient, project: Path, **files: str) -> Sequence[Static]:
    """The project's folder as the next deploy has it."""
    public = project / "public"
    public.mkdir(parents=True, exist_ok=True)
    for path in public.glob("*.*"):
        path.unlink()
    for name, content in files.items():
        (public / name.replace("__", "-").replace("_", ".")).write_text(content)
    folders = await read_folders(project, [MAPPING])
    return (await push_folders(client, "web", [MAPPING], folders, lambda _: None)).statics


def version(
    rig: Rig, port: int, digest: str, machine: str, *, statics: Sequence[Static], state: str = "started"
) -> list[FeedRow]:
    """A machine of a version of its own."""
    service = service_row(rig.ports, "web", port, statics=list(statics))
    return [
        FeedRow(stream=service.stream, key=f"svc/web/{digest}", value=service.value),
        machine_row("web", machine, IP if state == "started" else "", state, services=[digest]),
    ]


async def test_an_edge_serves_what_a_deploy_has_pushed(tmp_path: Path) -> None:
    async with s3(tmp_path) as store:
        await store.bucket("assets")
        opened = store.settings(writers={"assets": ["acme"]})
        async with server(tmp_path, opened) as client, running(tmp_path, buckets=opened) as rig:
            port = free_port()
            backend = await rig.backend("app", IP, port)
            await rig.agent.rows(*app_rows("web", HOST))
            await rig.agent.rows(row("routes", "app/web", AppRow(app="web", org="acme", network=1)))

            (tmp_path / "web" / "public" / "sub dir").mkdir(parents=True)
            (tmp_path / "web" / "public" / "sub dir" / "ä+b%20&c.css").write_text("css")
            first = await push(client, tmp_path / "web", index_html="one", main__0a1b2c3d_js="1", gone_txt="x")
            await rig.agent.rows(*version(rig, port, "d1", "m1", statics=first, state="stopped"))
            page = await rig.get(HOST, "/static/")
            assert (page.text, page.headers["content-type"]) == ("one", "text/html; charset=utf-8")
            script = await rig.get(HOST, "/static/main-0a1b2c3d.js")
            assert (script.text, script.headers["content-type"]) == ("1", "text/javascript; charset=utf-8")
            odd = await rig.get(HOST, "/static/sub%20dir/%C3%A4%2Bb%2520%26c.css")
            assert (odd.text, odd.headers["content-type"]) == ("css", "text/css; charset=utf-8")
            assert not await rig.agent_asked_for_a_wake()

            # In the middle of a deploy: one machine has the new version, the other the old one.
            second = await push(client, tmp_path / "web", index_html="two", main__4e5f6a7b_js="2")
            await rig.agent.rows(*version(rig, port, "d1", "m1", statics=first))
            await rig.agent.rows(*version(rig, port, "d2", "m2", statics=second, state="updating"))
            assert (await rig.get(HOST, "/static/")).text == "one", "of what serves"
            assert (await rig.get(HOST, "/static/main-0a1b2c3d.js")).text == "1"
            assert (await rig.get(HOST, "/static/main-4e5f6a7b.js")).text == "2"

            # After it: pages of the old version are still open somewhere.
            await rig.agent.rows(*version(rig, port, "d2", "m1", statics=second))
            await rig.agent.rows(*version(rig, port, "d2", "m2", statics=second))
            assert (await rig.get(HOST, "/static/")).text == "two"
            assert (await rig.get(HOST, "/static/main-0a1b2c3d.js")).text == "1"
            assert backend.requests == []
            assert (await rig.get(HOST, "/static/gone.txt")).text == "app", "nobody removed it for nothing"
