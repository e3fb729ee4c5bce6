"""A folder of the project on its way to a bucket: what is in it, and what must not become public."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pantala.deploys.statics import read_folders
from pantala.errors import InvalidRequest
from pantala.wire.machine import Static

pytestmark = pytest.mark.anyio


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "public" / "css").mkdir(parents=True)
    (root / "public" / "index.html").write_text("hello")
    (root / "public" / "css" / "a b.css").write_text("body {}")
    (root / "empty").mkdir()
    (root / "linked").symlink_to(root / "public")
    (root / "sly").mkdir()
    (root / "sly" / "passwd").symlink_to("/etc/passwd")
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "wait")
    return root


async def test_files_with_their_content(project: Path) -> None:
    here = Static(guest_path="./public/", url_prefix="/s")
    elsewhere = [
        Static(guest_path="/app", url_prefix="/a"),
        Static(guest_path="/b", url_prefix="/b", tigris_bucket="x"),
    ]
    found = await read_folders(project, [*elsewhere, here])
    assert list(found) == ["/s"]
    assert {name: content.size for name, content in found["/s"].files.items()} == {"css/a b.css": 7, "index.html": 5}
    assert found["/s"].files["index.html"].sha256 == hashlib.sha256(b"hello").hexdigest()
    assert found["/s"].root == project / "public"


@pytest.mark.parametrize(
    ("guest_path", "why"),
    [
        ("../project/public", "leads out of the project"),
        ("public/../..", "leads out of the project"),
        ("./", "is the whole project"),
        (".", "is the whole project"),
        ("missing", "there is no folder"),
        ("public/index.html", "there is no folder"),
        ("empty", "is empty"),
        ("linked", "linked is a symbolic link"),
        ("linked/css", "linked is a symbolic link"),
        ("sly", "passwd is a symbolic link"),
        ("pipe", "wait is no file"),
    ],
)
async def test_what_is_not_served(project: Path, guest_path: str, why: str) -> None:
    statics = [Static(guest_path="public", url_prefix="/a"), Static(guest_path=guest_path, url_prefix="/s")]
    with pytest.raises(InvalidRequest, match=r"statics\[1\]\.guest_path") as raised:
        await read_folders(project, statics)
    assert why in raised.value.message


async def test_a_name_that_is_no_text_is_refused(project: Path) -> None:
    with (Path(os.fsdecode(os.fsencode(project / "public") + b"/\xff.txt"))).open("w") as file:
        file.write("x")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        await read_folders(project, [Static(guest_path="public", url_prefix="/s")])
