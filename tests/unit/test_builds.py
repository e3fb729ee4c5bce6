"""Scanners, `.dockerignore`, the wrapped runc and BuildKit's progress."""

from __future__ import annotations

import base64
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pantala.builds import context, runc_wrapper, scanner
from pantala.builds.ignore import IgnoreRules
from pantala.builds.progress import Progress
from pantala.errors import InvalidRequest


@pytest.mark.parametrize(
    ("pattern", "path", "ignored"),
    [
        ("*.pyc", "a.pyc", True),
        ("*.pyc", "pkg/a.pyc", False),
        ("**/*.pyc", "pkg/deep/a.pyc", True),
        ("**/*.pyc", "a.pyc", True),
        (".venv", ".venv/lib/x", True),
        ("/build/", "build/out", True),
        ("docs/*", "docs/a/b", True),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("[ab].txt", "b.txt", True),
        ("# comment", "# comment", False),
    ],
)
def test_dockerignore_patterns(pattern: str, path: str, ignored: bool) -> None:
    assert IgnoreRules([pattern]).ignores(path) is ignored


def test_the_last_matching_pattern_wins() -> None:
    rules = IgnoreRules(["*.md", "!README.md", "README.md.bak"])
    assert rules.ignores("a.md")
    assert not rules.ignores("README.md")


def test_a_context_leaves_out_what_is_ignored_and_is_the_same_each_time(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "node_modules" / "x").mkdir(parents=True)
    (source / "node_modules" / "x" / "index.js").write_text("x")
    (source / "app.py").write_text("print()")
    (source / "Dockerfile").write_text("FROM scratch\n")
    (source / ".dockerignore").write_text("node_modules\nDockerfile\n")
    packed = tmp_path / "context.tar.gz"
    inside = context.pack(source, packed, dockerfile=source / "Dockerfile")
    with tarfile.open(packed) as archive:
        members = archive.getmembers()
    assert sorted(m.name for m in members) == [".dockerignore", "Dockerfile", "app.py"]
    assert inside == "Dockerfile"
    assert {m.uid for m in members} == {0}
    first = packed.read_bytes()
    os.utime(source / "app.py", (1, 1))
    context.pack(source, packed, dockerfile=source / "Dockerfile")
    assert packed.read_bytes()[10:] == first[10:]  # but for the time in gzip's own header


def test_a_dockerfile_outside_the_context_travels_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "Other").write_text("FROM scratch\n")
    assert context.pack(source, tmp_path / "c.tar.gz", dockerfile=tmp_path / "Other") == context.OUTSIDE_DOCKERFILE


def test_a_missing_dockerfile_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"build\.dockerfile"):
        context.pack(tmp_path, tmp_path / "c.tar.gz", dockerfile=tmp_path / "Dockerfile")


@pytest.mark.parametrize(
    ("files", "target"),
    [
        ({"app.py": "from flask import Flask\napp = Flask(__name__)\n"}, "app:app"),
        ({"wsgi.py": "import flask\nserver = flask.Flask(__name__)\n"}, "wsgi:server"),
        ({"main.py": "from flask import Flask\ndef create_app():\n    return Flask('x')\n"}, "main:create_app()"),
    ],
    ids=["app.py", "wsgi.py", "factory"],
)
def test_flask_runs_behind_gunicorn(tmp_path: Path, files: dict[str, str], target: str) -> None:
    (tmp_path / "requirements.txt").write_text("Flask==3.0.0\ngunicorn==21.2.0\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    source = scanner.scan(tmp_path)
    assert source is not None
    assert (source.family, source.port) == ("Flask", 8080)
    dockerfile = source.files["Dockerfile"]
    assert f'"{target}"]' in dockerfile
    assert "flask run" not in dockerfile
    assert "gunicorn==23" not in dockerfile


def test_flask_without_gunicorn_gets_it_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("flask[async]>=3  # web\n")
    (tmp_path / "app.py").write_text("from flask import Flask\napp = Flask(__name__)\n")
    source = scanner.scan(tmp_path)
    assert source is not None
    assert "gunicorn==" in source.files["Dockerfile"]
    assert any("gunicorn" in note for note in source.notes)


def test_the_projects_own_dockerfile_and_python_version_win(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM x\nexpose 9000/tcp\n")
    (tmp_path / "requirements.txt").write_text("flask\n")
    (tmp_path / "app.py").write_text("app = Flask(__name__)\n")
    assert scanner.scan(tmp_path) == scanner.Source(family="Dockerfile", port=9000)
    (tmp_path / "Dockerfile").unlink()
    (tmp_path / ".python-version").write_text("3.12.1\n")
    source = scanner.scan(tmp_path)
    assert source is not None
    assert "FROM python:3.12-slim" in source.files["Dockerfile"]


def test_a_static_site_and_nothing_known(tmp_path: Path) -> None:
    assert scanner.scan(tmp_path) is None
    (tmp_path / "index.html").write_text("<h1>hi</h1>")
    source = scanner.scan(tmp_path)
    assert source is not None
    assert source.family == "static site"
    assert "COPY . /srv" in source.files["Dockerfile"]


def test_authorities_reach_the_step_and_what_the_dockerfile_set_stays() -> None:
    spec: dict[str, Any] = {"process": {"env": ["PATH=/bin", "PIP_CERT=/mine"]}, "mounts": []}
    runc_wrapper.amend(spec, ca="/etc/ca.crt", env={"PIP_INDEX_URL": "https://index"})
    env = spec["process"]["env"]
    assert "PIP_CERT=/mine" in env
    assert sum(entry.startswith("PIP_CERT=") for entry in env) == 1
    assert f"SSL_CERT_FILE={runc_wrapper.CA_INSIDE}" in env
    assert "PIP_INDEX_URL=https://index" in env
    assert spec["mounts"][0]["destination"].startswith("/dev/")


@pytest.mark.parametrize(
    ("arguments", "bundle"),
    [
        (["--log", "x", "run", "--bundle", "/b", "id"], "/b"),
        (["create", "--bundle=/c", "id"], "/c"),
        (["kill", "id"], None),
    ],
    ids=["run", "create", "kill"],
)
def test_the_bundle_is_found_in_runcs_arguments(arguments: list[str], bundle: str | None) -> None:
    found = runc_wrapper.bundle_of(arguments)
    assert (str(found) if found else None) == bundle


def test_a_failed_build_is_explained_by_the_end_of_its_output() -> None:
    progress = Progress()
    log = base64.b64encode(b"line one\nERROR: no matching distribution\n").decode()
    vertex = {"digest": "sha256:1", "name": "[2/3] RUN pip install x", "completed": "2026-01-01T00:00:01Z",
              "started": "2026-01-01T00:00:00Z", "error": "exit code: 1"}  # fmt: skip
    events = progress.feed(json.dumps({"vertexes": [vertex], "logs": [{"data": log}]}).encode())
    assert (events[0].type, events[0].took_ms) == ("step", 1000)
    assert "no matching distribution" in progress.failure()
    assert "exit code: 1" in progress.failure()


def test_only_a_users_own_step_may_be_silent_for_as_long_as_it_likes() -> None:
    progress = Progress()

    def told(name: str, **times: str) -> float | None:
        vertex = {"digest": f"sha256:{name}", "name": name, **times}
        progress.feed(json.dumps({"vertexes": [vertex]}).encode())
        return progress.quiet_at_most_s()

    begun, ended = "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"
    assert progress.quiet_at_most_s() == 60
    assert told("exporting to image", started=begun) == 600
    assert told("[stage-0 4/5] RUN make", started=begun) is None
    assert told("[stage-0 4/5] RUN make", started=begun, completed=ended) == 600
    assert told("exporting to image", started=begun, completed=ended) == 60
