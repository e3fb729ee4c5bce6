"""From a directory to HTTPS, through the CLI, as the README promises it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pantala.testing.box import BoxRig

pytestmark = pytest.mark.root


def test_a_flask_directory_becomes_an_https_site_without_an_edited_line(box: BoxRig, flask_source: Path) -> None:
    said = box.pantala("launch", "--now", "--yes", "--name", "first-hour", cwd=flask_source)
    assert said.stdout.strip() == "https://first-hour.apps.pantala.test/"
    assert box.curl("https://first-hour.apps.pantala.test/") == "Flask on Fly.io!"
    assert "gunicorn" in (flask_source / "Dockerfile").read_text()
    assert box.pantala("config", "validate", cwd=flask_source).stdout.strip() == "✓ Configuration is valid"
    status = box.pantala_json("status", cwd=flask_source)
    assert status["app"]["status"] == "deployed"
    assert len(status["machines"]) == 2
    box.pantala("apps", "destroy", "first-hour", "--yes")
