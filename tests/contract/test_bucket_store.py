"""The client of the operator's store against a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from pantala.buckets.store import BucketStore
from pantala.errors import NotFound, TransientError, UserError
from pantala.testing.s3 import s3

pytestmark = pytest.mark.anyio
ODD = "fly-statics/a b/ä+%2F&?=.txt"


async def test_objects_come_and_go_over_tls(tmp_path: Path) -> None:
    async with s3(tmp_path, tls=True) as server:
        await server.bucket("assets")
        store = BucketStore(server.settings())
        await store.put("assets", ODD, b"content", size=7, content_type="text/plain")
        await store.copy("assets", ODD, "fly-statics/copy.txt")
        assert server.objects("assets") == {ODD: b"content", "fly-statics/copy.txt": b"content"}
        assert await store.get("assets", ODD, bytes_max=7) == b"content"
        with pytest.raises(UserError, match="larger than 6 bytes"):
            await store.get("assets", ODD, bytes_max=6)
        assert await store.list_names("assets", "fly-statics/") == (["fly-statics/copy.txt"], ["fly-statics/a b/"])
        await store.delete("assets", [ODD, "not-there"])
        with pytest.raises(NotFound):
            await store.get("assets", ODD, bytes_max=7)
        with pytest.raises(NotFound):
            await store.copy("assets", ODD, "other")
        stranger = BucketStore(server.settings(ca_file=""))
        with pytest.raises(TransientError, match=r"cannot be reached .*listing x of the bucket assets"):
            await stranger.list_sizes("assets", "x")


async def test_more_objects_than_fit_a_page(tmp_path: Path) -> None:
    async with s3(tmp_path) as server:
        await server.bucket("assets")
        folder = tmp_path / "s3" / "assets" / "many"
        for number in range(1, 2106):
            (folder / f"{number % 3}").mkdir(parents=True, exist_ok=True)
            (folder / f"{number % 3}" / f"{number}.txt").write_text("x" * (number % 5))
        store = BucketStore(server.settings())
        found = await store.list_sizes("assets", "many/")
        assert found == {f"many/{n % 3}/{n}.txt": n % 5 for n in range(1, 2106)}
        assert (await store.list_names("assets", "many/"))[1] == ["many/0/", "many/1/", "many/2/"]
        await store.delete("assets", list(found))
        assert await store.list_sizes("assets", "many/") == {}
