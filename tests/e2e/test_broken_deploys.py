"""Deploys that do not end well: the version before serves on, and whoever deployed learns why."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from probe_rig import steady_client

from pantala.testing.box import BoxRig

pytestmark = pytest.mark.root

REFUSED_WITHIN_S = 30


def test_an_app_whose_workers_die_at_import_is_refused_with_their_words(
    box: BoxRig, flask_source: Path, tmp_path: Path
) -> None:
    """Its server accepts connections all the while; nobody is ever answered."""
    box.pantala("launch", "--now", "--yes", "--name", "no-database", cwd=flask_source)
    source = flask_source / "app.py"
    source.write_text(source.read_text() + '\n\nraise SystemExit("no database")\n')
    with steady_client(box, tmp_path, "https://no-database.apps.pantala.test/") as client:
        begun = time.monotonic()
        done = box.pantala("deploy", cwd=flask_source, check=False)
        took_s = time.monotonic() - begun
        client.await_more(5)
        assert client.answers().failures == []
    assert done.code != 0
    assert "the app accepts connections on port 8080 but does not answer HTTP" in done.stderr
    assert "the previous version still serves" in done.stderr
    assert "no database" in done.stderr.partition("last lines of its log")[2]
    assert took_s < REFUSED_WITHIN_S
    assert box.curl("https://no-database.apps.pantala.test/") == "Flask on Fly.io!"
    box.pantala("apps", "destroy", "no-database", "--yes")
