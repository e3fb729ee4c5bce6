"""What is in the directory is what runs, however little it differs from what was built before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pantala.testing.box import BoxRig

pytestmark = pytest.mark.root

BEFORE, AFTER, OTHER = "Flask on Fly.io!", "Flask on Pantala", "Flask elsewhere!"


def test_files_of_equal_size_are_told_apart_between_versions_and_between_apps(box: BoxRig, flask_source: Path) -> None:
    assert len({len(BEFORE), len(AFTER), len(OTHER)}) == 1
    other = Path(shutil.copytree(flask_source, flask_source.with_name("other")))
    edit(other, OTHER)
    box.pantala("launch", "--now", "--yes", "--name", "same-size", cwd=flask_source)
    box.pantala("launch", "--now", "--yes", "--name", "same-size-other", cwd=other)
    assert box.curl("https://same-size-other.apps.pantala.test/") == OTHER
    edit(flask_source, AFTER)
    box.pantala("deploy", "--yes", cwd=flask_source)
    assert box.curl("https://same-size.apps.pantala.test/") == AFTER
    box.pantala("apps", "destroy", "same-size", "same-size-other", "--yes")


def edit(source: Path, words: str) -> None:
    app = source / "app.py"
    app.write_text(app.read_text().replace(BEFORE, words))
